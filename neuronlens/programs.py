"""Rules, and the program that they compile to: per layer and neuron, which values are replaced, and by what.

    program = Program.compile(table, [Rule(concept="joy", action="dampen", factor=0.5)])

A rule looks at the value that the model computed. Where rules overlap, the FIRST rule in the given order whose range
contains the value decides, and no later rule sees the replacement. A range may be a union of pieces that share no
value; the rule then has as many rows in the arrays. A program holds plain numpy arrays in float64; a backend
(`neuronlens.interventions`, or vLLM) rounds the bounds to its activations' dtype and runs the same arithmetic.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuronlens.errors import UsageError
from neuronlens.ranges import RangeTable

Action = Literal["zero", "mean", "others", "dampen", "adaptive", "set", "soften"]

_MEANS = {"mean": "mean", "others": "mean_others"}
"""The column of the table that such an action puts in place of a value."""
_NEED_HISTOGRAMS = {
    "soften": "multiplies by 1 - the posterior of each range",
    "others": "puts the mean of the other concepts in place of a value",
}
"""What an action takes that tables of method paper do not hold."""
ADAPTIVE_FACTOR = 0.125
"""The factor of the paper's dampening."""


class Edit(BaseModel):
    """What a rule does, and where, for whichever concept.

    Inside the range, x becomes: zero: 0; mean: the concept's mean; others: the mean of all other concepts; set:
    `value`; dampen: `factor` * x; adaptive: x * `factor` * |x - centre| / half width, which spares values at the edge
    and is 0 at the centre; soften: x * (1 - posterior), the probability that the value is not the concept's. Of a range
    with pieces, adaptive takes the centre and half width of the piece that holds x, soften its posterior.

    layers and hook_points: None means all of the table's. tau: None means the table's own bounds, a number means
    mean -+ tau * std whatever the pieces, inf means every value of the neuron. top_fraction: None means all of the
    table's neurons.
    """

    # inf must survive JSON: as null it would mean the table's own tau.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    action: Action = "zero"
    factor: float | None = Field(default=None, ge=0, le=1)
    value: float | None = Field(default=None, allow_inf_nan=False)
    layers: tuple[int, ...] | None = None
    hook_points: tuple[str, ...] | None = None
    tau: float | None = Field(default=None, gt=0)
    top_fraction: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _fields_fit_the_action(self) -> "Edit":
        if self.action == "dampen" and self.factor is None:
            raise ValueError("action dampen multiplies by factor, and no factor was given; give one from 0 to 1")
        if self.factor is not None and self.action not in ("dampen", "adaptive"):
            raise ValueError(
                f"action {self.action} takes no factor, found {self.factor}; only dampen and adaptive scale"
            )
        if self.action == "set" and self.value is None:
            raise ValueError("action set puts value in place of the activation, and no value was given; give a number")
        if self.value is not None and self.action != "set":
            raise ValueError(f"action {self.action} takes no value, found {self.value}; only set does")
        if self.action == "adaptive" and self.tau == math.inf:
            raise ValueError(
                "action adaptive divides by half the range's width, and with tau inf there is none; use dampen"
            )
        if self.action == "soften" and self.tau is not None:
            raise ValueError(
                f"action soften multiplies by 1 - the posterior of the table's own ranges, and tau {self.tau:g} makes "
                "others, which have none; leave tau out, or use dampen"
            )
        for name in ("layers", "hook_points"):
            if getattr(self, name) == ():
                raise ValueError(
                    f"{name} is empty, so the rule would change nothing; name some, or leave it out for all"
                )
        return self


class Rule(Edit):
    """An edit of the values that belong to one concept.

    neurons: None means all that the table has of the concept, else these numbers within the named layers.
    """

    concept: str
    neurons: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @model_validator(mode="after")
    def _neurons_have_a_layer(self) -> "Rule":
        if self.neurons == ():
            raise ValueError("neurons is empty, so the rule would change nothing; name some, or leave it out for all")
        if self.neurons is not None and self.layers is None:
            raise ValueError("neurons are numbered within a layer, and no layer was given; give layers too")
        return self

    @classmethod
    def of(cls, edit: Edit, concept: str) -> "Rule":
        return cls(concept=concept, **edit.model_dump())

    @classmethod
    def parse(cls, rule: "Rule | Mapping[str, Any]") -> "Rule":
        """The rule, from a mapping of its fields too. Raises UsageError that names the field and says why."""
        if isinstance(rule, Rule):
            return rule
        try:
            return cls.model_validate(rule)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'rule'}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors()
            )
            raise UsageError(
                f"The rule {dict(rule)} is not right: {faults}. A rule has the fields {', '.join(cls.model_fields)}; "
                f"the actions are {', '.join(get_args(Action))}."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteProgram:
    """What happens at one (hook point, layer) with N neurons: R rows, one for each piece of each rule that names
    neurons there. Arrays [R, N] are float64.

    rule_R says which of the program's rules a row belongs to, in the rules' order; the k-th row of a rule has the k-th
    piece of every neuron that has so many, and where ranges are single intervals each rule has one row.
    x is inside row r where lower_RN <= x <= upper_RN, which NaN never is; a neuron that the row does not name has the
    bounds (inf, -inf), so nothing is inside. Inside, x becomes x * (a_RN + g_RN * |x - centre_RN|) + b_RN, by the first
    row that it is inside of. Rows with constant_R replace x by b_RN alone (their a and g are 0), so that an infinite x
    cannot become NaN. g_RN and centre_RN are None where no rule is adaptive.
    """

    hook_point: str
    layer: int
    rule_R: np.ndarray
    lower_RN: np.ndarray
    upper_RN: np.ndarray
    a_RN: np.ndarray
    b_RN: np.ndarray
    g_RN: np.ndarray | None
    centre_RN: np.ndarray | None

    @property
    def width(self) -> int:
        return int(self.lower_RN.shape[1])

    @property
    def constant_R(self) -> np.ndarray:
        """bool [R]: True where the row's replacement does not depend on x."""
        slope_RN = np.abs(self.a_RN) if self.g_RN is None else np.abs(self.a_RN) + np.abs(self.g_RN)
        return slope_RN.max(axis=1) == 0

    @property
    def named_N(self) -> np.ndarray:
        """bool [N]: True where a rule names the neuron."""
        return np.any(self.lower_RN <= self.upper_RN, axis=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """The compiled form of (table, rules). Sites are ordered by hook point and layer; each has at least one rule."""

    id: str
    table_id: str
    config_hash: str
    rules: tuple[Rule, ...]
    sites: tuple[SiteProgram, ...]

    @classmethod
    def compile(cls, table: RangeTable, rules: Sequence[Rule | Mapping[str, Any]]) -> "Program":
        """The program of these rules, in this order of precedence; widths come from the table's header.

        The id is `prg_` + a hash of the arrays: rules that come to the same thing have the same id. Raises UsageError
        for no rule at all, and for a concept, layer, hook point or top_fraction that the table does not hold.
        """
        parsed = tuple(Rule.parse(rule) for rule in rules)
        if not parsed:
            raise UsageError("No rule was given, so nothing would change. Give one, such as {'concept': 'joy'}.")
        parts: dict[tuple[str, int], list[SiteProgram]] = {}
        for i, rule in enumerate(parsed):
            for part in _compile_rule(table, rule, i):
                parts.setdefault((part.hook_point, part.layer), []).append(part)
        sites = tuple(_stack(parts[key]) for key in sorted(parts))
        return cls(
            id=_content_id(sites),
            table_id=table.id,
            config_hash=table.header.model.config_hash,
            rules=parsed,
            sites=sites,
        )

    @property
    def n_bytes(self) -> int:
        """What its arrays take."""
        arrays = ("lower_RN", "upper_RN", "a_RN", "b_RN", "g_RN", "centre_RN")
        found = [getattr(site, name) for site in self.sites for name in arrays]
        return sum(array.nbytes for array in found if array is not None)

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(sorted({site.hook_point for site in self.sites}))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({site.layer for site in self.sites}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two rules, by their places among the program's, whose ranges of one neuron share values."""

    hook_point: str
    layer: int
    neuron: int
    first: int
    second: int


def first_conflict(program: Program) -> Conflict | None:
    """Where two rules disagree over a value, and so their order decides; None where no value is in two ranges.

    The pieces of one rule share no value, so that rows that do are of two rules.
    """
    for site in program.sites:
        for late in range(1, len(site.rule_R)):
            lower_EN = np.maximum(site.lower_RN[:late], site.lower_RN[late])
            shared_EN = lower_EN <= np.minimum(site.upper_RN[:late], site.upper_RN[late])
            if shared_EN.any():
                early, neuron = np.argwhere(shared_EN)[0].tolist()
                first, second = int(site.rule_R[early]), int(site.rule_R[late])
                return Conflict(hook_point=site.hook_point, layer=site.layer, neuron=neuron, first=first, second=second)
    return None


def _compile_rule(table: RangeTable, rule: Rule, place: int) -> list[SiteProgram]:
    """The arrays [pieces, N] of one rule, the program's number `place`, at every site where it names a neuron."""
    if rule.action in _NEED_HISTOGRAMS and not table.has_pieces:
        raise UsageError(
            f"Action {rule.action} {_NEED_HISTOGRAMS[rule.action]}, and range table {table.id} has none: its method is "
            "paper. Make one that has: neuronlens ranges STORE --method likelihood_ratio"
        )
    rows = table.select(
        rule.concept,
        hook_points=rule.hook_points,
        layers=rule.layers,
        neurons=rule.neurons,
        top_fraction=rule.top_fraction,
    )
    if table.has_pieces and rule.tau is not None:
        rows = rows.filter(pc.equal(rows["piece"], 0))  # mean -+ tau * std is one range, in place of all pieces
    parts = []
    for hook_point in sorted(pc.unique(rows["hook_point"]).to_pylist()):
        at_hook_point = rows.filter(pc.equal(rows["hook_point"], hook_point))
        for layer in sorted(pc.unique(at_hook_point["layer"]).to_pylist()):
            here = at_hook_point.filter(pc.equal(at_hook_point["layer"], layer))
            parts.append(_compile_site(rule, place, hook_point, layer, table.header.widths[hook_point], here))
    if not parts:
        raise UsageError(
            f"Range table {table.id} has no neuron for the rule {rule.model_dump(exclude_defaults=True)}. Leave out "
            f"layers, hook_points and top_fraction to take all that it has of {rule.concept}."
        )
    return parts


def _compile_site(rule: Rule, place: int, hook_point: str, layer: int, width: int, rows: pa.Table) -> SiteProgram:
    neuron = rows["neuron"].to_numpy()
    piece = rows["piece"].to_numpy() if "piece" in rows.column_names else np.zeros(len(neuron), np.int16)
    n_pieces = int(piece.max()) + 1

    def spread(values: np.ndarray | float, elsewhere: float = 0.0) -> np.ndarray:
        row_RN = np.full((n_pieces, width), elsewhere)
        row_RN[piece, neuron] = values
        return row_RN

    lower, upper = _bounds(rule, rows)
    a, b = _affine(rule, rows)
    g, centre = _slope(rule, lower, upper) if rule.action == "adaptive" else (None, None)
    return SiteProgram(
        hook_point=hook_point,
        layer=layer,
        rule_R=np.full(n_pieces, place),
        lower_RN=spread(lower, np.inf),
        upper_RN=spread(upper, -np.inf),
        a_RN=spread(a),
        b_RN=spread(b),
        g_RN=None if g is None else spread(g),
        centre_RN=None if centre is None else spread(centre),
    )


def _bounds(rule: Rule, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The interval of each row under this rule."""
    if rule.tau is None:
        return rows["lower"].to_numpy(), rows["upper"].to_numpy()
    # inf * 0 is NaN: a constant neuron too is taken whole.
    reach = np.full(rows.num_rows, np.inf) if rule.tau == math.inf else rule.tau * rows["std"].to_numpy()
    mean = rows["mean"].to_numpy()
    return mean - reach, mean + reach


def _affine(rule: Rule, rows: pa.Table) -> tuple[np.ndarray | float, np.ndarray | float]:
    """a and b of each row's replacement a * x + b."""
    if rule.action == "soften":
        return 1 - rows["posterior"].to_numpy(), 0.0
    if rule.action == "dampen" and rule.factor is not None:
        return rule.factor, 0.0
    if rule.action == "set" and rule.value is not None:
        return 0.0, rule.value
    if rule.action in _MEANS:
        return 0.0, rows[_MEANS[rule.action]].to_numpy()
    return 0.0, 0.0


def _slope(rule: Rule, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """g = factor / half width, and the centre, of each row of an adaptive rule."""
    half_width = (upper - lower) / 2
    if not np.isfinite(half_width).all():
        raise UsageError(
            f"The range of a neuron of concept {rule.concept} has no end, and action adaptive divides by its width. "
            "Give the rule a tau, or take action dampen."
        )
    # A range with no width in float32 has only its centre inside, where the formula says 0.
    wide = half_width > np.finfo(np.float32).tiny
    factor = ADAPTIVE_FACTOR if rule.factor is None else rule.factor
    return np.divide(factor, half_width, out=np.zeros_like(half_width), where=wide), (lower + upper) / 2


def _stack(parts: list[SiteProgram]) -> SiteProgram:
    """The rules of one site, in order of precedence."""
    adaptive = any(part.g_RN is not None for part in parts)

    def stacked(name: str) -> np.ndarray:
        found = [getattr(part, name) for part in parts]
        return np.concatenate(
            [np.zeros_like(part.a_RN) if x is None else x for part, x in zip(parts, found, strict=True)]
        )

    return SiteProgram(
        hook_point=parts[0].hook_point,
        layer=parts[0].layer,
        rule_R=np.concatenate([part.rule_R for part in parts]),
        lower_RN=stacked("lower_RN"),
        upper_RN=stacked("upper_RN"),
        a_RN=stacked("a_RN"),
        b_RN=stacked("b_RN"),
        g_RN=stacked("g_RN") if adaptive else None,
        centre_RN=stacked("centre_RN") if adaptive else None,
    )


def _content_id(sites: Sequence[SiteProgram]) -> str:
    digest = hashlib.sha256()
    for site in sites:
        arrays = [site.lower_RN, site.upper_RN, site.a_RN, site.b_RN]
        arrays += [] if site.g_RN is None or site.centre_RN is None else [site.g_RN, site.centre_RN]
        digest.update(json.dumps([site.hook_point, site.layer, len(arrays), *site.lower_RN.shape]).encode())
        for array in arrays:
            digest.update(array.astype("<f8").tobytes())
    return f"prg_{digest.hexdigest()[:16]}"
