"""Unlabelled text under interventions, against passes by hand in float64."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from neuronlens import measure
from neuronlens.batches import pad
from neuronlens.measure import Intervention, Meter, batches_for
from neuronlens.models import LoadedModel
from neuronlens.programs import Program, Rule
from tests.by_hand import ZeroInside, gpt2_hidden
from tests.range_tables import row, table_of
from tests.tiny_models import D_MLP, tiny_model, tiny_tokenizer

SPECIALS = {0, 1, 2}
TEXTS = [[7, 9, 1, 30, 44, 8], [5, 6], [12], [90, 80, 70, 60, 50, 40, 30, 2, 20]]
ROWS = {layer: [row("joy", n, 0.1, 0.1, layer=layer, rank=n + 1) for n in range(20)] for layer in (0, 1)}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel.of(tiny_model("gpt2"), tiny_tokenizer())


def programs() -> list[Program]:
    table = table_of([*ROWS[0], *ROWS[1]], widths={"mlp_post": D_MLP})
    return [Program.compile(table, [Rule(concept="joy", layers=(layer,))]) for layer in (0, 1)]


def log_p_TV(loaded: LoadedModel, text: list[int], layer: int | None) -> np.ndarray:
    edit = ZeroInside([] if layer is None else ROWS[layer])
    with torch.no_grad():
        return loaded.module.lm_head(gpt2_hidden(loaded.module, text, edit)).double().log_softmax(dim=1).numpy()


@pytest.mark.parametrize("at_once", [1 << 24, 5 * 320])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_off_task__has_the_surprise_and_the_divergence_at_every_predicted_token(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, at_once: int, positions: measure.Positions
) -> None:
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", at_once)
    meter = Meter(loaded, [Intervention(program=p, positions=positions) for p in programs()], counted="answer")
    got = meter.off_task(pad(TEXTS, pad_id=loaded.pad_id))
    for b, text in enumerate(TEXTS):
        places = [t for t in range(1, len(text)) if text[t] not in SPECIALS]
        assert got.n_predicted_B[b] == len(places)
        base = log_p_TV(loaded, text, None)
        for r, layer in enumerate((None, 0, 1)):
            edited = log_p_TV(loaded, text, layer)
            assert got.nll_RB[r, b] == pytest.approx(-sum(edited[t - 1, text[t]] for t in places), rel=1e-5)
            expected = sum(float(entropy(np.exp(base[t - 1]), np.exp(edited[t - 1]))) for t in places)
            assert got.kl_RB[r, b] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert got.kl_RB[1:, 3].min() > 1e-4


def test_off_task__leaves_the_counts_of_labelled_texts_alone(loaded: LoadedModel) -> None:
    meter, batch = Meter(loaded, [Intervention(program=p) for p in programs()]), pad(TEXTS, pad_id=loaded.pad_id)
    before = meter.labelled(batch, None)
    meter.off_task(batch)
    after = meter.labelled(batch, None)
    n_tokens = sum(map(len, TEXTS))
    assert before.tested_R.tolist() == after.tested_R.tolist() == [0, 20 * n_tokens, 20 * n_tokens]
    np.testing.assert_array_equal(before.changed_R, after.changed_R)


def test_batches_for__are_longest_first_and_hold_few_logits(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 9, 1, 9, 2, 5]
    assert batches_for(loaded, lengths, 18) == [[1, 3], [5, 0, 4], [2]]
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 2 * 320)
    assert batches_for(loaded, lengths, 18) == [[1, 3], [5, 0], [4], [2]]
    assert measure.n_logits(loaded) == 320
