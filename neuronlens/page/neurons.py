"""Single neurons: those that keep concepts apart best, and the most polysemantic ones."""

from collections.abc import Mapping
from typing import Any

from neuronlens import figures
from neuronlens.cards import Card, read_card
from neuronlens.page.desk import Desk, Rows, count, excerpt
from neuronlens.page.elements import Drawing, Part, Query, Section

MAX_BUMPS = 8
"""So many concepts a neuron: rows that still fit a phone."""
MAX_NEURONS = 6
_FEWER_NEURONS = 4
_MAX_TEXTS = 3
_TEXT_CHARACTERS = 160


def section(desk: Desk) -> Section:
    n = MAX_NEURONS if len(desk.facts.hook_points) <= 2 else _FEWER_NEURONS
    separable = desk.rows("report_separable_neurons", n_neurons=n)
    polysemantic = desk.rows("report_polysemantic_neurons", n_neurons=n)
    parts = []
    for hook_point in desk.facts.hook_points:
        parts.append(_separable(desk, hook_point, separable, n))
        parts.append(_polysemantic(desk, hook_point, polysemantic, n))
    return Section(anchor="neurons", title="Single neurons", lead=_lead(desk), parts=tuple(parts))


def _lead(desk: Desk) -> str:
    tau = desk.facts.tau
    lead = (
        "A row is a concept: how the neuron's values are spread (each row scaled to its own highest step), the range "
        f"[mean − {tau:g} · std, mean + {tau:g} · std] as a band with its ends marked, the mean as a triangle. On the "
        "right, the concept with which it overlaps most. Where the ranges of two concepts lie apart, one can be "
        "silenced without the other."
    )
    if not desk.facts.has_histograms:
        lead += " Dashed curves are Gaussians with the measured mean and std, not the values themselves."
    return lead


def _separable(desk: Desk, hook_point: str, rows: Rows, n: int) -> Part:
    own = [row for row in rows if row["hook_point"] == hook_point]
    none = "There is no neuron whose values vary under every concept."
    return Part(
        title=desk.at(hook_point, "The neurons that keep concepts apart best"),
        lead="Of all neurons whose values vary under every concept, those with the least overlap over all pairs.",
        drawings=tuple(_neuron(desk, row, f"Mean overlap {row['mean_ovl']:.2f}.") for row in own),
        note="" if own else none if len(desk.facts.concepts) > 1 else desk.no_pairs,
        queries=_queries("report_separable_neurons", desk, own, n),
    )


def _polysemantic(desk: Desk, hook_point: str, rows: Rows, n: int) -> Part:
    own = [row for row in rows if row["hook_point"] == hook_point]
    none = "No neuron is salient for more than one concept."
    return Part(
        title=desk.at(hook_point, "The most polysemantic neurons"),
        lead="Salient for the most concepts; among equals, those whose concepts overlap least.",
        drawings=tuple(_neuron(desk, row, _served(row)) for row in own),
        note="" if own else none if len(desk.facts.concepts) > 1 else desk.no_pairs,
        queries=_queries("report_polysemantic_neurons", desk, own, n),
    )


def _served(row: Mapping[str, Any]) -> str:
    overlap = "" if row["mean_ovl"] is None else f", mean overlap {row['mean_ovl']:.2f}"
    return f"Salient for {count(row['n_concepts'], 'concept')}{overlap}."


def _queries(name: str, desk: Desk, rows: Rows, n: int) -> tuple[Query, ...]:
    if not rows:
        return ()
    site = {key: rows[0][key] for key in ("hook_point", "layer", "neuron")}
    card = "".join(f" --param {key}={value}" for key, value in site.items())
    return (
        Query(name=name, params=f" --param n_neurons={n}"),
        Query(name="neuron_card", params=f"{card} --param tau={desk.facts.tau:g}"),
        Query(name="neuron_histogram", params=card),
    )


def _neuron(desk: Desk, row: Mapping[str, Any], said: str) -> Drawing:
    site = {key: row[key] for key in ("hook_point", "layer", "neuron")}
    card = read_card(desk.con, tau=desk.facts.tau, **site).of_most_salient(MAX_BUMPS)
    title = desk.at(row["hook_point"], f"layer {row['layer']}, neuron {row['neuron']}")
    figure = figures.distributions(card, colours=desk.colours, title=title)
    texts = _texts(desk, site)
    return desk.draw(
        figure, f"{said} {_about(card)}", more_title="Texts with its highest values" if texts else "", more=texts
    )


def _about(card: Card) -> str:
    counts = sorted({bump.n for bump in card.bumps})
    said = (
        f"{counts[0]:,} values a concept." if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} values a concept."
    )
    if len(card.bumps) < card.n_concepts:
        said += f" Drawn: {len(card.bumps)} of {card.n_concepts} concepts, those for which the neuron ranks highest."
    return said


def _texts(desk: Desk, site: Mapping[str, Any]) -> tuple[str, ...]:
    if not desk.facts.has_raw:
        return ()
    rows = desk.rows("top_samples", **site)[:_MAX_TEXTS]
    return tuple(
        f"{row['value']:.3g} ({row['concept']}): {excerpt(row['text'] or '', _TEXT_CHARACTERS)}" for row in rows
    )
