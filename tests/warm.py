"""Commands in processes of their own that need not import the libraries first: they are forked off one that has.

    done = run_warm("neuronlens", "sql", "store", "from moments", cwd=folder)    # for python -m neuronlens sql ...

The import of torch, transformers and Ray takes a slow core 4 to 8 s, most commands no second beyond it. Memory,
streams, working folder, environment and exit code are the command's own, and it ends as an interpreter does. What a
fork cannot show is an import that the command lacks: of each command, at least one test makes a cold start.
"""

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    "datasets",
    "fastapi",
    "matplotlib.figure",
    "ray",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "neuronlens.cli",
    "neuronlens.page",
    "neuronlens.steer",
    "pipeline.driver",
    "pipeline.workers",
)

_READ_AT_IMPORT = "RAY_AUTH_MODE"
"""`ray.init` sets it in the process that calls it. A fork's Ray has read it before, and could not log in to the cluster
that it then starts."""


def run_warm(
    module: str, *args: object, cwd: Path | str | None = None, binary: bool = False, timeout: float = 300
) -> subprocess.CompletedProcess:
    """What `python -m module args` does and says."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        request = {
            "module": module,
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or Path.cwd()),
            "environment": {name: value for name, value in os.environ.items() if name != _READ_AT_IMPORT},
            **streams,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            _end(server)
            raise subprocess.TimeoutExpired([module, *request["args"]], timeout)
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        said = [Path(streams[name]).read_bytes() for name in ("stdout", "stderr")]
    out, err = said if binary else [content.decode() for content in said]
    return subprocess.CompletedProcess([module, *request["args"]], int(answer), out, err)


@cache
def _server() -> subprocess.Popen:
    """It ends with this process, whose end closes its stdin."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # read when the library is imported: no test asks the hub
    return subprocess.Popen(
        [sys.executable, "-m", "tests.warm"],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _end(server: subprocess.Popen) -> None:
    import psutil

    for process in [*psutil.Process(server.pid).children(recursive=True), server]:
        process.kill()
    server.wait()
    _server.cache_clear()


def _next_request() -> dict[str, Any]:
    """Returns in a fork, once for each line on stdin; the answer to it is the fork's exit code."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # what is there stays, so that a fork neither looks through it nor copies it
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit(0)


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["args"]


if __name__ == "__main__":
    given = _next_request()
    _become(given)
    runpy.run_module(given["module"], run_name="__main__", alter_sys=True)
