"""The evaluation stage alone: what a range table erases and spares. For nodes with GPUs.

python -m jobs.evaluate s3://bucket/run --table tbl_0123456789abcdef
"""

import typer

from neuronlens.cli.evaluate import evaluate
from neuronlens.console import command_line

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command(epilog="Example: python -m jobs.evaluate s3://bucket/run --table tbl_0123456789abcdef")(evaluate)


if __name__ == "__main__":
    command_line(app)
