"""Many programs in one forward pass, held to one program at a time (`interventions`) and to numbers by hand."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuronlens.interventions import apply
from neuronlens.programs import Program
from neuronlens.slots import ProgramSlots
from tests.range_tables import RULES_ON_PIECES, apply_by_hand, random_pieces, row, table_of

WIDTH = 37
OVERRIDES = {"resid_post": "layers.{layer}:output"}
TABLE = table_of(
    [
        row(concept, neuron, mean, std, hook_point="resid_post", layer=layer)
        for concept, mean, std in (("joy", 0.5, 0.4), ("fear", -0.4, 0.3), ("flat", 0.25, 0.0))
        for neuron in range(0, WIDTH, 2 if concept == "joy" else 3)
        for layer in (0, 1)
    ],
    widths={"resid_post": WIDTH},
)
PROGRAMS = [
    Program.compile(TABLE, rules)
    for rules in (
        [{"concept": "joy"}],
        [{"concept": "joy", "action": "dampen", "factor": 0.3}],
        [{"concept": "fear", "action": "adaptive"}],
        [{"concept": "fear", "action": "mean", "layers": [0]}],
        [{"concept": "joy", "action": "set", "value": 7.5, "tau": math.inf}],
        [{"concept": "joy", "action": "dampen", "factor": 0.5, "tau": 1}, {"concept": "fear"}, {"concept": "flat"}],
        [{"concept": "flat", "action": "set", "value": -1, "layers": [1]}, {"concept": "joy", "action": "adaptive"}],
    )
]


class Toy(nn.Module):
    """Two blocks that change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH, model_type="toy")
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x_BTN: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x_BTN))


def alone(program: Program | None, x_1TN: Tensor, real_1T: Tensor) -> tuple[Tensor, int, int]:
    """One row under one program: the values, tested and changed. Where tokens are not real they stay."""
    if program is None:
        return x_1TN, 0, 0
    model = Toy()
    with apply(model, program, overrides=OVERRIDES) as applied:
        applied.set_mask(real_1T)
        out_1TN = torch.where(real_1T[:, :, None], model(x_1TN), x_1TN)
    return out_1TN, applied.tested, applied.changed


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Around the ranges, with some values on a bound, and some that are no numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(scale=0.7, size=shape)
    odd = rng.random(shape)
    x[odd < 0.03] = 0.25
    x[(odd > 0.03) & (odd < 0.06)] = 0.5 + 2.5 * 0.4
    x[odd > 0.98] = rng.choice([math.inf, -math.inf, math.nan], size=shape)[odd > 0.98]
    return torch.from_numpy(x).to(dtype)


def through(slots: ProgramSlots, slot_B: list[int], x_BTN: Tensor, real_BT: Tensor, **options: Any) -> Any:
    step = slots.step(slot_B, real_BT, **options)
    if step is None:
        return x_BTN, np.zeros((len(slot_B), 1), dtype=np.int64)
    for layer in (0, 1):
        changed = step.run("resid_post", layer, x_BTN)
        x_BTN = x_BTN if changed is None else changed
    return x_BTN, step.counts()


@pytest.mark.parametrize(
    ("dtype", "by_torch"),
    [(torch.float32, False), (torch.float32, True), (torch.float64, True), (torch.bfloat16, True)],
    ids=["compiled", "torch", "float64", "bfloat16"],
)
@pytest.mark.parametrize("seed", range(6))
def test_slots__give_every_row_what_its_program_gives_alone(dtype, by_torch, seed):
    rng = np.random.default_rng(seed)
    slots = ProgramSlots(len(PROGRAMS))
    slot_of = [0] + [slots.load(program) for program in PROGRAMS]
    chosen = rng.integers(0, len(slot_of), size=9).tolist()
    x_BTN = values((9, 5, WIDTH), dtype, seed)
    real_BT = torch.arange(5) < torch.from_numpy(rng.integers(1, 6, size=(9, 1)))
    before_BTN = x_BTN.clone()
    out_BTN, counts_BC = through(slots, [slot_of[i] for i in chosen], x_BTN, real_BT, by_torch=by_torch)
    for b, i in enumerate(chosen):
        expected, tested, changed = alone(PROGRAMS[i - 1] if i else None, x_BTN[b : b + 1], real_BT[b : b + 1])
        assert torch.equal(out_BTN[b].nan_to_num(-99), expected[0].nan_to_num(-99)), f"row {b}, program {i}"
        assert (counts_BC[b, 0], counts_BC[b, 1:].sum()) == (tested, changed)
    assert torch.equal(x_BTN.nan_to_num(-99), before_BTN.nan_to_num(-99)), "the model's own tensor was written into"


@pytest.mark.parametrize("by_torch", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("seed", range(4))
def test_slots__replace_inside_any_piece_what_the_rules_say(by_torch, seed):
    rows = random_pieces(seed, width=WIDTH, concepts=("joy", "fear"), hook_point="resid_post")
    table = table_of(rows, widths={"resid_post": WIDTH}, method="likelihood_ratio", top_fraction=1.0)
    slots = ProgramSlots(len(RULES_ON_PIECES))
    slot_of = [0] + [slots.load(Program.compile(table, rules)) for rules in RULES_ON_PIECES]
    chosen = np.random.default_rng(seed).integers(0, len(slot_of), size=8).tolist()
    x_BTN = values((8, 3, WIDTH), torch.float32, seed)
    step = slots.step([slot_of[i] for i in chosen], torch.ones(8, 3, dtype=torch.bool), by_torch=by_torch)
    assert step is not None
    out_BTN = step.run("resid_post", 0, x_BTN)
    assert out_BTN is not None
    for b, i in enumerate(chosen):
        rules = RULES_ON_PIECES[i - 1] if i else []
        counts = np.zeros(step.counts().shape[1], int)
        for x_N, out_N in zip(x_BTN[b].numpy(), out_BTN[b].numpy(), strict=True):
            expected_N, n_tested, changed = apply_by_hand(rows, rules, x_N)
            np.testing.assert_allclose(out_N, expected_N, rtol=2e-6, atol=1e-6)
            counts[: 1 + len(rules)] += [n_tested, *changed]
        assert step.counts()[b].tolist() == counts.tolist()


def test_slots__count_what_each_rule_changed_in_the_rules_order():
    """Of 37 neurons joy has 19, every second; fear 13, every third; 7 have both, 25 one of them at least.

    joy's range is [-0.5, 1.5], fear's [-1.15, 0.35]. 0.5 is inside joy's alone; it becomes 0, which is inside again in
    layer 1. -0.4 is inside both, and fear is first: of joy's neurons 12 are left to joy in layer 0, all 19 in layer 1.
    """
    program = Program.compile(TABLE, [{"concept": "fear", "layers": [0]}, {"concept": "joy"}])
    slots = ProgramSlots(1)
    x_BTN = torch.tensor([0.5, -0.4])[:, None, None].expand(2, 1, WIDTH).contiguous()
    slot = slots.load(program)
    out_BTN, counts_BC = through(slots, [slot, slot], x_BTN, torch.ones(2, 1, dtype=torch.bool))
    assert counts_BC.tolist() == [[25 + 19, 0, 19 + 19], [25 + 19, 13, 12 + 19]]
    assert out_BTN[:, 0, :4].tolist() == [[0, 0.5, 0, 0.5], [0, pytest.approx(-0.4), 0, 0]]


def test_slots__reuse_a_slot_only_when_nobody_runs_under_it():
    slots = ProgramSlots(2)
    first, second = slots.load(PROGRAMS[0]), slots.load(PROGRAMS[1])
    assert slots.load(PROGRAMS[0]) == first
    slots.release(second)
    third = slots.load(PROGRAMS[2])
    assert third == second
    with pytest.raises(IndexError):
        slots.load(PROGRAMS[3])
    x_BTN = values((2, 1, WIDTH), torch.float32, 3)
    real_BT = torch.ones(2, 1, dtype=torch.bool)
    out_BTN, _ = through(slots, [first, third], x_BTN, real_BT)
    for b, program in enumerate((PROGRAMS[0], PROGRAMS[2])):
        expected, _, _ = alone(program, x_BTN[b : b + 1], real_BT[b : b + 1])
        assert torch.equal(out_BTN[b].nan_to_num(-99), expected[0].nan_to_num(-99))


def test_slots__leave_a_batch_without_programs_alone():
    slots = ProgramSlots(1)
    assert slots.step([0, 0], torch.ones(2, 1, dtype=torch.bool)) is None
    slot = slots.load(Program.compile(TABLE, [{"concept": "joy", "layers": [1]}]))
    step = slots.step([slot], torch.ones(1, 1, dtype=torch.bool))
    assert step is not None
    assert step.run("resid_post", 0, torch.zeros(1, 1, WIDTH)) is None
    assert slots.sites == {("resid_post", 1)}
