"""What the routes of range tables answer with, as their OpenAPI schema says it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from neuronlens.ranges import TableHeader


class TableSummary(BaseModel):
    """A range table. `created` is when it came to the server, in seconds since 1970; `header` is its table.json."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["table"] = "table"
    id: str
    created: int
    header: TableHeader


class TableList(BaseModel):
    """All range tables, newest first."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"] = "list"
    data: list[TableSummary]


class TableDetail(TableSummary):
    """A range table and what it has ranges for, sorted."""

    concepts: list[str]
    layers: list[int]
    hook_points: list[str]


class ConceptSummary(BaseModel):
    """What a table holds of one concept. A range that is several pieces counts once."""

    model_config = ConfigDict(extra="forbid")

    concept: str
    ranges: int
    layers: list[int]
    hook_points: list[str]


class ConceptList(BaseModel):
    """The concepts of a table, sorted by name."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"] = "list"
    table: str
    data: list[ConceptSummary]


class RangeRow(BaseModel):
    """The range of one neuron under one concept: a row of ranges.parquet (docs/store-format.md).

    JSON has no infinity: `lower` is null where nothing bounds the range from below, `upper` where nothing does from
    above. Arrow and Parquet hold the infinity itself.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    hook_point: str
    layer: int
    neuron: int
    concept: str
    n: int
    mean: float
    std: float
    mean_abs: float
    salience: float
    rank: int
    lower: float | None
    upper: float | None


class RangePiece(RangeRow):
    """A row of a table of any method but paper, where the range of a neuron may be several intervals."""

    piece: int
    """The number of the interval, ascending from 0."""
    posterior: float
    """The probability of the concept, given that the value lies in the interval."""
    mean_others: float
    """The mean over the values of all other concepts."""


class RangeList(BaseModel):
    """Rows of a table, in its order: by hook point, layer, concept, rank and piece. `rows` is how many."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"] = "list"
    table: str
    rows: int
    data: list[RangeRow | RangePiece]
