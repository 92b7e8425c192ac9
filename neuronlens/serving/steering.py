"""From a request's `intervention` to a program that the engine can run, and back to what the answer says of it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from neuronlens.errors import UsageError
from neuronlens.programs import Program, Rule, first_conflict
from neuronlens.ranges import RangeTable
from neuronlens.recent import Recent
from neuronlens.serving.catalog import Catalog
from neuronlens.serving.engine import Counts, EngineFacts
from neuronlens.serving.errors import ApiError
from neuronlens.serving.schemas import AppliedIntervention, Intervention

_KEPT_BYTES = 512 << 20
_NEED_RANGES = {
    "adaptive": "divides by the width of a range",
    "soften": "multiplies by 1 - the posterior of a range",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """An intervention that has been checked and compiled. n_neurons counts each neuron of each layer once."""

    asked: Intervention
    program: Program
    n_neurons: int
    n_bytes: int

    def changed_by_action(self, counts: Counts) -> Mapping[str, int]:
        changed: Counter[str] = Counter()
        for rule, n in zip(self.program.rules, counts.changed_by_rule, strict=True):
            changed[rule.action] += n
        return changed

    def describe(self, counts: Sequence[Counts], engine: str) -> AppliedIntervention:
        """What the answer says, over the counts of all choices."""
        by_rule = [sum(parts) for parts in zip(*(c.changed_by_rule for c in counts), strict=True)]
        return AppliedIntervention(
            id=self.program.id,
            table=self.program.table_id,
            layers=list(self.program.layers),
            hook_points=list(self.program.hook_points),
            neurons=self.n_neurons,
            phases=self.asked.phases,
            mode=self.asked.mode,
            tested=sum(c.tested for c in counts),
            changed=sum(by_rule),
            changed_by_rule=by_rule,
            engine=engine,
        )


class Steering:
    """Compiles interventions for one engine, and keeps the programs that were asked for last. Any thread may use it."""

    def __init__(self, catalog: Catalog, facts: EngineFacts, max_rules: int) -> None:
        self._catalog = catalog
        self._facts = facts
        self._max_rules = max_rules
        self._kept: Recent[tuple[str, str], Steered] = Recent(_KEPT_BYTES, lambda steered: steered.n_bytes)

    def steer(self, asked: Intervention) -> Steered:
        """The program of these rules. Raises ApiError: 400 rules that the table cannot serve or layers that the model
        does not have, 404 no such table, 409 a table of another model."""
        if len(asked.rules) > self._max_rules:
            raise _refused(f"The intervention has {len(asked.rules)} rules, at most {self._max_rules} are taken.")
        table = self._table(asked.table)
        key = (table.id, asked.model_dump_json(include={"rules", "mode"}))
        kept = self._kept.get(key)
        if kept is None:
            self._check_model(table)
            kept = _compiled(table, asked)
            self._check_sites(kept.program)
            self._kept.put(key, kept)
        if asked.conflicts == "refuse":
            _refuse_conflicts(kept.program)
        return replace(kept, asked=asked)

    def _table(self, asked: str) -> RangeTable:
        try:
            return self._catalog.get(asked)
        except ApiError as error:
            error.param = "intervention.table"
            raise

    def _check_model(self, table: RangeTable) -> None:
        made_with = table.header.model
        if made_with.config_hash != self._facts.config_hash:
            raise ApiError(
                409,
                f"Range table {table.id} was made with model {made_with.id} (config hash {made_with.config_hash}); "
                f"this server runs {self._facts.model_id} (config hash {self._facts.config_hash}). Name a table of "
                "this model: GET /v1/tables lists them.",
                code="wrong_model",
                param="intervention.table",
            )

    def _check_sites(self, program: Program) -> None:
        for site in program.sites:
            layers = self._facts.sites.get(site.hook_point, ())
            if site.layer not in layers or self._facts.widths[site.hook_point] != site.width:
                raise _refused(
                    f"Layer {site.layer} of {site.hook_point}, with {site.width} neurons, is not hooked in this model. "
                    f"It has: {', '.join(f'{name} in layers {list(at)}' for name, at in self._facts.sites.items())}."
                )


def _compiled(table: RangeTable, asked: Intervention) -> Steered:
    try:
        rules = asked.rules if asked.mode == "range" else [_whole(rule) for rule in asked.rules]
        program = Program.compile(table, rules)
    except UsageError as error:
        raise _refused(str(error)) from error
    return Steered(
        asked=asked,
        program=program,
        n_neurons=sum(int(site.named_N.sum()) for site in program.sites),
        n_bytes=sum(8 * 6 * site.lower_RN.size for site in program.sites),
    )


def _whole(rule: Rule) -> Rule:
    """The rule over every value of its neurons."""
    if rule.action in _NEED_RANGES:
        raise _refused(f'Action {rule.action} {_NEED_RANGES[rule.action]}, and mode "neuron" has none. Take dampen.')
    return Rule.parse({**rule.model_dump(), "tau": math.inf})


def _refuse_conflicts(program: Program) -> None:
    conflict = first_conflict(program)
    if conflict is not None:
        raise _refused(
            f"Rules {conflict.first} and {conflict.second} disagree: their ranges of neuron {conflict.neuron} "
            f"({conflict.hook_point}, layer {conflict.layer}) share values. Drop one, or let the earlier rule decide "
            'with "conflicts": "order".'
        )


def _refused(message: str) -> ApiError:
    return ApiError(400, message, code="bad_rule", param="intervention.rules")
