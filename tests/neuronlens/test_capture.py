"""Units and streaming statistics of a forward pass, against values computed by hand, one text at a time."""

import numpy as np
import pytest
import torch

from neuronlens.batches import pad
from neuronlens.capture import Capture
from neuronlens.errors import UsageError
from neuronlens.hookpoints import find_sites
from neuronlens.models import LoadedModel
from tests.by_hand import HIDDEN
from tests.tiny_models import tiny_model, tiny_tokenizer

EOS, SEP = 1, 2
TEXTS = [[EOS, 40, 41, 42, SEP], [50, 51, SEP], [60, EOS, 61, 62, 63, 64, 65, SEP], [70, SEP], [EOS, SEP]]
HOOK_POINTS = ("mlp_post", "resid_post")


def values_by_hand(architecture: str, model: torch.nn.Module, ids: list[int]) -> dict[tuple[str, int], np.ndarray]:
    """(hook point, layer) -> [T, N], from the model's own submodules."""
    seen = {}

    def note(hook_point, layer, x_1TN):
        seen[hook_point, layer] = x_1TN[0].numpy()
        return x_1TN

    HIDDEN[architecture](model, ids, note)
    return seen


def rows_by_hand(unit: str, ids: list[int], x_TN: np.ndarray) -> np.ndarray:
    """[K, N]: what a unit counts of one text, written out."""
    if unit == "last_token":
        return x_TN[-1:]
    content = [t for t, token in enumerate(ids) if token > 5]
    if unit == "token":
        return x_TN[content]
    return x_TN[content].mean(axis=0, keepdims=True) if content else x_TN[:0]


def captured(
    loaded: LoadedModel,
    unit: str,
    *,
    side: str = "right",
    batch_size: int = 3,
    raw: bool = False,
    hook_points: tuple[str, ...] = HOOK_POINTS,
) -> Capture:
    sites = find_sites(loaded.module, hook_points, "all")
    kept = dict.fromkeys(range(len(sites))) if raw else {}
    capture = Capture(loaded, sites, unit=unit, histograms=True, raw=kept)
    for first in range(0, len(TEXTS), batch_size):
        capture.add(pad(TEXTS[first : first + batch_size], pad_id=0, side=side))
    return capture


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("unit", ["last_token", "token", "mean"])
@pytest.mark.parametrize("hook_points", [("mlp_post",), HOOK_POINTS])
def test_capture__counts_the_rows_of_its_unit_whatever_the_padding(architecture, side, unit, hook_points):
    model = tiny_model(architecture)
    capture = captured(LoadedModel.of(model, tiny_tokenizer()), unit, side=side, hook_points=hook_points)
    by_hand = [values_by_hand(architecture, model, ids) for ids in TEXTS]
    for site, accumulator in zip(capture.sites, capture.accumulators, strict=True):
        key = site.hook_point, site.layer
        want_KN = np.concatenate([rows_by_hand(unit, ids, x[key]) for ids, x in zip(TEXTS, by_hand, strict=True)])
        got = accumulator.moments()
        np.testing.assert_array_equal(got.n_N, len(want_KN))
        np.testing.assert_allclose(got.mean_N, want_KN.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.std_N, want_KN.std(axis=0), rtol=1e-3, atol=1e-5)
        assert (accumulator.counts().sum(axis=1) == len(want_KN)).all()


@pytest.mark.parametrize("unit", ["last_token", "token"])
def test_capture__keeps_raw_rows_with_their_text_and_position(unit):
    model = tiny_model("gpt2")
    loaded = LoadedModel.of(model, tiny_tokenizer())
    capture = captured(loaded, unit, side="left", batch_size=5, raw=True, hook_points=("mlp_post",))
    sample_K, position_K = capture.raw_samples[0].tolist(), capture.raw_positions[0].tolist()
    want = [
        (sample, position)
        for sample, ids in enumerate(TEXTS)
        for position, token in enumerate(ids)
        if (position == len(ids) - 1 if unit == "last_token" else token > 5)
    ]
    assert list(zip(sample_K, position_K, strict=True)) == want
    values_KN = torch.cat(capture.raw_values[1]).numpy()
    site = capture.sites[1]
    by_hand = [values_by_hand("gpt2", model, ids)[site.hook_point, site.layer] for ids in TEXTS]
    for row, (sample, position) in zip(values_KN, want, strict=True):
        np.testing.assert_allclose(row, by_hand[sample][position], rtol=1e-4, atol=1e-5)


def test_capture__stops_the_forward_pass_after_the_last_site():
    model = tiny_model("gpt2")
    seen = []
    model.transformer.ln_f.register_forward_hook(lambda *_: seen.append("ln_f"))
    captured(LoadedModel.of(model, tiny_tokenizer()), "last_token")
    assert seen == []


def test_capture__leaves_no_hook_behind():
    model = tiny_model("gpt2")
    captured(LoadedModel.of(model, tiny_tokenizer()), "token")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_capture__reads_the_classifier_token_by_its_id():
    model, tokenizer = tiny_model("bert", head="classifier"), tiny_tokenizer()
    tokenizer.cls_token = "<sep>"
    loaded = LoadedModel.of(model, tokenizer)
    capture = Capture(loaded, find_sites(model, ["mlp_post"], [0]), unit="cls", histograms=False, raw={})
    rows = capture.rows_of(pad([[40, SEP, 41], [SEP, 50], [60, 61]], pad_id=0, side="left"))
    assert rows.index_K.tolist() == [1, 4]
    assert rows.position_K.tolist() == [1, 0]


def test_capture__refuses_cls_without_a_classifier_token():
    loaded = LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer())
    with pytest.raises(UsageError, match="no classifier token"):
        Capture(loaded, find_sites(loaded.module, ["mlp_post"], [0]), unit="cls", histograms=False, raw={})


def test_capture__counts_a_text_only_where_it_is_kept():
    loaded = LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer())
    capture = Capture(loaded, find_sites(loaded.module, ["mlp_post"], "all"), unit="token", histograms=False, raw={})
    capture.add(pad(TEXTS[:3], pad_id=0), torch.tensor([True, False, True]))
    capture.add(pad(TEXTS[:3], pad_id=0), torch.tensor([False, False, False]))
    assert capture.accumulators[0].moments().n_N[0] == 3 + 6
