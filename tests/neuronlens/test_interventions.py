"""Interventions on toy modules, value by value, and on tiny transformers, token by token."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuronlens import intervene
from neuronlens.errors import UsageError
from neuronlens.identity import model_identity
from neuronlens.models import LoadedModel, load_model
from neuronlens.programs import Rule
from neuronlens.ranges import RangeTable, TableModel
from tests.by_hand import HIDDEN, ZeroInside
from tests.range_tables import RULES_ON_PIECES, apply_by_hand, pieces, random_pieces, row, table_of
from tests.tiny_models import D_MLP, D_MODEL, save_tiny, tiny_model, tiny_tokenizer

INF, NAN = math.inf, math.nan
WIDTH = 4


class Toy(nn.Module):
    """A model of one block that changes nothing, so that what comes out is what the intervention made of x."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, model_type="toy")
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, x_BTN: Tensor) -> Tensor:
        return self.layers[0](x_BTN)


TOY = {"resid_post": "layers.{layer}:output"}


def toy_table(*rows: dict[str, Any]) -> RangeTable:
    return table_of([{**r, "hook_point": "resid_post"} for r in rows], widths={"resid_post": WIDTH})


def run(table: RangeTable, rules: Sequence[Any], x_BTN: Any, mask: Any = None) -> tuple[Tensor, int, int]:
    """What becomes of x, and the counts (tested, changed)."""
    model = Toy()
    with intervene(model, table, rules, overrides=TOY) as applied:
        applied.set_mask(None if mask is None else torch.tensor(mask))
        out = model(torch.as_tensor(x_BTN))
    return out, applied.tested, applied.changed


def of_neuron_0(
    table: RangeTable, rules: Sequence[Any], values: Sequence[float], dtype: torch.dtype = torch.float32
) -> list:
    """What becomes of these values of neuron 0."""
    x_BTN = torch.zeros(1, len(values), WIDTH, dtype=dtype)
    x_BTN[0, :, 0] = torch.tensor(values, dtype=dtype)
    return run(table, rules, x_BTN)[0][0, :, 0].tolist()


JOY = row("joy", 0, 1.0, 0.4)  # the range is [0, 2]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [-0.5, 0.0, 0.0, 0.0, 2.25]),
        ({"action": "mean"}, [-0.5, 1.0, 1.0, 1.0, 2.25]),
        ({"action": "set", "value": -7}, [-0.5, -7.0, -7.0, -7.0, 2.25]),
        ({"action": "dampen", "factor": 0.5}, [-0.5, 0.0, 0.75, 1.0, 2.25]),
        ({"action": "adaptive"}, [-0.5, 0.0, 1.5 * 0.125 * 0.5, 2 * 0.125, 2.25]),
        ({"action": "adaptive", "factor": 1}, [-0.5, 0.0, 1.5 * 0.5, 2.0, 2.25]),
    ],
    ids=["zero", "mean", "set", "dampen", "adaptive", "adaptive 1"],
)
def test_intervene__replaces_inside_the_range_bounds_included(rule: dict, expected: list[float]) -> None:
    assert of_neuron_0(toy_table(JOY), [{"concept": "joy", **rule}], [-0.5, 0.0, 1.5, 2.0, 2.25]) == expected


def test_intervene__leaves_other_neurons_alone() -> None:
    x_BTN = torch.full((1, 2, WIDTH), 1.5)
    out_BTN, tested, changed = run(toy_table(JOY), [Rule(concept="joy")], x_BTN)
    assert out_BTN.tolist() == [[[0.0, 1.5, 1.5, 1.5]] * 2]
    assert x_BTN.tolist() == [[[1.5] * WIDTH] * 2]
    assert (tested, changed) == (2, 2)


def test_intervene__never_touches_nan_and_takes_infinities_with_the_whole_neuron_only() -> None:
    values = [NAN, INF, -INF, 9.0]
    np.testing.assert_equal(of_neuron_0(toy_table(JOY), [Rule(concept="joy")], values), values)
    for rule, expected in [
        ({"action": "zero"}, [NAN, 0.0, 0.0, 0.0]),
        ({"action": "mean"}, [NAN, 1.0, 1.0, 1.0]),
        ({"action": "dampen", "factor": 0}, [NAN, 0.0, 0.0, 0.0]),
        ({"action": "dampen", "factor": 0.5}, [NAN, INF, -INF, 4.5]),
    ]:
        got = of_neuron_0(toy_table(JOY), [{"concept": "joy", "tau": "inf", **rule}], values)
        np.testing.assert_equal(got, expected)


def test_intervene__adaptive_is_zero_at_a_range_of_one_point() -> None:
    table = toy_table(row("joy", 0, 1.5, 0.0))
    assert of_neuron_0(table, [Rule(concept="joy", action="adaptive")], [1.5, 1.6]) == [0.0, pytest.approx(1.6)]


def test_intervene__lets_the_first_rule_that_contains_the_original_value_decide() -> None:
    table = toy_table(JOY, row("fear", 0, 3.0, 0.8))  # fear's range is [1, 5]
    to_four, to_seven = Rule(concept="joy", action="set", value=4), Rule(concept="fear", action="set", value=7)
    assert of_neuron_0(table, [to_four, to_seven], [0.5, 1.5, 3.0]) == [4.0, 4.0, 7.0]
    assert of_neuron_0(table, [to_seven, to_four], [0.5, 1.5, 3.0]) == [4.0, 7.0, 7.0]


def test_intervene__counts_a_value_once_when_several_rules_hold_it() -> None:
    table = toy_table(JOY, row("fear", 0, 3.0, 0.8), row("fear", 1, 3.0, 0.8, rank=2))
    rules = [Rule(concept="joy"), Rule(concept="fear")]
    assert run(table, rules, torch.full((1, 3, WIDTH), 1.5))[1:] == (6, 6)


def test_intervene__compares_in_the_dtype_of_the_activations() -> None:
    table = toy_table(row("joy", 0, 0.0, 1.0, lower=-1.0, upper=1.001))  # 1.001 is 1.0 in bfloat16
    assert of_neuron_0(table, [Rule(concept="joy")], [1.0009765625], torch.float32) == [0.0]
    assert of_neuron_0(table, [Rule(concept="joy")], [1.0, 1.0078125], torch.bfloat16) == [0.0, 1.0078125]
    above = toy_table(row("joy", 0, 0.0, 1.0, lower=-1.0, upper=1.999))  # 2.0 in bfloat16: rounded outwards
    assert of_neuron_0(above, [Rule(concept="joy")], [2.0], torch.bfloat16) == [0.0]


def test_intervene__bounds_beyond_float16_bound_nothing() -> None:
    table = toy_table(row("joy", 0, 0.0, 1.0, lower=-1.0, upper=1e5))
    assert of_neuron_0(table, [Rule(concept="joy")], [-2.0, 65504.0, INF], torch.float16) == [-2.0, 0.0, 0.0]


def scalar(x: np.floating, rules: list[tuple], dtype: Any) -> Any:
    """One value under rules (action, lower, upper, mean, factor, value), in float64 but for the bounds: the oracle."""
    for action, lower, upper, mean, factor, value in rules:
        if dtype(lower) <= x <= dtype(upper):
            x64 = float(x)
            half_width, centre = (upper - lower) / 2, (upper + lower) / 2
            return {
                "zero": 0.0,
                "mean": mean,
                "set": value,
                "dampen": (factor or 0) * x64,
                "adaptive": x64 * (factor or 0.125) * abs(x64 - centre) / half_width,
            }[action]
    return float(x)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=["float64", "float32", "float16"])
def test_intervene__equals_a_loop_over_single_values_for_random_rules(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        concepts = [f"c{i}" for i in range(4)]
        rows = [
            row(c, n, rng.normal(), rng.gamma(1, 0.5)) for c in concepts for n in range(WIDTH) if rng.random() < 0.7
        ]
        rows = rows or [JOY]
        rules = []
        for concept in rng.permutation([c for c in concepts if any(r["concept"] == c for r in rows)]):
            action = str(rng.choice(["zero", "mean", "set", "dampen", "adaptive"]))
            factor = float(rng.random()) if action in ("dampen", "adaptive") else None
            rules.append(
                Rule(concept=str(concept), action=action, factor=factor, value=2.5 if action == "set" else None)
            )
        x_BTN = rng.normal(scale=1.5, size=(3, 5, WIDTH)).astype(dtype)
        x_BTN[0, 0, :2], x_BTN[1, 2, 1], x_BTN[2, 4, 3] = NAN, INF, -INF
        mask = rng.random((3, 5)) < 0.7

        expected, n_tested, n_changed = np.empty(x_BTN.shape), 0, 0
        for b, t, n in np.ndindex(*x_BTN.shape):
            mine = [(u, r) for u in rules for r in rows if r["concept"] == u.concept and r["neuron"] == n]
            args = [(u.action, r["lower"], r["upper"], r["mean"], u.factor, u.value) for u, r in mine]
            expected[b, t, n] = scalar(x_BTN[b, t, n], args, dtype)
            counts = mask[b, t] and np.isfinite(x_BTN[b, t, n])
            n_tested += bool(mine) and counts
            n_changed += counts and any(dtype(a[1]) <= x_BTN[b, t, n] <= dtype(a[2]) for a in args)

        got_BTN, tested, changed = run(toy_table(*rows), rules, x_BTN, mask)
        assert got_BTN.numpy().dtype == dtype
        np.testing.assert_allclose(
            got_BTN.numpy(), expected, rtol=8 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps
        )
        assert (tested, changed) == (n_tested, n_changed)


def test_applied__counts_real_finite_values_of_named_neurons_over_all_passes() -> None:
    model, table = Toy(), toy_table(JOY, row("joy", 2, 5.0, 0.4, rank=2))
    x_BTN = torch.ones(2, 3, WIDTH)
    with intervene(model, table, [Rule(concept="joy")], overrides=TOY) as applied:
        assert (applied.tested, applied.changed) == (0, 0)
        model(x_BTN)
        assert (applied.tested, applied.changed) == (12, 6)
        applied.set_mask(torch.tensor([[True, True, False], [True, False, False]]))
        model(x_BTN)
        assert (applied.tested, applied.changed) == (12 + 6, 6 + 3)
        x_BTN[0, 0, 2], x_BTN[1, 0, 0], x_BTN[1, 2, 0], x_BTN[0, 1, 1] = NAN, INF, NAN, NAN
        model(x_BTN)
        assert (applied.tested, applied.changed) == (18 + 4, 9 + 2)
        applied.set_mask(None)
        model(x_BTN)
    assert (applied.tested, applied.changed) == (22 + 9, 11 + 4)
    assert applied.counts() == {("resid_post", 0): (31, 15)}


def test_applied__does_not_count_an_infinite_value_that_a_whole_neuron_rule_replaced() -> None:
    x_BTN = torch.tensor([[[INF, 0, 0, 0], [3.0, 0, 0, 0]]])
    out_BTN, tested, changed = run(toy_table(JOY), [Rule(concept="joy", tau=INF)], x_BTN)
    assert (out_BTN[0, :, 0].tolist(), tested, changed) == ([0.0, 0.0], 1, 1)


def test_applied__refuses_the_mask_of_another_batch() -> None:
    with pytest.raises(UsageError, match=r"mask has shape \(1, 2\), the batch \(1, 3\)"):
        run(toy_table(JOY), [Rule(concept="joy")], torch.ones(1, 3, WIDTH), [[True, True]])


def test_applied__replaces_and_counts_only_where_it_is_told_to() -> None:
    model, table = Toy(), toy_table(JOY, {**JOY, "concept": "anger", "lower": 0.5}, row("joy", 2, 5.0, 0.4, rank=2))
    rules = [Rule(concept="joy", action="dampen", factor=0.5, top_fraction=0.25), Rule(concept="anger")]
    with intervene(model, table, rules, overrides=TOY) as applied:
        applied.set_where(torch.tensor([[True, False, True], [False, False, True]]))
        x_BTN = torch.ones(2, 3, WIDTH)
        out_BTN = model(x_BTN)
        assert out_BTN[..., 0].tolist() == [[0.5, 1.0, 0.5], [1.0, 1.0, 0.5]]
        assert torch.equal(out_BTN[..., 1:], x_BTN[..., 1:])
        assert (applied.tested, applied.changed) == (3, 3)
        applied.set_mask(torch.tensor([[True, True, False], [True, True, True]]))
        assert model(x_BTN)[..., 0].tolist() == [[0.5, 1.0, 0.5], [1.0, 1.0, 0.5]]
        assert (applied.tested, applied.changed) == (3 + 2, 3 + 2)
        applied.set_where(None)
        assert model(x_BTN)[..., 0].tolist() == [[0.5] * 3] * 2
        assert (applied.tested, applied.changed) == (5 + 5, 5 + 5)
        applied.set_where(torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(UsageError, match="Call set_where"):
            model(x_BTN)


def test_applied__counts_across_inference_mode_and_dtypes() -> None:
    model = Toy()
    with intervene(model, toy_table(JOY), [Rule(concept="joy")], overrides=TOY) as applied:
        with torch.inference_mode():
            model(torch.ones(1, 1, WIDTH))
        model(torch.ones(1, 1, WIDTH))
        model(torch.ones(1, 1, WIDTH, dtype=torch.bfloat16))
    assert applied.changed == 3


def test_intervene__takes_its_hooks_away_whatever_happens() -> None:
    model, x_BTN = Toy(), torch.ones(1, 1, WIDTH)

    def interrupted() -> None:
        with intervene(model, toy_table(JOY), [Rule(concept="joy")], overrides=TOY):
            assert not torch.equal(model(x_BTN), x_BTN)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert torch.equal(model(x_BTN), x_BTN)
    assert not model.layers[0]._forward_hooks


# Tiny transformers


def wide_rows() -> list[dict[str, Any]]:
    """Every second neuron of three sites, with ranges that hold some of the values and not all."""
    rows = [row("joy", n, 0.1, 0.1, layer=layer, rank=n + 1) for layer in (0, 1) for n in range(0, D_MLP, 2)]
    return rows + [row("joy", n, 0.5, 0.3, layer=1, hook_point="resid_post", rank=n + 1) for n in range(0, D_MODEL, 2)]


def tiny_table(**header: Any) -> RangeTable:
    return table_of(wide_rows(), widths={"mlp_post": D_MLP, "resid_post": D_MODEL}, **header)


PROMPT = [7, 41, 30, 12, 99]
N_NEW = 12


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("whole", [False, True], ids=["range", "whole"])
def test_intervene__inside_generate_equals_masking_by_hand_without_a_cache(architecture: str, whole: bool) -> None:
    model, hidden = tiny_model(architecture), HIDDEN[architecture]
    rule = Rule(concept="joy", tau=INF if whole else None)

    def generated() -> list[int]:
        ids = torch.tensor([PROMPT])
        kept = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "use_cache": True}
        return model.generate(ids, max_new_tokens=N_NEW, **kept)[0].tolist()

    expected = list(PROMPT)
    for _ in range(N_NEW):
        edit = ZeroInside(wide_rows(), whole=whole)
        expected.append(int(model.lm_head(hidden(model, expected, edit)[-1]).argmax()))

    plain = generated()
    with intervene(model, tiny_table(), [rule]) as applied:
        steered = generated()
    assert steered == expected
    assert steered != plain
    # The last pass by hand saw every position that the cached passes saw together.
    assert (applied.tested, applied.changed) == (edit.tested, edit.changed)
    assert 0 < applied.changed < applied.tested or whole
    assert generated() == plain


def test_intervene__works_on_a_loaded_model_and_from_plain_dicts() -> None:
    model = tiny_model("gpt2")
    loaded = LoadedModel.of(model, tiny_tokenizer())
    with intervene(loaded, tiny_table(), [{"concept": "joy"}]):
        got = model(torch.tensor([PROMPT])).logits[0]
    by_hand = model.lm_head(HIDDEN["gpt2"](model, PROMPT, ZeroInside(wide_rows())))
    torch.testing.assert_close(got, by_hand)


def test_intervene__refuses_a_model_of_another_width_or_depth() -> None:
    rows = [row("joy", 0, 0.0, 1.0, layer=0)]
    narrow, deep = (
        table_of(rows, widths={"mlp_post": 39}),
        table_of([{**rows[0], "layer": 2}], widths={"mlp_post": D_MLP}),
    )
    model = tiny_model("gpt2")
    with pytest.raises(UsageError, match="has 39 neurons at mlp_post of layer 0, this GPT2LMHeadModel has 40"):
        intervene(model, narrow, [Rule(concept="joy")]).__enter__()
    with pytest.raises(UsageError, match="Layer 2 is out of range"):
        intervene(model, deep, [Rule(concept="joy")]).__enter__()


def test_intervene__refuses_a_checkpoint_of_another_config(tmp_path: Path) -> None:
    theirs, other = save_tiny(tmp_path / "a", "gpt2"), save_tiny(tmp_path / "b", "gpt2", layer_norm_epsilon=1e-3)
    config_hash = model_identity(str(theirs)).config_hash
    table = tiny_table(model=TableModel(id="org/theirs", config_hash=config_hash))
    rules = [Rule(concept="joy")]
    with intervene(load_model(str(theirs)), table, rules):
        pass
    with pytest.raises(UsageError, match=r"was made with model org/theirs \(config hash"):
        intervene(load_model(str(other)), table, rules).__enter__()
    with intervene(load_model(str(other)).module, table, rules, check_model=False):
        pass


@pytest.mark.parametrize(
    "statement",
    [
        "from neuronlens import *; import neuronlens.interventions; from neuronlens import intervene",
        "import neuronlens.interventions; from neuronlens import intervene",
    ],
)
def test_package__gives_the_function_whatever_was_imported_before(statement: str) -> None:
    code = f"{statement}; assert intervene.__name__ == 'intervene' and not hasattr(intervene, '__path__'); print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_intervene__softens_each_piece_by_its_own_posterior() -> None:
    rows = pieces("joy", 0, [(-1.0, -0.5, 0.75), (0.5, 1.0, 0.5)], hook_point="resid_post")
    table = table_of(rows, widths={"resid_post": WIDTH}, method="likelihood_ratio")
    values = [-1.5, -1.0, -0.75, -0.25, 0.5, 0.75, 1.5]
    softened = of_neuron_0(table, [{"concept": "joy", "action": "soften"}], values)
    assert softened == [-1.5, -0.25, -0.1875, -0.25, 0.25, 0.375, 1.5]
    assert of_neuron_0(table, [{"concept": "joy"}], values) == [-1.5, 0, 0, -0.25, 0, 0, 1.5]
    x_BTN = torch.tensor([[[0.75, 0.75, 0, 0], [-0.75, 0, 0, 0], [0, 0, 0, 0]]])
    assert run(table, [{"concept": "joy", "action": "soften"}], x_BTN)[1:] == (3, 2)


@pytest.mark.parametrize("seed", range(8))
def test_intervene__replaces_inside_any_piece_what_the_rules_say(seed: int) -> None:
    width = 23
    rows = random_pieces(seed, width=width, concepts=("joy", "fear"), hook_point="resid_post")
    table = table_of(rows, widths={"resid_post": width}, method="hpd", top_fraction=1.0)
    rules = RULES_ON_PIECES[seed % len(RULES_ON_PIECES)]
    x_BTN = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 6, width))).float()
    model = Toy(width)
    with intervene(model, table, rules, overrides=TOY) as applied:
        out_BTN = model(x_BTN)
    expected = [apply_by_hand(rows, rules, x_N) for x_N in x_BTN.reshape(-1, width).numpy()]
    np.testing.assert_allclose(
        out_BTN.reshape(-1, width).numpy(), [x_N for x_N, _, _ in expected], rtol=2e-6, atol=1e-6
    )
    assert applied.tested == sum(tested for _, tested, _ in expected)
    assert applied.changed == sum(sum(changed) for _, _, changed in expected)
