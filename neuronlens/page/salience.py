"""Do concepts use the same neurons?"""

from collections.abc import Sequence

import numpy as np

from neuronlens import figures
from neuronlens.page.desk import Desk, Rows, by_hook_point, pair_maps, percent
from neuronlens.page.elements import Part, Query, Section


def section(desk: Desk) -> Section:
    parts = []
    pairs = desk.rows("report_salient_overlap", concepts=list(desk.shown)) if len(desk.shown) > 1 else []
    for hook_point, own in by_hook_point(desk.rows("report_polysemantic")):
        parts.append(_counts(desk, hook_point, own))
        parts.append(
            pair_maps(
                desk,
                [row for row in pairs if row["hook_point"] == hook_point],
                "jaccard",
                title=desk.at(hook_point, "Salient neurons in common"),
                lead="A cell is the number of neurons salient for both concepts over the number salient for either "
                "(Jaccard). Sets chosen by chance would have 0.18. One scale and one order for all maps.",
                query="report_salient_overlap",
            )
        )
    return Section(
        anchor="salience",
        title="Do concepts use the same neurons?",
        lead="A neuron is salient for a concept where it is among the first 30 % of its layer by mean |activation|. "
        "Two concepts that share a neuron may still use different values of it: compare with the overlap above.",
        parts=tuple(parts) or (Part(note="The store holds no salience."),),
    )


def _counts(desk: Desk, hook_point: str, rows: Rows) -> Part:
    layers = sorted({row["layer"] for row in rows})
    names, share_GL = _grouped(rows, layers, len(desk.facts.concepts))
    n_neurons = sum(row["n_neurons"] for row in rows)
    several = sum(row["n_neurons"] for row in rows if row["n_concepts"] >= 2) / n_neurons
    drawing = desk.draw(
        figures.layer_shares(layers, share_GL, names, title="For how many concepts is a neuron salient?"),
        f"Share of a layer's neurons. Over all layers, {percent(several)} are salient for two concepts or more: they "
        "are polysemantic.",
    )
    return Part(
        title=desk.at(hook_point, "How many concepts does a neuron serve?"),
        drawings=(drawing,),
        queries=(Query(name="report_polysemantic"),),
    )


def _grouped(rows: Rows, layers: Sequence[int], n_concepts: int) -> tuple[list[str], np.ndarray]:
    """Names and shares [groups, layers] of neurons by their number of concepts; many concepts in doubling groups."""
    starts = list(range(n_concepts + 1)) if n_concepts <= 8 else [0, *(2**k for k in range(n_concepts.bit_length()))]
    ends = [*(start - 1 for start in starts[1:]), n_concepts]
    count_GL = np.zeros((len(starts), len(layers)))
    for row in rows:
        group = int(np.searchsorted(starts, row["n_concepts"], side="right")) - 1
        count_GL[group, layers.index(row["layer"])] += row["n_neurons"]
    names = [str(first) if first == last else f"{first}–{last}" for first, last in zip(starts, ends, strict=True)]
    return names, count_GL / count_GL.sum(axis=0)
