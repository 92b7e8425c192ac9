"""neuronlens/shell.py: the prompt as a person at a terminal meets it."""

import io
import os
import pty
import re
import select
import sys
import time

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from neuronlens.lens import Lens
from neuronlens.shell import Shell, StoreCompleter, is_whole, make_session
from tests.neuronlens.test_lens import CONCEPTS, _shards
from tests.synthetic_store import add_statistics, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("shell")
    write_store(root, _shards())
    return add_statistics(root)


@pytest.fixture(scope="module")
def lens(store):
    with Lens(store) as lens:
        yield lens


@pytest.fixture(scope="module")
def completions(lens):
    completer = StoreCompleter(lens)
    return lambda text: [c.text for c in completer.get_completions(Document(text), CompleteEvent())]


def _typed(lens: Lens, keys: str, history: InMemoryHistory | None = None) -> str:
    """What is printed while these keys are typed, to the end of input."""
    console = Console(record=True, width=120, file=io.StringIO())
    with create_pipe_input() as keyboard:
        keyboard.send_text(keys + "\x04")
        session = make_session(lens, history or InMemoryHistory(), input=keyboard, output=DummyOutput())
        Shell(lens, console).run(session)
    return console.export_text()


def test_completer__knows_views_columns_macros_and_questions(completions):
    assert completions("select * from gaus") == ["gaussianity_by_layer", "gaussianity"]  # the question, the view
    assert "excess_kurtosis" in completions("select exc")
    assert completions("from neuron_card") == ["neuron_card(", "neuron_cards"]  # the macro, the question
    assert completions("from ") == []


def test_completer__gives_concepts_within_quotes_as_sql_writes_them(completions):
    assert CONCEPTS[0] == "it's joy"
    assert completions("from ar(1, 2, 'it") == ["it''s joy'"]
    assert set(completions("where concept = '")) == {c.replace("'", "''") + "'" for c in CONCEPTS}


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("select 1", True),
        ("select", False),
        ("select count(", False),
        ("select 1 frm moments;", True),
        ("selec 1", False),
        ("selec 1\n", True),
        ("selec 1;", True),
        ("separable_pairs", True),
        (".views", True),
        ("", True),
    ],
)
def test_is_whole__asks_for_more_where_a_statement_has_no_end(text, whole):
    assert is_whole(text) == whole


def test_shell__runs_queries_over_several_lines(lens, capsys):
    _typed(lens, "select\rcount(*) as n_rows from moments\r")
    assert "n_rows" in capsys.readouterr().out


def test_shell__says_what_is_wrong_and_goes_on(lens, capsys):
    errors = _typed(
        lens, "select nothing from moments\rselec 1\r\r.nonsense\rcopy moments to 'x'\rselect 41 + 1 as answer\r"
    )
    assert '"nothing" not found' in errors
    assert 'at or near "selec"' in errors
    assert "no command .nonsense. Commands: .views" in errors
    assert "only read" in errors
    assert "42" in capsys.readouterr().out


def test_shell__prints_in_the_format_asked_for(lens, capsys):
    errors = _typed(lens, ".format csv\rselect 1 as a, 0.1::float as b\r.format parquet\r")
    assert capsys.readouterr().out.splitlines() == ["a,b", "1,0.1"]
    assert "Give table, csv or json" in errors


def test_shell__lists_what_there_is(lens):
    shown = _typed(lens, ".views\r.questions\r.help\r")
    for word in ("gaussianity", "neuron_card", "separable_pairs", "another line"):
        assert word in shown


def test_shell__keeps_its_history(lens):
    history = InMemoryHistory()
    _typed(lens, "select 1\r", history)
    assert history.get_strings() == ["select 1"]


def test_sql__opens_a_prompt_on_a_terminal(store, tmp_path):
    """The command itself, on a terminal of its own: Tab completes, Ctrl-D ends with exit code 0."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="110", LINES="40", XDG_STATE_HOME=str(tmp_path))
        os.execv(sys.executable, [sys.executable, "-m", "neuronlens", "sql", store.root])

    def read_until(pattern: str) -> str:
        text, end = "", time.monotonic() + 60
        while not re.search(pattern, text):
            assert time.monotonic() < end, text
            if select.select([terminal], [], [], 1)[0]:
                text += os.read(terminal, 65536).decode(errors="replace")
        return text

    read_until(r"(?s)3 concepts, layers 0, 1 of mlp_post.*neuronlens>")
    os.write(terminal, b"select count(*) as n from mom\t")
    read_until("ents")
    os.write(terminal, b"\r")
    read_until(r"(?s)│ 60 .*neuronlens>")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "select count(*)" in (tmp_path / "neuronlens" / "sql_history").read_text()
