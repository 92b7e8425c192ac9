"""Names from other people's data, made fit for a figure or a terminal."""

import unicodedata

from rich.cells import cell_len, set_cell_size

LABEL_CELLS = 15


def printable(text: str) -> str:
    """The text in one line, with a dot for every character that has no shape of its own."""
    return "".join("·" if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in text)


def short(text: str, cells: int = LABEL_CELLS) -> str:
    """The text in at most so many columns, an ellipsis in place of its middle where it was cut: names often differ in
    their ends. A wide character (CJK) counts for two."""
    text = printable(text)
    if cell_len(text) <= cells:
        return text
    head, tail = set_cell_size(text, cells // 2), ""
    for character in reversed(text):
        if cell_len(head + "…" + character + tail) > cells:
            break
        tail = character + tail
    return f"{head}…{tail}"
