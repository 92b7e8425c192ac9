"""A sweep: the settings under which an evaluation is repeated, as a grid of what may vary.

    grid = parse_grid(["tau=0.5:4:0.5", "layers=each,all"])
    settings = settings_of(grid, Setting.of(table), layers=table.layers, hook_points=table.hook_points)

Numbers are start:stop:step, with both ends and in exact decimals, or lists with commas; names are lists. `each` stands
for every layer (or hook point) in turn, `all` for all at once, 0+5 for two at once.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, get_args

from neuronlens.errors import UsageError
from neuronlens.measure import Positions
from neuronlens.programs import Edit
from neuronlens.ranges import PAPER, RangeTable
from neuronlens.recipe import CHOOSY_METHODS, RANGE_OPTIONS, RangesSection, parse_section

NUMBERS = ("tau", "top_fraction", *RANGE_OPTIONS, "factor", "value")
NAMES = ("salience", "method", "action", "positions")
PLACES = ("layers", "hook_points")
KEYS = (*NUMBERS, *PLACES, *NAMES)

EACH, ALL = "each", "all"
_EXACT = "budget"
"""The method whose neurons depend on each other: a smaller top_fraction is no part of a larger table."""

Grid = Mapping[str, tuple[Any, ...]]
"""Key of KEYS -> its values in the order given; of PLACES, "each", "all" or a tuple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One point of the grid: which ranges, what is done inside them, and where.

    edit: tau is None where the table's own bounds count, top_fraction where all of its neurons do. options: those of
    the method, by name.
    """

    edit: Edit
    salience: str
    method: str = PAPER
    options: tuple[tuple[str, float], ...] = ()
    positions: Positions = "all"

    @classmethod
    def of(cls, table: RangeTable, edit: Edit | None = None) -> "Setting":
        """The table as it is, under this edit."""
        header = table.header
        return cls(
            edit=edit or Edit(),
            salience=header.salience,
            method=header.method,
            options=tuple(sorted(header.options.items())),
        )

    def columns(self, table: RangeTable) -> dict[str, Any]:
        """What a row says about its setting. tau is None where the ranges are not mean -+ tau * std; layers and
        hook_points are None for all of the table's."""
        edit, header = self.edit, table.header
        tau = header.tau if edit.tau is None and self.method == PAPER else edit.tau
        return {
            "table_id": table.id,
            "tau": tau,
            "top_fraction": header.top_fraction if edit.top_fraction is None else edit.top_fraction,
            "layers": None if edit.layers is None else list(edit.layers),
            "hook_points": None if edit.hook_points is None else list(edit.hook_points),
            "salience": self.salience,
            "method": self.method,
            **{option: dict(self.options).get(option) for option in RANGE_OPTIONS},
            "action": edit.action,
            "factor": edit.factor,
            "value": edit.value,
            "positions": self.positions,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTable:
    """What a range table has to be for some settings."""

    salience: str
    method: str
    options: tuple[tuple[str, float], ...]
    top_fraction: float

    def is_served_by(self, table: RangeTable) -> bool:
        header = table.header
        made = (header.salience, header.method, tuple(sorted(header.options.items())))
        if made != (self.salience, self.method, self.options):
            return False
        has = header.top_fraction
        return has == self.top_fraction or (has > self.top_fraction and self.method != _EXACT)


def parse_grid(sweeps: Sequence[str]) -> Grid:
    """The grid of `key=values` strings. Raises UsageError, which says what could stand there."""
    grid: dict[str, tuple[Any, ...]] = {}
    for sweep in sweeps:
        key, separator, text = sweep.partition("=")
        key = key.strip()
        if not separator or key not in KEYS or not text.strip():
            raise UsageError(
                f"--sweep {sweep!r} is not key=values, for example tau=0.5:4:0.5 or layers=each,all. "
                f"The keys: {', '.join(KEYS)}."
            )
        if key in grid:
            raise UsageError(f"--sweep gives {key} twice. Give all of its values at once: --sweep {key}=...,...")
        parts = [part.strip() for part in text.split(",")]
        values = [value for part in parts for value in _READERS[key](key, part)]
        grid[key] = tuple(dict.fromkeys(values))
    return grid


def settings_of(
    grid: Grid, base: Setting, table: RangeTable, *, layers: Sequence[int], hook_points: Sequence[str]
) -> list[Setting]:
    """Every point of the grid, the first key varying slowest; what the grid does not say is as in `base`, on `table`.

    layers, hook_points: what there is, for `each`. A key that does not apply at a point (tau where the method is not
    paper, factor where nothing is scaled) leaves it as it is, and points that come to the same are one setting. A
    number of one method alone (tau: paper; penalty: likelihood_ratio) asks for that method where the grid names none. A
    method that chooses neurons by itself chooses among all, unless the grid says top_fraction.

    Raises UsageError for a point that cannot be, and for a key that applies nowhere.
    """
    grid = _with_methods(grid)
    axes = [_each(key, values, layers if key == "layers" else hook_points) for key, values in grid.items()]
    applied: set[str] = set()
    settings = [
        _setting(dict(zip(grid, point, strict=True)), base, table, applied) for point in itertools.product(*axes)
    ]
    idle = [key for key in grid if key not in applied]
    if idle:
        raise UsageError(
            f"--sweep {idle[0]} changes nothing at any point of the grid: {_NEEDS.get(idle[0], 'it does not apply')}."
        )
    return list(dict.fromkeys(settings))


def _with_methods(grid: Grid) -> Grid:
    """The grid, with the methods whose numbers it has where it names none."""
    methods = tuple(dict.fromkeys(_METHOD_OF[key] for key in grid if key in _METHOD_OF))
    return grid if "method" in grid or not methods else {"method": methods, **grid}


def wanted_tables(settings: Sequence[Setting], table: RangeTable) -> list[WantedTable]:
    """The table that each setting needs; settings whose tables differ only in size share the largest."""

    def key(setting: Setting) -> tuple[Any, ...]:
        exact = _fraction(setting, table) if setting.method == _EXACT else None
        return setting.salience, setting.method, setting.options, exact

    largest: dict[tuple[Any, ...], float] = {}
    for setting in settings:
        largest[key(setting)] = max(largest.get(key(setting), 0.0), _fraction(setting, table))
    return [
        WantedTable(salience=s.salience, method=s.method, options=s.options, top_fraction=largest[key(s)])
        for s in settings
    ]


def _fraction(setting: Setting, table: RangeTable) -> float:
    """The share of neurons that the setting uses of `table`, or would use."""
    fraction = setting.edit.top_fraction
    return table.header.top_fraction if fraction is None else fraction


_METHOD_OF = {"tau": PAPER, **{option: method for option, (method, _) in RANGE_OPTIONS.items()}}
_NEEDS = {
    "factor": "only the actions dampen and adaptive have it",
    "value": "only the action set has it",
    **{key: f"only method {method} has it" for key, method in _METHOD_OF.items()},
}


def _setting(point: Mapping[str, Any], base: Setting, table: RangeTable, applied: set[str]) -> Setting:
    """The setting of one point; the keys that have an effect there go into `applied`."""
    ranges, tau = _ranges(point, base, table)
    action = point.get("action", base.edit.action)
    keys = [*PLACES, *(["factor"] if action in ("dampen", "adaptive") else []), *(["value"] if action == "set" else [])]
    edit = {key: point.get(key, getattr(base.edit, key)) for key in keys}
    edit |= {"action": action, "tau": tau, "top_fraction": ranges.top_fraction}
    applied |= point.keys() & {*NAMES, *keys, *ranges.options, "top_fraction", *(["tau"] if tau is not None else [])}
    positions = point.get("positions", base.positions)
    if positions not in get_args(Positions):
        raise UsageError(f"--sweep positions has {positions!r}; expected {' or '.join(get_args(Positions))}.")
    asked = {key: value for key, value in edit.items() if value is not None and value != ALL}
    return Setting(
        edit=parse_section(Edit, asked, origin="--sweep"),
        salience=ranges.salience,
        method=ranges.method,
        options=tuple(sorted(ranges.options.items())),
        positions=positions,
    )


def _ranges(point: Mapping[str, Any], base: Setting, table: RangeTable) -> tuple[RangesSection, float | None]:
    """How the ranges of a point are made, and the tau that its rules have: None where the table's own bounds count."""
    method = point.get("method", base.method)
    asked = {"method": method, "salience": point.get("salience", base.salience)}
    asked |= dict(base.options) if method == base.method else {}
    asked |= {key: point[key] for key, (owner, _) in RANGE_OPTIONS.items() if key in point and owner == method}
    if "top_fraction" in point:
        asked["top_fraction"] = point["top_fraction"]
    elif (method in CHOOSY_METHODS) == (base.method in CHOOSY_METHODS):
        asked["top_fraction"] = _fraction(base, table)
    tau = None
    if method == PAPER:
        tau = point.get("tau", table.header.tau if base.edit.tau is None else base.edit.tau)
    ranges = parse_section(RangesSection, asked | ({} if tau is None else {"tau": tau}), origin="--sweep")
    return ranges, tau


def _each(key: str, values: Sequence[Any], there: Sequence[Any]) -> list[Any]:
    """The values, `each` replaced by what there is."""
    return [one for value in values for one in ([(place,) for place in there] if value == EACH else [value])]


def _numbers(key: str, text: str) -> list[float]:
    ends = [_decimal(key, part) for part in text.split(":")]
    if len(ends) == 1:
        return [float(ends[0])]
    if len(ends) != 3 or ends[2] == 0 or (ends[1] - ends[0]) / ends[2] < 0:
        raise UsageError(
            f"--sweep {key} has {text!r}; expected a number, or start:stop:step with a step that leads from start to "
            f"stop, such as {key}=0.5:4:0.5."
        )
    start, stop, step = ends
    return [float(start + i * step) for i in range(int((stop - start) / step) + 1)]


def _decimal(key: str, text: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise UsageError(f"--sweep {key} has {text!r}; expected a number, or numbers as start:stop:step.")
    return number


def _layers(key: str, text: str) -> list[Any]:
    if text in (EACH, ALL):
        return [text]
    parts = [part.strip() for part in text.split("+")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--sweep {key} has {text!r}; expected each, all, or numbers, those at once joined by +: 0+5.")
    return [tuple(sorted({int(part) for part in parts}))]


def _hook_points(key: str, text: str) -> list[Any]:
    return [text] if text in (EACH, ALL) else [tuple(sorted({part.strip() for part in text.split("+")}))]


def _names(key: str, text: str) -> list[str]:
    return [text]


_READERS: Mapping[str, Callable[[str, str], list[Any]]] = {
    **dict.fromkeys(NUMBERS, _numbers),
    **dict.fromkeys(NAMES, _names),
    "layers": _layers,
    "hook_points": _hook_points,
}
