"""Passes that resume behind a shared prefix, against whole passes under the same program, in every architecture."""

from typing import Any

import numpy as np
import pytest
import torch

from neuronlens.evaluation import TestText, measure_texts
from neuronlens.hookpoints import HOOK_POINTS, find_sites
from neuronlens.interventions import apply
from neuronlens.measure import Counted, Intervention, Positions
from neuronlens.models import LoadedModel
from neuronlens.prefix import WHOLE, SharedPrefix, Start
from neuronlens.programs import Program, Rule
from neuronlens.ranges import RangeTable
from tests.range_tables import row, table_of
from tests.tiny_models import CONFIGS, D_MLP, D_MODEL, ENCODERS, LABELS, N_LAYERS, tiny_model, tiny_tokenizer

ANSWERS = {"joy": 3, "anger": 4, "fear": 5}
WIDTHS = {hook_point: D_MLP if hook_point == "mlp_post" else D_MODEL for hook_point in HOOK_POINTS}


def made_texts() -> list[TestText]:
    rng = np.random.default_rng(5)
    return [
        TestText(token_ids=tuple(rng.integers(6, 300, size=int(n)).tolist()), concept=("joy", "anger", "fear")[i % 3])
        for i, n in enumerate((1, 23, 9, 17, 4, 12))
    ]


TEXTS = made_texts()


def made_table(rng: np.random.Generator) -> RangeTable:
    """Ranges of half of the neurons everywhere, about as wide as the tiny models' values are spread."""
    return table_of(
        [
            row("joy", int(n), rng.normal(0, 0.3), rng.uniform(0.02, 0.4), hook_point=h, layer=layer, rank=rank)
            for h, width in WIDTHS.items()
            for layer in range(N_LAYERS)
            for rank, n in enumerate(rng.permutation(width)[: width // 2], start=1)
        ],
        widths=WIDTHS,
    )


def programs_of(rng: np.random.Generator) -> list[Program]:
    """At every site alone, and at several, also of several layers; some actions."""
    table = made_table(rng)
    places = [((hook_point,), (layer,)) for hook_point in HOOK_POINTS for layer in range(N_LAYERS)]
    places += [(("attn_out", "mlp_out"), (1,)), (("mlp_post", "resid_post"), (0, 1)), (("resid_post",), (0, 1))]
    actions: list[dict[str, Any]] = [{}, {"action": "dampen", "factor": 0.5}, {"action": "set", "value": 0.5}]
    return [
        Program.compile(table, [Rule(concept="joy", hook_points=h, layers=n, **actions[i % 3])])
        for i, (h, n) in enumerate(places)
    ]


def whole_passes(
    loaded: LoadedModel, program: Program, answer_X: list[int], *, positions: Positions, counted: Counted
) -> tuple[list[float], int, int]:
    """Each text alone, the whole model under the program: confidences, and what was tested and changed."""
    confidence, tested, changed = [], 0, 0
    for text, answer in zip(TEXTS, answer_X, strict=True):
        ids_1T = torch.tensor([text.token_ids])
        read = 0 if loaded.head_reads_first else -1
        at_answer = torch.zeros_like(ids_1T, dtype=torch.bool)
        at_answer[:, read] = True
        with torch.no_grad(), apply(loaded.module, program) as applied:
            applied.set_mask(at_answer if counted == "answer" else None)
            applied.set_where(at_answer if positions == "last" else None)
            logits = loaded.module(input_ids=ids_1T).logits[0]
        p = (logits if loaded.kind == "classifier" else logits[-1]).double().softmax(dim=0)
        confidence.append(float(p[answer]))
        tested, changed = tested + applied.tested, changed + applied.changed
    return confidence, tested, changed


def loaded_model(architecture: str, *, head: Any = None) -> LoadedModel:
    head = head or ("classifier" if architecture in ENCODERS else "lm")
    return LoadedModel.of(tiny_model(architecture, head=head), tiny_tokenizer())


KINDS: list[tuple[Positions, Counted, bool]] = [
    ("all", "all", True),
    ("all", "answer", False),
    ("last", "answer", False),
]


@pytest.mark.parametrize("architecture", [*CONFIGS, "llama classifier", "gpt2 classifier"])
def test_resumed_passes__equal_whole_ones_in_every_architecture(architecture: str) -> None:
    name, _, head = architecture.partition(" ")
    loaded = loaded_model(name, head=head or None)
    answers = {label: i for i, label in enumerate(LABELS)} if loaded.kind == "classifier" else ANSWERS
    programs = programs_of(np.random.default_rng(7))
    answer_X = [answers[text.concept] for text in TEXTS]
    for positions, counted, perplexity in KINDS:
        got = measure_texts(
            loaded,
            [Intervention(program=program, positions=positions) for program in programs],
            TEXTS,
            answers,
            tokens_per_batch=50,
            perplexity=perplexity,
            counted=counted,
        )
        assert got.confidence_RX is not None
        for r, program in enumerate(programs, start=1):
            confidence_X, tested, changed = whole_passes(
                loaded, program, answer_X, positions=positions, counted=counted
            )
            np.testing.assert_allclose(got.confidence_RX[r], confidence_X, rtol=1e-5, atol=1e-6)
            assert (got.tested_R[r], got.changed_R[r]) == (tested, changed)
            assert 0 < changed < tested
            assert np.abs(got.confidence_RX[r] - got.confidence_RX[0]).max() > 1e-5


@pytest.mark.parametrize("architecture", [*CONFIGS])
def test_resumed_passes__are_bit_for_bit_those_of_the_same_batch(architecture: str) -> None:
    loaded = loaded_model(architecture)
    programs = programs_of(np.random.default_rng(8))
    interventions = [Intervention(program=program) for program in programs]
    answers = {label: i for i, label in enumerate(LABELS)} if loaded.kind == "classifier" else ANSWERS

    def ran(counted: Counted) -> np.ndarray:
        got = measure_texts(
            loaded, interventions, TEXTS, answers, tokens_per_batch=50, perplexity=False, counted=counted
        )
        assert got.confidence_RX is not None
        return got.confidence_RX

    shared = ran("all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedPrefix, "start_of", lambda self, sites: WHOLE)
        np.testing.assert_array_equal(ran("all"), shared)
    np.testing.assert_allclose(ran("answer"), shared, rtol=1e-5, atol=1e-6)


def test_start_of__is_the_latest_before_anything_is_changed() -> None:
    prefix, module = SharedPrefix(tiny_model("llama")), tiny_model("llama")

    def start(*names: tuple[str, int]) -> Start:
        return prefix.start_of([site for h, n in names for site in find_sites(module, [h], [n])])

    assert start(("resid_post", 1)) == Start(n_blocks=2, with_attention=False)
    assert start(("mlp_out", 1), ("resid_post", 1)) == Start(n_blocks=1, with_attention=True)
    assert start(("resid_post", 1), ("attn_out", 0)) == Start(n_blocks=0, with_attention=True)
    assert start(("resid_post", 0)) == Start(n_blocks=1, with_attention=False)
    alone = [prefix.maps_tokens_alone(start((h, n))) for h in ("mlp_post", "resid_post") for n in range(N_LAYERS)]
    assert alone == [False, True, False, True]


def test_start_of__is_the_beginning_where_the_site_is_somebody_elses() -> None:
    module = tiny_model("gpt2")
    own = find_sites(module, ["mlp_post"], [1], {"mlp_post": "h.{layer}.mlp.c_fc:output"})
    assert SharedPrefix(module).start_of(own) == WHOLE
    unknown = tiny_model("stablelm")
    site = find_sites(unknown, ["mlp_post"], [1], {"mlp_post": "layers.{layer}.mlp.down_proj"})
    assert SharedPrefix(unknown).start_of(site) == WHOLE


def test_measure_texts__runs_a_model_of_unknown_architecture_whole() -> None:
    loaded = LoadedModel.of(tiny_model("stablelm"), tiny_tokenizer())
    overrides = {"mlp_post": "layers.{layer}.mlp.down_proj"}
    program = Program.compile(
        made_table(np.random.default_rng(1)), [Rule(concept="joy", hook_points=("mlp_post",), layers=(1,))]
    )
    interventions = [Intervention(program=program)]
    for counted in ("all", "answer"):
        got = measure_texts(
            loaded, interventions, TEXTS, ANSWERS, tokens_per_batch=50, counted=counted, overrides=overrides
        )
        assert got.confidence_RX is not None
        for x, text in enumerate(TEXTS):
            with torch.no_grad(), apply(loaded.module, program, overrides=overrides):
                p = loaded.module(input_ids=torch.tensor([text.token_ids])).logits[0, -1].double().softmax(dim=0)
            assert got.confidence_RX[1, x] == pytest.approx(float(p[ANSWERS[text.concept]]), rel=2e-4)


def test_resumed__leaves_the_model_as_it_was() -> None:
    module = tiny_model("gpt2")
    block: Any = module.get_submodule("transformer.h.1")
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    wrapped = block.__dict__["forward"]
    prefix, ids_BT = SharedPrefix(module), torch.arange(6, 12)[None]
    start = Start(n_blocks=2, with_attention=False)
    with torch.no_grad():
        before = module(input_ids=ids_BT).logits
        with prefix.recording([start]) as recorded:
            module(input_ids=ids_BT)
        with prefix.resumed(recorded, start):
            # Whatever is asked, what was recorded is the answer.
            assert torch.equal(module(input_ids=ids_BT.flip(1)).logits, before)
        assert block.__dict__["forward"] is wrapped
        assert "forward" not in module.get_submodule("transformer.h.0").__dict__
        assert not torch.equal(module(input_ids=ids_BT.flip(1)).logits, before)
        assert torch.equal(module(input_ids=ids_BT).logits, before)
