"""The command line. What a script reads goes to stdout, what a person reads to stderr.

neuronlens --help
"""

# `neuronlens --help` lists the commands in the order in which these modules are imported.
from neuronlens.cli import runs

# isort: split
from neuronlens.cli import ask

# isort: split
from neuronlens.cli import see

# isort: split
from neuronlens.cli import tables

# isort: split
from neuronlens.cli import evaluate

# isort: split
from neuronlens.cli import generate

# isort: split
from neuronlens.cli import diff

# isort: split
from neuronlens.cli import recut

# isort: split
from neuronlens.cli import steer

# isort: split
from neuronlens.cli import serve

# isort: split
from neuronlens.cli import deploy

# isort: split
from neuronlens.cli.app import app
from neuronlens.console import command_line

__all__ = [
    "app",
    "ask",
    "deploy",
    "diff",
    "evaluate",
    "generate",
    "main",
    "recut",
    "runs",
    "see",
    "serve",
    "steer",
    "tables",
]


def main() -> None:
    """The entry point."""
    command_line(app)
