"""The report as a reader's browser parses it: a tree of elements, sections and tables to ask for."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from neuronlens.page import write_report
from neuronlens.store import Store

VOID = {"meta", "br", "link", "img", "input", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        found = [self] if self.tag == tag else []
        return found + [e for child in self.children if isinstance(child, Element) for e in child.all(tag)]

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(parts).split())

    def everything(self) -> list["Element"]:
        return [self] + [e for child in self.children if isinstance(child, Element) for e in child.everything()]


class Parser(HTMLParser):
    """A tree of the page; an element that is not closed, or closed twice, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [Element("page", {})]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].children.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.stack[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag

    def handle_data(self, data):
        self.stack[-1].children.append(data)


def parsed(path: Path) -> Element:
    parser = Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    assert len(parser.stack) == 1, [element.tag for element in parser.stack]
    return parser.stack[0]


def section_of(page: Element, anchor: str) -> Element:
    [section] = [element for element in page.all("section") if element.attributes["id"] == anchor]
    return section


def tables_of(section: Element) -> list[list[dict[str, str]]]:
    """The tables as rows by their headings; of two columns with one heading, the last."""
    return [
        [
            dict(zip((th.text for th in table.all("th")), (td.text for td in row.all("td")), strict=True))
            for row in table.all("tbody")[0].all("tr")
        ]
        for table in section.all("table")
    ]


def report_on(store: Store, path: Path) -> Element:
    write_report(store, path)
    return parsed(path)


def assert_loads_nothing(page: Element) -> None:
    assert not {e.tag for e in page.everything()} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
        "form",
    }
    for element in page.everything():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            assert "url(" not in value.replace("url(#", ""), value
            if name in ("href", "xlink:href", "src", "data", "action", "poster", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), value[:60]
    styles = " ".join(style.text for style in page.all("style"))
    assert not re.search(r"@import|url\(|https?:", styles)
    [policy] = [m for m in page.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")
