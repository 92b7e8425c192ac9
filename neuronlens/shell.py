"""The prompt of `neuronlens sql STORE`: history, completion of views, columns, macros and concepts, highlighting."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer
from rich.console import Console

from neuronlens.answers import answer, list_questions, list_views
from neuronlens.errors import UsageError
from neuronlens.lens import Lens
from neuronlens.query import questions

HELP = """SQL, then Enter: a whole statement runs, else another line begins (; or an empty line runs it anyway).
  describe VIEW      what each column means            .views        views and table macros
  NAME               a ready question                  .questions    the ready questions
  .format FORM       table, csv or json                .help         this
  .quit              or Ctrl-D"""


class Shell:
    """Reads queries from a person and prints answers until they leave."""

    def __init__(self, lens: Lens, console: Console) -> None:
        self._lens = lens
        self._console = console
        self._form = "table"
        self._commands: Mapping[str, Callable[[str], object]] = {
            ".views": lambda _: list_views(lens, console),
            ".questions": lambda _: list_questions(console),
            ".format": self._set_form,
            ".help": lambda _: console.print(HELP, highlight=False, markup=False),
        }

    def run(self, session: "PromptSession[str]") -> None:
        """Until `.quit` or the end of input. A wrong query says why, and the prompt comes back."""
        while True:
            try:
                text = session.prompt("neuronlens> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if text.strip() in (".quit", ".exit", "quit", "exit"):
                return
            self.do(text.strip())

    def do(self, text: str) -> None:
        """One line of a person: a command that begins with a dot, or SQL."""
        if not text:
            return
        name, _, argument = text.partition(" ")
        try:
            if name.startswith("."):
                self._command(name)(argument.strip())
            else:
                answer(self._lens, text.rstrip("; \n"), self._form, {})
        except UsageError as error:
            self._console.print(str(error), style="red", highlight=False, markup=False)
        except KeyboardInterrupt:
            self._console.print("stopped", style="dim")

    def _command(self, name: str) -> Callable[[str], object]:
        if name not in self._commands:
            raise UsageError(f"There is no command {name}. Commands: {', '.join(self._commands)}, .quit.")
        return self._commands[name]

    def _set_form(self, form: str) -> None:
        if form not in ("table", "csv", "json"):
            raise UsageError(f"{form or 'Nothing'} is no format for a terminal. Give table, csv or json.")
        self._form = form


class StoreCompleter(Completer):
    """Words that a query over this store may hold. Within quotes, only concepts."""

    def __init__(self, lens: Lens) -> None:
        views = lens.views()
        columns = {column for view in views for column in lens.columns(view)}
        self._concepts = sorted(lens.description.get("concepts", {}))
        self._words: dict[str, str] = dict.fromkeys(lens.keywords(), "")
        self._words |= dict.fromkeys(sorted(columns), "column")
        self._words |= {f"{macro}(": "macro" for macro in lens.macros()}
        self._words |= dict.fromkeys(questions(), "question")
        self._words |= dict.fromkeys(views, "view")

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        quoted = re.search(r"'([^']*)$", before) if before.count("'") % 2 else None
        if quoted:
            begun = quoted[1].lower()
            for concept in self._concepts:
                if concept.lower().startswith(begun):
                    text = concept.replace("'", "''") + "'"
                    yield Completion(text, start_position=-len(quoted[1]), display=concept, display_meta="concept")
            return
        begun = document.get_word_before_cursor(pattern=re.compile(r"[\w.]+")).lower()
        if begun:
            for word, meaning in self._words.items():
                if word.startswith(begun) and word != begun:
                    yield Completion(word, start_position=-len(begun), display_meta=meaning)


def open_shell(lens: Lens, console: Console) -> None:
    """A prompt on the terminal until the person leaves."""
    concepts = lens.description.get("concepts", {})
    console.print(
        f"{lens.store.root}: {len(concepts)} concepts, layers {_span(lens.description['layers'])} of "
        f"{', '.join(lens.description['hook_points'])}. Tab completes, .help helps, Ctrl-D ends.",
        highlight=False,
        markup=False,
    )
    Shell(lens, console).run(make_session(lens, _history()))


def make_session(lens: Lens, history: History, **options: Any) -> "PromptSession[str]":
    """A prompt over the store; `options` go to PromptSession."""
    return PromptSession(
        history=history,
        completer=StoreCompleter(lens),
        complete_while_typing=False,
        lexer=PygmentsLexer(SqlLexer),
        multiline=True,
        prompt_continuation="       ...> ",
        key_bindings=_keys(),
        **options,
    )


def is_whole(text: str) -> bool:
    """Shall Enter run it? A dot command, the name of a question, SQL that DuckDB can parse, and whatever ends with a
    semicolon or an empty line."""
    line = text.strip()
    if text.endswith("\n") or line.startswith(".") or line.endswith(";") or line in ("", "quit", "exit", *questions()):
        return True
    try:
        return bool(duckdb.extract_statements(line))
    except duckdb.Error:
        return False


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Kept between sessions where a file can be written, as XDG names the place."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "neuronlens"
    try:
        state.mkdir(parents=True, exist_ok=True)
        (state / "sql_history").touch()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(state / "sql_history"))


def _span(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    consecutive = found == list(range(found[0], found[-1] + 1))
    return f"{found[0]} to {found[-1]}" if consecutive and len(found) > 2 else ", ".join(map(str, found))
