"""The report's page: its parts as data, and the one HTML file that they become.

    html = render(Page(title="...", sections=(...)))

The file loads nothing: styles and figures are in it, there is no script, and its content security policy forbids any.
Every text is escaped by the template; only figures that we drew ourselves go in as they are.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronlens.canvas import inline_svg
from neuronlens.query import read_query

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure as an <svg> element, what one sees on it, and lines for those who want to know more (`more`)."""

    svg: str
    caption: str
    more_title: str = ""
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text. `numbers` are the columns that stand to the right, `texts` those of whole sentences, which get room
    to be read; `colours` paint a mark before a row; a table that `wraps` is never wider than the page, others scroll in
    a box of their own."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    texts: frozenset[int] = frozenset()
    colours: tuple[str, ...] = ()
    caption: str = ""
    wraps: bool = False

    def without_empty_columns(self) -> "Table":
        """The same, without the columns in which nothing was measured: no cell but dashes and blanks."""
        kept = [i for i in range(len(self.columns)) if any(row[i] not in ("–", "") for row in self.rows)]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=tuple(tuple(row[i] for i in kept) for row in self.rows),
            numbers=frozenset(place for place, i in enumerate(kept) if i in self.numbers),
            texts=frozenset(place for place, i in enumerate(kept) if i in self.texts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A file of sql/, the parameters with which it gave the numbers, and the command that gives them again."""

    name: str
    params: str = ""

    @property
    def command(self) -> str:
        return f"neuronlens sql STORE {self.name}{self.params}"

    @property
    def text(self) -> str:
        return read_query(self.name).strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a section: what it says, its figures, its table, its queries. All may be left out."""

    title: str = ""
    lead: str = ""
    drawings: tuple[Drawing, ...] = ()
    table: Table | None = None
    note: str = ""
    queries: tuple[Query, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A chapter of the page; `anchor` is its place in the address."""

    anchor: str
    title: str
    lead: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number at the top of the page, and what it is."""

    number: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The whole report. `warnings` are what makes its numbers doubtful, `notes` what it could not show."""

    title: str
    summary: str
    sections: tuple[Section, ...]
    footer: str
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def n_drawings(self) -> int:
        return sum(len(part.drawings) for section in self.sections for part in section.parts)


@dataclass(slots=True)
class Draughtsman:
    """Turns figures into drawings, each with a name of its own."""

    _n_drawn: int = field(default=0)

    def draw(self, figure: "Figure", caption: str, **more: Any) -> Drawing:
        self._n_drawn += 1
        title = figure.texts[0].get_text() if figure.texts else ""
        svg = inline_svg(figure, name=f"figure-{self._n_drawn}", description=f"{title}. {caption}")
        return Drawing(svg=svg, caption=caption, **more)


def render(page: Page) -> str:
    """The page as HTML: one self-contained document."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["drawn"] = Markup  # only for what inline_svg made
    return environment.get_template("report.html.j2").render(page=page)
