"""Are the values of a neuron under one concept Gaussian?"""

from collections.abc import Sequence

import numpy as np

from neuronlens import figures
from neuronlens.figures import Band
from neuronlens.page.desk import Desk, Rows, by_hook_point, decimal, number, percent, rounded
from neuronlens.page.elements import Drawing, Part, Query, Section, Table


def section(desk: Desk, rows: Rows) -> Section:
    """From the rows of report_gaussianity.sql."""
    parts = [
        Part(
            title=desk.at(hook_point, "Layer by layer"),
            drawings=tuple(_by_layer(desk, own)),
            table=_table(own).without_empty_columns(),
            queries=(Query(name="report_gaussianity"),),
        )
        for hook_point, own in by_hook_point(rows)
    ]
    if rows:
        parts.append(
            Part(
                title="Concept by concept",
                lead="Share of a layer's neurons whose values under the concept are near-Gaussian.",
                drawings=tuple(_by_concept(desk)),
                note=desk.cut_note,
                queries=(Query(name="report_gaussianity_by_concept"),),
            )
        )
    return Section(
        anchor="gaussianity",
        title="Are the values of a neuron Gaussian?",
        lead="A range [mean − tau · std, mean + tau · std] stands for a concept as well as its values are Gaussian: "
        "with tau 2.5 it then holds 98.8 % of them. Each neuron under each concept is one distribution here.",
        parts=tuple(parts) or (Part(note="No neuron's values vary: there is nothing to measure."),),
    )


def _by_layer(desk: Desk, rows: Rows) -> list[Drawing]:
    near = figures.layer_band(
        _band(rows, "share_near_gaussian"), title="Near-Gaussian distributions", ends=(0, 1), percent=True
    )
    skewness = figures.layer_band(_spread(rows, "skewness"), title="Skewness", inside=(-1, 1))
    kurtosis = figures.layer_band(_spread(rows, "excess_kurtosis"), title="Excess kurtosis", inside=(-1, 2))
    drawings = [
        desk.draw(near, "Share with a skewness in (−1, 1) and an excess kurtosis in [−1, 2]."),
        desk.draw(
            skewness,
            "Line: the median; band: from the 5th to the 95th percentile of neurons and concepts. A Gaussian has 0. "
            "Dashed: the near-Gaussian limits.",
        ),
        desk.draw(
            kurtosis,
            "Kurtosis minus 3, drawn in the same way. A Gaussian has 0; more means heavier tails: at the extreme, a "
            "single text far from all others.",
        ),
    ]
    if any(row["median_ks"] is not None for row in rows):
        distance = figures.layer_band(_spread(rows, "ks"), title="Distance to the fitted Gaussian (KS)", ends=(0, None))
        drawings.append(
            desk.draw(
                distance,
                "Kolmogorov-Smirnov distance at the bins' edges: the largest difference between the cumulated shares "
                "and those of the Gaussian with the same mean and standard deviation. A Gaussian has about 0.",
            )
        )
    return drawings


def _band(rows: Rows, column: str) -> Band:
    return Band(layers=[row["layer"] for row in rows], middle=[number(row[column]) for row in rows])


def _spread(rows: Rows, column: str) -> Band:
    median, low, high = ([number(row[f"{prefix}_{column}"]) for row in rows] for prefix in ("median", "p05", "p95"))
    return Band(layers=[row["layer"] for row in rows], middle=median, low=low, high=high)


def _table(rows: Rows) -> Table:
    return Table(
        columns=(
            *("layer", "distributions", "constant", "near-Gaussian", "median skewness", "median excess kurtosis"),
            *("its 95th percentile", "median KS distance", "median Jarque-Bera"),
        ),
        rows=tuple(
            (
                str(row["layer"]),
                f"{row['n_bumps']:,}",
                f"{row['n_constant']:,}",
                percent(row["share_near_gaussian"]),
                decimal(row["median_skewness"]),
                decimal(row["median_excess_kurtosis"]),
                decimal(row["p95_excess_kurtosis"], 1),
                decimal(row["median_ks"], 3),
                decimal(row["median_jarque_bera"], 0),
            )
            for row in rows
        ),
        numbers=frozenset(range(9)),
        caption="Constant values are counted and left out of the rest. Jarque-Bera grows with the number of values: "
        "compare layers with it, not data sets.",
    )


def _by_concept(desk: Desk) -> list[Drawing]:
    drawings = []
    for hook_point, rows in by_hook_point(desk.rows("report_gaussianity_by_concept")):
        layers = sorted({row["layer"] for row in rows})
        varying = {row["concept"] for row in rows}
        names = [concept for concept in desk.shown if concept in varying]
        value_CL = np.full((len(names), len(layers)), np.nan)
        for row in rows:
            if row["concept"] in names:
                value_CL[names.index(row["concept"]), layers.index(row["layer"])] = row["share_near_gaussian"]
        title = desk.at(hook_point, "Near-Gaussian share")
        figure = figures.layer_map(names, layers, value_CL, limits=rounded(value_CL), title=title)
        drawings.append(desk.draw(figure, _extremes(names, np.nanmean(value_CL, axis=1))))
    return drawings


def _extremes(names: Sequence[str], mean_C: np.ndarray) -> str:
    best, worst = int(mean_C.argmax()), int(mean_C.argmin())
    if percent(mean_C[best]) == percent(mean_C[worst]):
        return f"Over all layers: {percent(mean_C[best])}."
    return (
        f"Over all layers, {names[best]} is the most Gaussian ({percent(mean_C[best])}), {names[worst]} the least "
        f"({percent(mean_C[worst])})."
    )
