"""Controls of the erasure evaluation: what would an intervention do that knows less?

    random         as many neurons of each layer, drawn at random from all of them, with their own ranges of the concept
                   (by method hpd where the method itself leaves neurons out)
    wrong_concept  the ranges of another concept, the next by name
    shuffled       the same neurons, with the ranges that they get when the texts' labels are shuffled
    length_matched no other intervention: the results of `range`, on a complement that is weighted so that its prompts
                   are as long as the target's (`neuronlens.scores.length_matched`)

A difference between `range` and `random` is due to the choice of neurons, one between `range` and `shuffled` to the
ranges, and both must be seen before a range can be called the concept's.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from neuronlens.errors import UsageError
from neuronlens.evaluation import Case, EvaluationPlan
from neuronlens.measure import Positions
from neuronlens.programs import Edit, Program, Rule, SiteProgram
from neuronlens.ranges import PAPER, RangeTable

Control = Literal["random", "wrong_concept", "shuffled", "length_matched"]
CONTROLS: tuple[Control, ...] = get_args(Control)

SEED = 0

_SITE = ["hook_point", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTables:
    """The range tables that controls of one setting take: for `random`, of all neurons in random order
    (`randomly_ranked`); for `shuffled`, with ranges from shuffled labels, and where those came from, in words."""

    in_random_order: RangeTable | None = None
    shuffled: RangeTable | None = None
    shuffled_from: str | None = None


def parse_controls(text: str | None) -> tuple[Control, ...]:
    """The controls in a list with commas, in our order. Raises UsageError for an unknown one."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in CONTROLS]
    if unknown:
        raise UsageError(f"Unknown control {unknown[0]!r}. There are: {', '.join(CONTROLS)}.")
    return tuple(name for name in CONTROLS if name in names)


def plan_controls(
    plan: EvaluationPlan,
    setting: int,
    table: RangeTable,
    edit: Edit,
    programs: Mapping[str, Program | None],
    controls: Sequence[Control],
    tables: ControlTables,
    *,
    positions: Positions = "all",
) -> None:
    """Add the controls of a setting whose range programs these are, by concept.

    Raises UsageError where a control cannot be: another concept where there is none, too few neurons to draw from.
    """
    for concept, program in programs.items():
        rule = Rule.of(edit, concept)
        found: dict[Control, tuple[int, str | None]] = {}
        if "random" in controls:
            found["random"] = _random(plan, tables.in_random_order, edit, concept, program, positions), f"seed {SEED}"
        if "wrong_concept" in controls:
            other = _next(concept, list(programs))
            found["wrong_concept"] = plan.number_of(table, [Rule.of(edit, other)], positions, programs[other]), other
        if "shuffled" in controls:
            assert tables.shuffled is not None, "control shuffled takes ranges from shuffled labels"
            found["shuffled"] = plan.number_of(tables.shuffled, [rule], positions), tables.shuffled_from
        if "length_matched" in controls:
            found["length_matched"] = plan.number_of(table, [rule], positions, program), None
        plan.cases += [
            Case(setting=setting, concept=concept, condition=condition, number=number, control=told)
            for condition, (number, told) in found.items()
        ]


def _random(
    plan: EvaluationPlan,
    table: RangeTable | None,
    edit: Edit,
    concept: str,
    program: Program | None,
    positions: Positions,
) -> int:
    assert table is not None, "control random draws from a table of all neurons"
    return 0 if program is None else plan.number_of(table, random_rules(program, table, edit, concept), positions)


def randomly_ranked(of_all_neurons: RangeTable) -> RangeTable:
    """The table with the neurons of every (hook point, layer, concept) ranked at random instead of by salience: the n
    first are n random ones. The order is the same each time."""
    rows = of_all_neurons.rows
    neuron, rank = rows["neuron"].to_numpy(), np.zeros(rows.num_rows, dtype=np.int32)
    for (hook_point, layer, concept), place in _groups(rows):
        seed = [SEED, zlib.crc32(hook_point.encode()), layer, zlib.crc32(concept.encode())]
        there, which = np.unique(neuron[place], return_inverse=True)
        rank[place] = 1 + np.random.default_rng(seed).permutation(len(there))[which]
    column = rows.schema.get_field_index("rank")
    return _remade(of_all_neurons, rows.set_column(column, rows.schema.field("rank"), pa.array(rank)))


def random_rules(program: Program, in_random_order: RangeTable, edit: Edit, concept: str) -> list[Rule]:
    """Rules that do at every site of the program what `edit` does, to as many neurons of the concept drawn at random.

    Raises UsageError where the table has too few.
    """
    fields = edit.model_dump(exclude={"layers", "hook_points", "top_fraction"})
    return [
        Rule(
            concept=concept,
            layers=(site.layer,),
            hook_points=(site.hook_point,),
            top_fraction=_share(site, in_random_order, concept),
            **fields,
        )
        for site in program.sites
    ]


def shuffled_table(table: RangeTable, moments: pa.Table) -> RangeTable:
    """The table with the mean and std that `moments` (hook_point, layer, neuron, concept, mean, std) has for each row,
    and the ranges that follow from them. Its neurons, ranks and salience stay.

    Raises UsageError for a table whose ranges are not mean -+ tau * std.
    """
    if table.header.method != PAPER:
        raise UsageError(
            f"Control shuffled makes ranges of method {PAPER}, mean -+ tau * std; table {table.id} is by method "
            f"{table.header.method}. Leave shuffled out, or evaluate a table of method {PAPER}."
        )
    keys = [*_SITE, "neuron", "concept"]
    kept = table.rows.drop_columns(["mean", "std", "lower", "upper"])
    moments = moments.select([*keys, "mean", "std"]).cast(pa.schema([*(kept.schema.field(k) for k in keys), *_MOMENTS]))
    rows = kept.join(moments, keys, join_type="inner")
    reach = pc.multiply(rows["std"], table.header.tau)
    rows = rows.append_column("lower", pc.subtract(rows["mean"], reach))
    rows = rows.append_column("upper", pc.add(rows["mean"], reach))
    return _remade(table, rows)


def _remade(table: RangeTable, rows: pa.Table) -> RangeTable:
    """A table of other rows under the same header."""
    header = table.header
    return RangeTable.make(
        rows,
        tau=header.tau,
        top_fraction=header.top_fraction,
        salience=header.salience,
        store_hash=header.store_hash,
        model=header.model,
        unit=header.unit,
        widths=header.widths,
        coverage=header.coverage,
        method=header.method,
        options=header.options,
    )


_MOMENTS = (pa.field("mean", pa.float64()), pa.field("std", pa.float64()))


def _groups(rows: pa.Table) -> Iterator[tuple[tuple[str, int, str], slice]]:
    """Where the rows (in ROW_ORDER) of each hook point, layer and concept lie."""
    keys = ("hook_point", "layer", "concept")
    codes = [rows[key].combine_chunks().dictionary_encode().indices.to_numpy() for key in keys]
    is_first = np.ones(rows.num_rows, dtype=bool)
    is_first[1:] = np.any([code[1:] != code[:-1] for code in codes], axis=0)
    starts = np.flatnonzero(is_first)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), rows.num_rows], strict=True):
        yield tuple(rows[key][start].as_py() for key in keys), slice(start, stop)


def _share(site: SiteProgram, table: RangeTable, concept: str) -> float:
    """The top_fraction that takes as many of the table's neurons as the site names."""
    rows = table.select(concept, hook_points=[site.hook_point], layers=[site.layer])
    n_wanted, n_there = int(site.named_N.sum()), pc.count_distinct(rows["neuron"]).as_py()
    if n_wanted > n_there:
        raise UsageError(
            f"Control random draws {n_wanted} neurons of {site.hook_point}, layer {site.layer}, and table {table.id} "
            f"has {n_there} of {concept} there. Leave random out, or take method {PAPER}."
        )
    return min(1.0, (n_wanted + 0.5) / site.width)  # rounded down, it is n_wanted of the width


def _next(concept: str, concepts: Sequence[str]) -> str:
    """The next by name, after the last the first."""
    if len(concepts) < 2:
        raise UsageError(
            f"Control wrong_concept needs another concept than {concept}, and there is none. Leave it out."
        )
    names = sorted(concepts)
    return names[(names.index(concept) + 1) % len(names)]
