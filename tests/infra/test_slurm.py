"""The scripts for Slurm. Linters see their text; how run.sbatch ends is tried on stand-ins for srun, ray and scontrol.
On a real Slurm they run by infra/slurm/try-on-one-machine.sh, which needs root."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.infra.files import INFRA, linter

SCRIPTS = sorted([*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch")])
RUN = INFRA / "slurm" / "run.sbatch"

SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
RAY = """
for argument; do case $argument in --temp-dir=*) folder=${argument#*=} ;; esac; done
mkdir -p "$folder"
echo 127.0.0.1:1 > "$folder/ray_current_cluster"
exec sleep 60
"""
SCONTROL = 'echo "$@" >> "$LOG"'
WORK = """
trap 'echo "told to stop" >> "$LOG"; exit 143' TERM
echo "at $RAY_ADDRESS by $RAY_AUTH_MODE" >> "$LOG"
for _ in $(seq 40); do sleep 0.05; done
"""


class Job:
    """run.sbatch on a Slurm of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.log, self.folder = folder / "log", folder
        for name, body in {"srun": SRUN, "ray": RAY, "scontrol": SCONTROL, "work": WORK}.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (folder / name).chmod(0o755)

    def start(self, *command: str) -> "subprocess.Popen[str]":
        slurm = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURMD_NODENAME": "here",
        }
        paths = {"PATH": f"{self.folder}:{os.environ['PATH']}", "LOG": str(self.log)}
        return subprocess.Popen(
            ["bash", RUN, *command], env=os.environ | slurm | paths, stdout=subprocess.PIPE, text=True
        )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for_line(self) -> None:
        deadline = time.monotonic() + 20
        while not self.lines() and time.monotonic() < deadline:
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script__parses_and_says_how_to_call_it(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert re.search(rf"^# .*{re.escape(script.name)}", script.read_text(), re.MULTILINE)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script__passes_shellcheck(script):
    checked = subprocess.run([linter("shellcheck"), script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_run_sbatch__asks_slurm_for_a_signal_and_to_be_queued_again():
    options = re.findall(r"^#SBATCH (\S+)", RUN.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@60", "--requeue", "--open-mode=append", "--no-kill"} <= set(options)


def test_run_sbatch__passes_on_the_exit_code_of_the_command(job):
    process = job.start("bash", "-c", "exit 3")
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert job.lines() == []


def test_run_sbatch__stops_the_command_once_and_queues_itself_again_before_the_time_limit(job):
    process = job.start("work")
    job.wait_for_line()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert job.lines() == ["at 127.0.0.1:1 by token", "told to stop", f"requeue {os.getpid()}"]
    assert process.returncode == 143


def test_run_sbatch__does_not_come_back_when_it_is_cancelled(job):
    process = job.start("work")
    job.wait_for_line()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert job.lines() == ["at 127.0.0.1:1 by token", "told to stop"]
    assert process.returncode == 143


def test_run_sbatch__is_done_when_the_command_ends_well_in_spite_of_the_signal(job):
    process = job.start("bash", "-c", 'trap "exit 0" TERM; echo ready >> "$LOG"; while true; do sleep 0.05; done')
    job.wait_for_line()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert job.lines() == ["ready"]
    assert process.returncode == 0


def test_run_sbatch__leaves_nothing_behind(job):
    job.start("true").communicate(timeout=30)
    assert list(Path("/tmp").glob(f"neuronlens-{os.getpid()}-*")) == []
