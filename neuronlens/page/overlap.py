"""How far do concepts share a neuron's values?"""

from neuronlens import figures
from neuronlens.figures import Band
from neuronlens.page.desk import Desk, Rows, by_hook_point, decimal, pair_maps, percent
from neuronlens.page.elements import Part, Query, Section, Table


def section(desk: Desk, by_layer: Rows) -> Section:
    """From the rows of report_overlap_by_layer.sql."""
    parts = []
    pairs = desk.rows("report_overlap", concepts=list(desk.shown)) if by_layer else []
    for hook_point, own in by_hook_point(by_layer):
        parts.append(_by_layer(desk, hook_point, own))
        parts.append(
            pair_maps(
                desk,
                [row for row in pairs if row["hook_point"] == hook_point],
                "mean_ovl",
                title=desk.at(hook_point, "Pairs of concepts"),
                lead="A cell is the mean overlap of two concepts at the neurons of a layer: the darker, the more they "
                "share. All maps have one scale and one order, which puts similar concepts side by side.",
                query="report_overlap",
            )
        )
    return Section(
        anchor="overlap",
        title="How far do concepts share a neuron's values?",
        lead="The overlap of two concepts at a neuron is the area that their distributions share: 1 where the neuron "
        "takes the same values for both, 0 where its value alone tells them apart.",
        parts=tuple(parts) or (Part(note=desk.no_pairs),),
    )


def _by_layer(desk: Desk, hook_point: str, rows: Rows) -> Part:
    band = Band(
        layers=[row["layer"] for row in rows],
        middle=[row["mean_ovl"] for row in rows],
        low=[row["lowest_ovl"] for row in rows],
        high=[row["highest_ovl"] for row in rows],
    )
    drawing = desk.draw(
        figures.layer_band(band, title="Mean overlap of two concepts", ends=(0, 1)),
        "Line: the mean over all pairs; band: from the pair that overlaps least to the one that overlaps most.",
    )
    return Part(
        title=desk.at(hook_point, "Layer by layer"),
        drawings=(drawing,),
        table=_table(rows).without_empty_columns(),
        queries=(Query(name="report_overlap_by_layer"),),
    )


def _table(rows: Rows) -> Table:
    return Table(
        columns=("layer", "mean overlap", "least", "pair", "most", "pair", "below one half"),
        rows=tuple(
            (
                str(row["layer"]),
                decimal(row["mean_ovl"], 3),
                decimal(row["lowest_ovl"], 3),
                f"{row['lowest_a']} – {row['lowest_b']}",
                decimal(row["highest_ovl"], 3),
                f"{row['highest_a']} – {row['highest_b']}",
                percent(row["share_below_half"]),
            )
            for row in rows
        ),
        numbers=frozenset({0, 1, 2, 4, 6}),
        caption="Below one half: at so many of the neurons, over all pairs, two concepts overlap by less than 0.5.",
    )
