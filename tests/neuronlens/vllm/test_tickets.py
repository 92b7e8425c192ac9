"""Tickets: which token runs under which program, and whose counts it goes to."""

import numpy as np
import pytest
import torch

from neuronlens.vllm.tickets import Tickets
from neuronlens.vllm.wire import pack, unpack
from tests.neuronlens.vllm.boards import CONFIG, RULES, board, program, rank_site

WIDTH = 24
DATA = {name: pack(program(rules, WIDTH)) for name, rules in zip("abcd", RULES, strict=True)}
ONE_RULE = {f"p{i}": pack(program([{"concept": "joy", "tau": 1.0 + i}], WIDTH)) for i in range(10)}
BOTH = ["prompt", "generation"]


def seat(tickets: Tickets, *rows: tuple[str, str | None, int, int, int]) -> None:
    """Rows of (sequence, ticket, tokens in this pass, position before it, length of the prompt)."""
    sequences, names, scheduled, computed, prompt = zip(*rows, strict=True)
    tickets.seat(list(sequences), list(names), np.array(scheduled), np.array(computed), np.array(prompt))


def admitted(tickets: Tickets, name: str, program_name: str, data: bytes, phases: list[str] = BOTH) -> None:
    assert tickets.admit(name, program_name, phases, data)[0] == "admitted"


def test_seat__gives_each_token_its_sequences_slot_in_the_batchs_order():
    made, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t1", "p1", ONE_RULE["p1"])
    admitted(tickets, "t2", "p2", ONE_RULE["p2"])
    slot = {name: tickets._tickets[name].slot for name in ("t1", "t2")}
    seat(tickets, ("x", "t2", 3, 0, 3), ("y", None, 2, 4, 6), ("z", "t1", 1, 9, 5), ("w", "forged", 2, 0, 2))
    assert made.slot_T[:8].tolist() == [slot["t2"]] * 3 + [0, 0] + [slot["t1"]] + [0, 0]
    seat(tickets, ("z", "t1", 1, 10, 5))
    assert made.slot_T[:8].tolist() == [slot["t1"], 0, 0, 0, 0, 0, 0, 0], "the rest of a longer pass is still seated"


@pytest.mark.parametrize(
    ("phases", "expected"), [(["prompt"], [1, 1, 0, 0]), (["generation"], [0, 0, 1, 1]), (BOTH, [1, 1, 1, 1])]
)
def test_seat__splits_prompt_and_generation_by_position_also_after_preemption(phases, expected):
    # A sequence that was preempted computes two tokens of its prompt and two that it had generated in one pass.
    made, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t", "p1", ONE_RULE["p1"], phases)
    seat(tickets, ("x", "t", 4, 3, 5))
    assert (made.slot_T[:4] > 0).int().tolist() == expected


def test_seat__counts_no_position_twice():
    made, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t", "p1", ONE_RULE["p1"])
    row = tickets._tickets["t"].row
    seat(tickets, ("x", "t", 4, 0, 6))
    assert made._counter_T[:4].tolist() == [row] * 4
    seat(tickets, ("x", "t", 6, 0, 6))  # preempted, and begun again with a larger chunk
    assert made._counter_T[:6].tolist() == [0] * 4 + [row] * 2
    seat(tickets, ("x", "t", 3, 2, 6))
    assert made._counter_T[:3].tolist() == [0] * 3
    assert (made.slot_T[:3] > 0).all(), "what is computed again is still steered"


def test_seat__goes_on_counting_while_the_batch_stays_the_same():
    made, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t", "p1", ONE_RULE["p1"], ["generation"])
    row = tickets._tickets["t"].row
    for start, n, expected in ((0, 4, [0] * 4), (4, 3, [0, 1, 1]), (6, 2, [0, 1]), (8, 1, [1])):
        seat(tickets, ("x", "t", n, start, 5), ("y", None, 1, 0, 1))
        assert (made.slot_T[:n] > 0).tolist() == [start + t >= 5 for t in range(n)]
        counted = (made._counter_T[:n] == row) & (made.slot_T[:n] > 0)
        assert counted.int().tolist() == expected, f"position {start}"
        assert made.slot_T[n] == 0


def test_seat__hears_of_what_changed_between_two_passes_of_the_same_batch():
    made, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t", "p1", ONE_RULE["p1"])
    seat(tickets, ("x", "t", 1, 5, 3), ("y", "u", 1, 5, 3))
    assert (made.slot_T[:2] > 0).tolist() == [True, False]
    admitted(tickets, "u", "p2", ONE_RULE["p2"])
    seat(tickets, ("x", "t", 1, 6, 3), ("y", "u", 1, 6, 3))
    assert (made.slot_T[:2] > 0).tolist() == [True, True]
    tickets.release("t")
    row = tickets._tickets["u"].row
    seat(tickets, ("x", "t", 1, 7, 3), ("y", "u", 1, 7, 3))
    assert made._counter_T[:2].tolist() == [0, row], "a ticket that is back counts no more"
    seat(tickets, ("x", None, 1, 8, 3), ("y", "u", 1, 8, 3))
    assert (made.slot_T[:2] > 0).tolist() == [False, True], "the same sequence's name, another request"
    seat(tickets, ("x", None, 1, 9, 3), ("z", "u", 1, 0, 3))
    assert made._counter_T[1] == row, "another sequence's positions are counted apart"
    seat(tickets, ("x", None, 1, 10, 3), ("y", "u", 3, 7, 3))
    assert made._counter_T[1:4].tolist() == [0, 0, row], "positions of a sequence that was away are not counted twice"


def test_admit__asks_for_the_program_once_and_gives_a_slot_to_each():
    _, tickets = board([rank_site(WIDTH)])
    assert tickets.admit("t1", "a", BOTH, None)[0] == "unknown_program"
    admitted(tickets, "t1", "a", DATA["a"])
    assert tickets.admit("t2", "a", BOTH, None)[0] == "admitted"
    assert tickets._tickets["t1"].slot == tickets._tickets["t2"].slot
    assert tickets._tickets["t1"].row != tickets._tickets["t2"].row


def test_admit__says_busy_and_never_takes_a_slot_that_is_used():
    made, tickets = board([rank_site(WIDTH)])
    for i in range(CONFIG.slots):
        admitted(tickets, f"t{i}", f"p{i}", ONE_RULE[f"p{i}"])
    before = [part.clone() for part in (made.tables.sites[0].numbers_KFN, made.tables.sites[0].rows_2SR)]
    answer, sentence = tickets.admit("late", "p9", BOTH, ONE_RULE["p9"])
    assert (answer, "4 distinct programs" in sentence) == ("busy", True)
    assert torch.equal(before[0], made.tables.sites[0].numbers_KFN)
    tickets.release("t2")
    admitted(tickets, "late", "p9", ONE_RULE["p9"])
    assert len({ticket.slot for ticket in tickets._tickets.values()}) == CONFIG.slots


def test_admit__makes_room_by_rule_rows_too():
    _, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t1", "d", DATA["d"])  # three rules of the six rows
    admitted(tickets, "t2", "c", DATA["c"])  # two
    assert tickets.admit("t3", "p1c", BOTH, DATA["c"])[0] == "busy"
    tickets.release("t1")
    admitted(tickets, "t3", "p1c", DATA["c"])


def test_release__keeps_the_program_for_stragglers_until_its_slot_is_needed():
    made, tickets = board([rank_site(WIDTH)])
    admitted(tickets, "t", "p1", ONE_RULE["p1"])
    slot = tickets._tickets["t"].slot
    tickets.release("t")
    seat(tickets, ("x", "t", 2, 0, 2))
    assert made.slot_T[:2].tolist() == [slot, slot]
    assert made._counter_T[:2].tolist() == [0, 0]
    for i in range(2, 2 + CONFIG.slots):
        admitted(tickets, f"t{i}", f"p{i}", ONE_RULE[f"p{i}"])
    seat(tickets, ("x", "t", 2, 0, 2))
    assert made.slot_T[:2].tolist() == [0, 0], "another program's slot"


def test_release__gives_the_counts_once_and_the_row_to_the_next():
    made, tickets = board([rank_site(WIDTH)], n_counters=1)
    admitted(tickets, "t1", "p1", ONE_RULE["p1"])
    assert tickets.admit("t2", "p1", BOTH, None)[0] == "busy"
    seat(tickets, ("x", "t1", 3, 0, 3))
    made.run(torch.zeros(3, WIDTH), 0)
    counts = tickets.release("t1")
    assert counts is not None
    assert counts[0] > 0
    assert tickets.release("t1") is None
    admitted(tickets, "t2", "p1", ONE_RULE["p1"])
    assert tickets.release("t2") == [0] * (1 + CONFIG.rules)


def test_wire__brings_a_program_over_unchanged():
    for rules in RULES:
        sent = program(rules, WIDTH, layers=[0, 2])
        got = unpack(pack(sent))
        assert [(site.hook_point, site.layer) for site in got] == [(s.hook_point, s.layer) for s in sent.sites]
        for mine, theirs in zip(got, sent.sites, strict=True):
            for name in ("rule_R", "lower_RN", "upper_RN", "a_RN", "b_RN", "g_RN", "centre_RN"):
                a, b = getattr(mine, name), getattr(theirs, name)
                assert (a is None) == (b is None), name
                if a is not None:
                    # What a rule does to neurons that it does not name is nothing, and is not sent.
                    named_RN = theirs.lower_RN <= theirs.upper_RN
                    where = named_RN if a.ndim == 2 else slice(None)
                    np.testing.assert_array_equal(a[where], b[where], err_msg=name)
            np.testing.assert_array_equal(mine.constant_R, theirs.constant_R)
