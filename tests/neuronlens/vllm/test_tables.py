"""The rules of many slots on tokens in a row: the compiled pass and the torch operations, held to numpy by hand."""

from functools import partial

import numpy as np
import pytest
import torch

from neuronlens.programs import Program
from neuronlens.vllm import tables
from neuronlens.vllm.config import WorkerConfig
from neuronlens.vllm.tables import NoRoom, ReplaceByNumba, SlotTables, replace_by_torch
from neuronlens.vllm.wire import pack, unpack
from tests.neuronlens.vllm.boards import CONFIG, RULES, board, by_hand, program, rank_site, values
from tests.range_tables import RULES_ON_PIECES, apply_by_hand, pieces, random_pieces, table_of

WAYS = {
    "numba": partial(ReplaceByNumba, n_threads=1),
    "three threads": partial(ReplaceByNumba, n_threads=3),
    "torch": lambda *arrays: lambda x_TN: replace_by_torch(x_TN, *arrays),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replace__does_to_each_token_what_its_own_program_says(way, dtype, monkeypatch):
    monkeypatch.setattr(tables, "_ALONE", 0)
    width, slots = 37, [0, 1, 2, 3, 4, 2, 0, 1]
    programs = [program(rules, width) for rules in RULES]
    made, _ = board([rank_site(width)], dtype=dtype, config=CONFIG.model_copy(update={"rule_rows": 7}))
    for slot, one in enumerate(programs, start=1):
        made.tables.put(slot, one.sites)
    x_TN = values(len(slots), width, 5, dtype)
    before = x_TN.double().numpy().copy()
    made.host_2T[0, : len(slots)], made.host_2T[1, : len(slots)] = slots, slots
    made.seat(len(slots))
    WAYS[way](made.tables.sites[0], made.slot_T, made.counts_TC)(x_TN)
    made.rest()
    expected_counts = np.zeros((9, 4), int)
    for t, slot in enumerate(slots):
        expected, counts = (before[t], [0]) if slot == 0 else by_hand(programs[slot - 1], 0, before[t], dtype)
        rounded = torch.from_numpy(expected).float().to(dtype).double().numpy()
        np.testing.assert_allclose(x_TN[t].double().numpy(), rounded, rtol=1e-6 if dtype is torch.float32 else 1e-2)
        expected_counts[slot, : len(counts)] += counts
        assert slot == 0 or not np.array_equal(expected, before[t], equal_nan=True)
    np.testing.assert_array_equal(made.counts_UC.numpy(), expected_counts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_replace__does_inside_any_piece_what_the_rules_say(way, seed):
    """Through the wire too, and against the words of the rules, not against the program's arrays."""
    width, n_tokens = 19, 12
    config = WorkerConfig(slots=len(RULES_ON_PIECES), rules=3, rule_rows=40)
    rows = random_pieces(seed, width=width, concepts=("joy", "fear"))
    table = table_of(rows, widths={"mlp_post": width}, method="likelihood_ratio", top_fraction=1.0)
    made, _ = board([rank_site(width)], config=config)
    for slot, rules in enumerate(RULES_ON_PIECES, start=1):
        made.tables.put(slot, unpack(pack(Program.compile(table, rules))))
    x_TN = values(n_tokens, width, seed)
    before_TN = x_TN.numpy().copy()
    slot_T = np.random.default_rng(seed).integers(0, len(RULES_ON_PIECES) + 1, n_tokens)
    made.host_2T[0, :n_tokens], made.host_2T[1, :n_tokens] = slot_T, slot_T
    made.seat(n_tokens)
    WAYS[way](made.tables.sites[0], made.slot_T, made.counts_TC)(x_TN)
    made.rest()
    expected_counts = np.zeros((9, 1 + config.rules), int)
    for t, slot in enumerate(slot_T.tolist()):
        rules = RULES_ON_PIECES[slot - 1] if slot else []
        expected_N, n_tested, changed = apply_by_hand(rows, rules, before_TN[t])
        np.testing.assert_allclose(x_TN[t].numpy(), expected_N, rtol=2e-6, atol=1e-6)
        expected_counts[slot, : 1 + len(rules)] += [n_tested, *changed] if slot else [0]
    np.testing.assert_array_equal(made.counts_UC.numpy(), expected_counts)


def test_replace__leaves_tokens_without_a_program_to_the_last_bit():
    made, _ = board([rank_site(16)], dtype=torch.bfloat16)
    made.tables.put(1, program(RULES[0], 16).sites)
    x_TN = values(6, 16, 3, torch.bfloat16)
    before = x_TN.view(torch.int16).clone()
    made.host_2T[0, :6] = [0, 1, 0, 0, 1, 0]
    made.seat(6)
    made.run(x_TN, 0)
    changed_T = (x_TN.view(torch.int16) != before).any(dim=1)
    assert changed_T.tolist() == [False, True, False, False, True, False]


def test_tables__take_each_ranks_slice_of_a_program():
    width = 40
    whole, _ = board([rank_site(width)])
    whole.tables.put(1, program(RULES[2], width).sites)
    x_TN = values(5, width, 9)
    parts = []
    for rank in (0, 1):
        part, _ = board([rank_site(20, first=20 * rank, full_width=width)], rank=rank)
        part.tables.put(1, program(RULES[2], width).sites)
        half_TN = x_TN[:, 20 * rank : 20 * rank + 20].clone()
        for one in (part,):
            one.host_2T[:, :5] = 1
            one.seat(5)
            one.run(half_TN, 0)
        parts.append((half_TN, part.counts(1)))
    whole.host_2T[:, :5] = 1
    whole.seat(5)
    whole.run(x_TN, 0)
    torch.testing.assert_close(torch.cat([half for half, _ in parts], dim=1), x_TN, rtol=0, atol=0, equal_nan=True)
    assert [sum(pair) for pair in zip(*(counts for _, counts in parts), strict=True)] == whole.counts(1)


def test_board__counts_once_where_every_rank_sees_the_same_values():
    for rank, expected in ((0, True), (1, False)):
        made, _ = board([rank_site(16)], rank=rank)
        made.tables.put(1, program(RULES[0], 16).sites)
        made.host_2T[:, :3] = 1
        made.seat(3)
        made.run(values(3, 16, 2), 0)
        assert (made.counts(1)[0] > 0) is expected


def test_board__puts_a_replacement_into_the_residual_to_the_last_bit():
    made, _ = board([rank_site(32)])
    made.tables.put(1, program(RULES[3], 32).sites)
    x_TN, residual_TN = values(6, 32, 4), values(6, 32, 8)
    sum_TN = x_TN + residual_TN
    made.host_2T[0, :6] = [1, 0, 1, 1, 0, 1]
    made.seat(6)
    made.run_pair(x_TN, residual_TN, 0)
    expected_TN = sum_TN.clone()
    made.run(expected_TN, 0)
    torch.testing.assert_close(x_TN + residual_TN, expected_TN, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(torch.nan_to_num(expected_TN), torch.nan_to_num(sum_TN))


def test_tables__give_rule_rows_back_and_refuse_what_does_not_fit():
    tables = SlotTables([rank_site(8)], CONFIG, torch.device("cpu"), torch.float32)
    three = program(RULES[3], 8).sites
    tables.put(1, three)
    tables.put(2, three)
    with pytest.raises(NoRoom):
        tables.put(3, three)
    tables.clear(1)
    tables.put(3, three)
    assert tables.sites[0].n_rows_S.tolist() == [0, 0, 3, 3, 0]


def test_tables__hold_as_many_pieces_as_there_are_rule_rows():
    def of(n_pieces: int) -> Program:
        bounds = [(2.0 * i, 2.0 * i + 1, 0.5) for i in range(n_pieces)]
        return Program.compile(table_of(pieces("joy", 3, bounds), widths={"mlp_post": 8}, method="hpd"), RULES[0])

    tables = SlotTables([rank_site(8)], CONFIG, torch.device("cpu"), torch.float32)
    assert tables.fault(of(6).sites) is None
    tables.put(1, of(6).sites)
    assert tables.sites[0].n_rows_S.tolist() == [0, 6, 0, 0, 0]
    assert not tables.has_room(of(1).sites)
    assert tables.fault(of(7).sites) == (
        "The program needs 7 rows at mlp_post of layer 0, one for each piece of its rules' ranges, this server's "
        "`rule_rows` is 6. Give fewer rules, take a table with fewer pieces, or start the server with more rule_rows "
        "in additional_config."
    )
    spread_out = [{"concept": "joy", "layers": [layer]} for layer in range(4)]
    many = SlotTables([rank_site(8, layer) for layer in range(4)], CONFIG, torch.device("cpu"), torch.float32)
    assert "has 4 rules" in (many.fault(program(spread_out, 8, layers=range(4)).sites) or "")


@pytest.mark.parametrize(
    ("wanted", "width", "layer", "n_rules"),
    [("is not hooked", 8, 5, 1), ("has 9 neurons", 9, 0, 1), ("has 4 rules, this server's `rules` is 3", 8, 0, 4)],
)
def test_tables__say_why_a_program_can_never_run(wanted, width, layer, n_rules):
    tables = SlotTables([rank_site(8)], CONFIG, torch.device("cpu"), torch.float32)
    rules = [{"concept": "joy", "tau": 1.0 + i} for i in range(n_rules)]
    assert wanted in (tables.fault(program(rules, width, layers=[layer]).sites) or "")
