"""What a model answered, recorded in the pass that collects: against the whole model run by hand, text by text."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from neuronlens import capture as capture_module
from neuronlens.accumulate import make_accumulator
from neuronlens.batches import pad
from neuronlens.capture import Capture
from neuronlens.errors import UsageError
from neuronlens.hookpoints import HOOK_POINTS, find_sites
from neuronlens.models import LoadedModel
from neuronlens.predictions import AnswerKey, Predictions, predict
from tests.tiny_models import CONFIGS, DECODERS, ENCODERS, LABELS, tiny_model, tiny_tokenizer

EOS, SEP = 1, 2
TEXTS = [[EOS, 40, 41, 42, SEP], [50, 51, SEP], [60, EOS, 61, 62, 63, 64, 65, SEP], [70, SEP], [EOS, SEP], [80, 81, 82]]
SEEDS = {"lm": 0, "classifier": 5}
"""With these, every model answers the texts in more than one way."""
UNITS = ("last_token", "token", "mean", "cls")
HOOKED = [*((name,) for name in HOOK_POINTS), ("attn_out", "mlp_post"), HOOK_POINTS]


@lru_cache
def loaded(architecture: str, head: str = "lm", dtype: torch.dtype = torch.float32) -> LoadedModel:
    tokenizer = tiny_tokenizer()
    tokenizer.cls_token = "<eos>"  # so that unit cls has a token that stands in some texts, not first and not in all
    return LoadedModel.of(tiny_model(architecture, head=head, seed=SEEDS[head]).to(dtype), tokenizer)


@lru_cache
def logits_by_hand(architecture: str, head: str = "lm", dtype: torch.dtype = torch.float32) -> np.ndarray:
    """[X, V] or [X, L] in float64: the whole model, text by text, without pads, hooks or our own code."""
    model = tiny_model(architecture, head=head, seed=SEEDS[head]).to(dtype)
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0] for ids in TEXTS]
    return np.stack([(row[-1] if head == "lm" else row).double().numpy() for row in rows])


def key_for(logits_XV: np.ndarray) -> AnswerKey:
    """Answers of which some are right: what the texts' best tokens are, and one that none says."""
    best = list(dict.fromkeys(logits_XV.argmax(axis=1).tolist()))
    worst = int(logits_XV.sum(axis=0).argmin())
    ids = {f"c{place}": token for place, token in enumerate([*best[:3], worst])}
    return AnswerKey.of(ids, "c0")


def answers_by_hand(logits_XV: np.ndarray, key: AnswerKey) -> tuple[list[str], list[bool], np.ndarray]:
    share_XV = np.exp(logits_XV - logits_XV.max(axis=1, keepdims=True))
    share_XV /= share_XV.sum(axis=1, keepdims=True)
    right = key.ids[key.right]
    predicted = [max(zip(key.concepts, key.ids, strict=True), key=lambda c: row[c[1]])[0] for row in logits_XV]
    return predicted, [int(row.argmax()) == right for row in logits_XV], share_XV[:, right]


def assert_answered(got: Predictions, logits_XV: np.ndarray, key: AnswerKey) -> None:
    predicted, correct, confidence = answers_by_hand(logits_XV, key)
    assert [key.concepts[place] for place in got.predicted_B] == predicted
    assert got.correct_B.tolist() == correct
    np.testing.assert_allclose(got.confidence_B.numpy(), confidence, rtol=1e-4)


def captured(
    model: LoadedModel,
    key: AnswerKey,
    *,
    unit: str,
    hook_points: tuple[str, ...],
    side: str,
    only_correct: bool = False,
    layers="all",
    overrides=None,
) -> tuple[Capture, Predictions]:
    sites = find_sites(model.module, hook_points, layers, overrides)
    capture = Capture(model, sites, unit=unit, histograms=True, raw=dict.fromkeys(range(len(sites))))
    parts = [
        capture.add_and_predict(pad(TEXTS[first : first + 4], pad_id=0, side=side), key, only_correct=only_correct)
        for first in range(0, len(TEXTS), 4)
    ]
    return capture, Predictions.joined(parts)


def assert_same_statistics(got: Capture, want: Capture) -> None:
    for ours, theirs in zip(got.accumulators, want.accumulators, strict=True):
        np.testing.assert_array_equal(ours.moments().n_N, theirs.moments().n_N)
        for name in ("mean_N", "std_N", "mean_abs_N", "min_N", "max_N"):
            np.testing.assert_allclose(
                getattr(ours.moments(), name), getattr(theirs.moments(), name), rtol=1e-3, atol=1e-5
            )
    np.testing.assert_array_equal(*(torch.cat(one.raw_samples).numpy() for one in (got, want)))
    for site in got.raw_values:
        torch.testing.assert_close(torch.cat(got.raw_values[site]), torch.cat(want.raw_values[site]))


def captured_apart(model: LoadedModel, keep_X: list[bool] | None, *, unit: str, hook_points, layers="all") -> Capture:
    """The same rows from passes that end at the last site (which test_capture.py holds to values by hand)."""
    sites = find_sites(model.module, hook_points, layers)
    capture = Capture(model, sites, unit=unit, histograms=True, raw=dict.fromkeys(range(len(sites))))
    for first in range(0, len(TEXTS), 4):
        keep_B = None if keep_X is None else torch.tensor(keep_X[first : first + 4])
        capture.add(pad(TEXTS[first : first + 4], pad_id=0), keep_B)
    return capture


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("architecture", DECODERS)
def test_predictions__of_a_decoder_are_the_whole_models(architecture, unit):
    model, logits_XV = loaded(architecture), logits_by_hand(architecture)
    key = key_for(logits_XV)
    for hook_points in HOOKED:
        apart = captured_apart(model, None, unit=unit, hook_points=hook_points)
        for side in ("right", "left"):
            capture, got = captured(model, key, unit=unit, hook_points=hook_points, side=side)
            assert_answered(got, logits_XV, key)
            assert_same_statistics(capture, apart)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("architecture", [*ENCODERS, "gpt2", "llama", "opt", "gemma3_text"])
def test_predictions__of_a_classifier_are_the_whole_models(architecture, unit):
    model, logits_XL = loaded(architecture, "classifier"), logits_by_hand(architecture, "classifier")
    assert len(set(logits_XL.argmax(axis=1))) > 1, "a test of more than one answer"
    for label in LABELS:
        key = AnswerKey.of({label: i for i, label in enumerate(LABELS)}, label)
        for hook_points in HOOKED:
            apart = captured_apart(model, None, unit=unit, hook_points=hook_points)
            for side in ("right", "left"):
                capture, got = captured(model, key, unit=unit, hook_points=hook_points, side=side)
                assert_answered(got, logits_XL, key)
                assert_same_statistics(capture, apart)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi", "opt"])
def test_predictions__are_right_where_the_last_layer_is_not_hooked(architecture, unit):
    model, logits_XV = loaded(architecture), logits_by_hand(architecture)
    key = key_for(logits_XV)
    for hook_points in HOOKED:
        capture, got = captured(model, key, unit=unit, hook_points=hook_points, side="right", layers=[0])
        assert_answered(got, logits_XV, key)
        assert_same_statistics(capture, captured_apart(model, None, unit=unit, hook_points=hook_points, layers=[0]))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("hook_point", ["mlp_post", "attn_out"])
def test_predictions__are_right_where_the_recipe_names_other_modules(unit, hook_point):
    """The input of a whole attention block is no place to leave rows out."""
    model, logits_XV = loaded("llama"), logits_by_hand("llama")
    key = key_for(logits_XV)
    for path in ("layers.{layer}.self_attn.q_proj:input", "layers.{layer}.mlp.gate_proj:output"):
        _, got = captured(model, key, unit=unit, hook_points=(hook_point,), side="right", overrides={hook_point: path})
        assert_answered(got, logits_XV, key)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("unit", ["last_token", "mean", "token"])
def test_predictions__in_bfloat16_are_those_of_bfloat16(architecture, unit):
    """Rounding in another order moves a logit by some 1/128 of it, so only clear answers have to agree."""
    model = loaded(architecture, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    logits_XV = logits_by_hand(architecture, dtype=torch.bfloat16)
    key = key_for(logits_XV)
    predicted, correct, confidence = answers_by_hand(logits_XV, key)
    _, got = captured(model, key, unit=unit, hook_points=("mlp_post",), side="right")
    np.testing.assert_allclose(got.confidence_B.numpy(), confidence, rtol=0.1)
    best_X2 = np.sort(logits_XV, axis=1)[:, -2:]
    clear_X = best_X2[:, 1] - best_X2[:, 0] > 0.03 * np.abs(best_X2[:, 1])
    among_X2 = np.sort(logits_XV[:, list(key.ids)], axis=1)[:, -2:]
    clearly_named_X = among_X2[:, 1] - among_X2[:, 0] > 0.03 * np.abs(among_X2[:, 1])
    assert clear_X.sum() >= 3
    assert clearly_named_X.sum() >= 3
    np.testing.assert_array_equal(got.correct_B.numpy()[clear_X], np.array(correct)[clear_X])
    named = np.array([key.concepts[place] for place in got.predicted_B])
    np.testing.assert_array_equal(named[clearly_named_X], np.array(predicted)[clearly_named_X])


@pytest.mark.parametrize("max_held_bytes", [1 << 30, 0])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("architecture", "head"), [("gpt2", "lm"), ("llama", "lm"), ("bert", "classifier")])
def test_only_correct__counts_the_texts_that_the_whole_model_answers_right(
    architecture, head, unit, max_held_bytes, monkeypatch
):
    """In one pass where the rows may wait for the answers, in two where they would take too much."""
    monkeypatch.setattr(capture_module, "MAX_HELD_BYTES", max_held_bytes)
    model, logits_XV = loaded(architecture, head), logits_by_hand(architecture, head)
    key = key_for(logits_XV)
    _, correct, _ = answers_by_hand(logits_XV, key)
    assert 0 < sum(correct) < len(TEXTS)
    passes = []
    handle = model.module.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    for hook_points in (("mlp_post",), ("attn_out", "resid_post")):
        passes.clear()
        capture, got = captured(model, key, unit=unit, hook_points=hook_points, side="right", only_correct=True)
        n_batches = 2
        assert len(passes) == n_batches if max_held_bytes else len(passes) > n_batches
        assert_answered(got, logits_XV, key)
        assert_same_statistics(capture, captured_apart(model, correct, unit=unit, hook_points=hook_points))
    handle.remove()


def test_predictions__run_the_model_once_and_the_head_over_one_row_a_text():
    model, key = loaded("llama"), AnswerKey.of({"joy": 3, "anger": 4}, "joy")
    shapes = {}
    module = model.module
    watched = {
        "block": module.model.layers[0],
        "last up_proj": module.model.layers[1].mlp.up_proj,
        "last down_proj": module.model.layers[1].mlp.down_proj,
        "head": module.lm_head,
    }
    handles = [
        part.register_forward_hook(
            lambda _, args, __, name=name: shapes.setdefault(name, []).append(tuple(args[0].shape[:-1]))
        )
        for name, part in watched.items()
    ]
    n_columns = max(map(len, TEXTS[:4]))
    for unit, n_rows in (("last_token", (4, 1)), ("token", (4, n_columns)), ("mean", (4, n_columns))):
        shapes.clear()
        sites = find_sites(module, ["mlp_post"])
        Capture(model, sites, unit=unit, histograms=False, raw={}).add_and_predict(pad(TEXTS[:4], pad_id=0), key)
        want = {"block": [(4, n_columns)], "last up_proj": [n_rows], "last down_proj": [(4, 1)], "head": [(4,)]}
        assert shapes == want, unit
    for handle in handles:
        handle.remove()


def test_predict__cuts_the_head_into_slices(monkeypatch):
    monkeypatch.setattr("neuronlens.predictions.LOGITS_AT_ONCE", 2 * len(tiny_tokenizer()))
    model, logits_XV = loaded("gpt2"), logits_by_hand("gpt2")
    rows = []
    handle = model.module.lm_head.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    assert_answered(predict(model, pad(TEXTS, pad_id=0), key_for(logits_XV)), logits_XV, key_for(logits_XV))
    handle.remove()
    assert rows == [2, 2, 2]


def test_predict__names_the_texts_own_concept_where_two_share_a_class():
    model, logits_XL = loaded("bert", "classifier"), logits_by_hand("bert", "classifier")
    best = int(logits_XL[0].argmax())
    answers = {"a": best, "b": best, "c": (best + 1) % 3}
    for concept in ("a", "b"):
        got = predict(model, pad(TEXTS[:1], pad_id=0), AnswerKey.of(answers, concept))
        assert got.correct_B.tolist() == [True]
        assert AnswerKey.of(answers, concept).concepts[got.predicted_B[0]] == concept


def test_predict__gives_no_answer_where_the_logits_are_not_finite():
    model = LoadedModel.of(tiny_model("gpt2", seed=3), tiny_tokenizer())
    with torch.no_grad():
        model.module.transformer.wte.weight[50] = torch.nan  # the token of the second text alone, and a logit of all
    got = predict(model, pad(TEXTS[:2], pad_id=0), AnswerKey.of({"joy": 3, "zero": 0}, "zero"))
    assert got.predicted_B.tolist() == [-1, -1]
    assert got.correct_B.tolist() == [False, False]
    assert got.confidence_B.isnan().all()


def test_predict__refuses_a_model_that_answers_nothing():
    model = LoadedModel.of(tiny_model("bert", head="none"), tiny_tokenizer())
    with pytest.raises(UsageError, match="neither next-token nor class logits"):
        predict(model, pad(TEXTS, pad_id=0), AnswerKey.of({"joy": 3}, "joy"))


def test_only_correct__counts_nothing_where_all_is_wrong():
    model, logits_XV = loaded("gpt2"), logits_by_hand("gpt2")
    key = AnswerKey.of({"never": int(logits_XV.sum(axis=0).argmin())}, "never")
    capture, got = captured(model, key, unit="last_token", hook_points=("mlp_post",), side="right", only_correct=True)
    assert not got.correct_B.any()
    empty = make_accumulator(40, histogram=True, device=torch.device("cpu")).moments()
    np.testing.assert_array_equal(capture.accumulators[0].moments().n_N, empty.n_N)
    assert [len(samples) for samples in capture.raw_samples] == [0, 0]
    assert all(not values for values in capture.raw_values.values())


def test_capture__in_a_pass_to_the_end_leaves_no_hook_behind():
    model = loaded("gpt2")
    captured(model, AnswerKey.of({"joy": 3}, "joy"), unit="last_token", hook_points=("mlp_post",), side="right")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())


def test_architectures__are_all_asked():
    assert set(DECODERS) | set(ENCODERS) == set(CONFIGS)
