"""One neuron over HTTP: GET /v1/neurons/{hook_point}/{layer}/{neuron}, its card under every concept."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from neuronlens.serving.auth import may_read
from neuronlens.serving.cards import Found
from neuronlens.serving.catalog import LATEST
from neuronlens.serving.errors import ApiError, responses
from neuronlens.serving.negotiation import has_already, has_any
from neuronlens.serving.service import service_of

MAX_TAU = 1e6
"""Beyond it a range is the whole line, for which JSON has no numbers."""


@asynccontextmanager
async def _reading_ahead(app: FastAPI) -> AsyncIterator[None]:
    """Beside the first requests, cards are read that nobody has asked for yet."""
    cards = app.state.service.cards
    reading = asyncio.create_task(cards.warm_up())
    try:
        yield
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        cards.close()


router = APIRouter(tags=["neurons"], lifespan=_reading_ahead)


class CardQuery(BaseModel):
    """What a card shall hold."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    tau: float | None = Field(default=None, gt=0, le=MAX_TAU, allow_inf_nan=False)
    """Half width of the ranges `lower` to `upper`, in standard deviations; the range table's own without it."""
    concept: list[str] = Field(default=[])
    """Only this concept, and the pairs that it is in. May be repeated."""
    table: str = LATEST
    """The range table whose ranges stand in the card: an id, or latest."""


class RangePiece(BaseModel):
    """One of the intervals of a range. A null bounds nothing."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    lower: float | None
    upper: float | None
    posterior: float
    """The probability of the concept, given that the value lies in the interval."""


class TableRange(BaseModel):
    """What the range table says of a neuron under a concept; nulls where the neuron is not salient for it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    salient: bool
    """Whether the table has a range of this neuron for the concept."""
    rank: int | None = None
    """1: the most salient neuron of its layer, by the table's own method."""
    lower: float | None = None
    """Where the range begins; null where nothing bounds it."""
    upper: float | None = None
    """Where it ends."""
    pieces: list[RangePiece] | None = None
    """The intervals that the range consists of, ascending; null for a table of method paper, whose ranges are one."""


class ConceptCard(BaseModel):
    """The values of the neuron under one concept. What the store does not say is null."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    concept: str
    n: int | None = None
    """Finite values seen."""
    mean: float | None = None
    std: float | None = None
    """Population standard deviation (ddof = 0)."""
    lower: float | None = None
    """mean - tau * std."""
    upper: float | None = None
    """mean + tau * std."""
    min: float | None = None
    p05: float | None = None
    """5 % of the values lie below, right within its histogram bin (1/8 of the value)."""
    p50: float | None = None
    p95: float | None = None
    max: float | None = None
    mean_abs: float | None = None
    """Mean of |x|."""
    skewness: float | None = None
    """0 for a Gaussian; null where std is 0."""
    kurtosis: float | None = None
    """Not excess: 3 for a Gaussian; null where std is 0."""
    ks: float | None = None
    """Kolmogorov-Smirnov distance to the Gaussian of the same mean and std, at the edges of the histogram's bins."""
    rank: int | None = None
    """1: the most salient neuron of its layer, by mean |x|."""
    mean_ovl: float | None = None
    """Mean overlapping coefficient with the other concepts, over the pairs that the store keeps."""
    nearest: str | None = None
    """The concept that shares the most of its values."""
    nearest_ovl: float | None = None
    """How much, 0 to 1."""
    range: TableRange


class ConceptOverlap(BaseModel):
    """How far two concepts share the neuron's values."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    concept_a: str
    concept_b: str
    tau: float
    """Half width of the ranges that range_jaccard, b_in_a and a_in_b compare."""
    ovl: float | None
    """Overlapping coefficient of the histograms, 0 (disjoint) to 1 (same); null without histograms."""
    ovl_gaussian: float | None
    """The same for the two Gaussians of their means and stds."""
    bhattacharyya: float | None
    """Bhattacharyya coefficient of the two Gaussians."""
    range_jaccard: float | None
    """Length of the intersection of the two ranges over that of their union."""
    b_in_a: float | None
    """Share of b's values inside a's range."""
    a_in_b: float | None
    """Share of a's values inside b's range."""


class NeuronCard(BaseModel):
    """Everything about one neuron."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    hook_point: str
    layer: int
    neuron: int
    store: str | None
    """The store_hash of the store that the numbers come from; null where only the range table speaks of the neuron."""
    table: str
    """The range table behind `range`."""
    unit: str
    """Which tokens were read: last_token, token, mean or cls."""
    tau: float
    concepts: list[ConceptCard]
    """By name."""
    overlaps: list[ConceptOverlap]
    """Every pair of concepts that the store keeps, by name."""


@router.get(
    "/v1/neurons/{hook_point}/{layer}/{neuron}",
    summary="What does one neuron do?",
    response_model=NeuronCard,
    responses={304: {"description": "The card is still the one of If-None-Match."}, **responses(400, 401, 404, 503)},
    dependencies=[Depends(may_read)],
)
async def neuron_card(
    request: Request,
    hook_point: Annotated[str, Path(description="mlp_post, mlp_out, attn_out, resid_post, or TransformerLens's name.")],
    layer: Annotated[int, Path(ge=0)],
    neuron: Annotated[int, Path(ge=0)],
    query: Annotated[CardQuery, Query()],
) -> Response:
    """Its moments, ranges and overlaps under every concept. Statistics that are made again are seen within seconds."""
    found = await service_of(request).cards.find(hook_point, layer, neuron, table=query.table)
    _check_concepts(query.concept, found)
    headers = {"ETag": f'"{found.version[:32]}"', "Cache-Control": "private, no-cache"}
    known = request.headers.get("if-none-match")
    if has_any(known) or has_already(known, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    card = card_of(found, tau=query.tau, concepts=query.concept)
    return Response(card.model_dump_json(), media_type="application/json", headers=headers)


def card_of(found: Found, *, tau: float | None = None, concepts: Sequence[str] = ()) -> NeuronCard:
    """The card with the ranges of this tau, of these concepts or all."""
    half_width = found.table.header.tau if tau is None else tau
    chosen = frozenset(concepts or found.concepts)
    cards, ranges = found.cards(), found.ranges()
    return NeuronCard(
        hook_point=found.hook_point,
        layer=found.layer,
        neuron=found.neuron,
        store=None if found.store is None else found.store.store_hash,
        table=found.table.id,
        unit=found.table.header.unit,
        tau=half_width,
        concepts=[
            _concept_card(concept, half_width, cards.get(concept, {}), ranges.get(concept, []))
            for concept in found.concepts
            if concept in chosen
        ],
        overlaps=[
            ConceptOverlap.model_validate(pair)
            for pair in found.pairs()
            if pair["concept_a"] in chosen or pair["concept_b"] in chosen
        ],
    )


def _concept_card(
    concept: str, tau: float, said: Mapping[str, Any], in_table: Sequence[Mapping[str, Any]]
) -> ConceptCard:
    if not said and in_table:
        said = {name: in_table[0][name] for name in ("n", "mean", "std", "mean_abs")}
    mean, std = said.get("mean"), said.get("std")
    ends = {} if mean is None or std is None else {"lower": mean - tau * std, "upper": mean + tau * std}
    return ConceptCard(**{**said, **ends, "concept": concept, "range": _table_range(in_table)})


def _table_range(rows: Sequence[Mapping[str, Any]]) -> TableRange:
    """Of a neuron's rows under one concept, ascending; none where it is not salient."""
    if not rows:
        return TableRange(salient=False)
    return TableRange(
        salient=True,
        rank=rows[0]["rank"],
        lower=rows[0]["lower"],
        upper=rows[-1]["upper"],
        pieces=[RangePiece.model_validate(row) for row in rows] if "piece" in rows[0] else None,
    )


def _check_concepts(asked: Sequence[str], found: Found) -> None:
    unknown = [concept for concept in asked if concept not in found.concepts]
    if unknown:
        raise ApiError(
            400,
            f"There is no concept {unknown[0][:80]!r} here. Concepts: {', '.join(found.concepts)}.",
            code="unknown_concept",
            param="concept",
        )
