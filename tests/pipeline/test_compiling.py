"""What is compiled ahead is what a run calls."""

import subprocess
import sys

_RUN = """
import sys
from pathlib import Path

from neuronlens import bumps, distributions, information, kernels, overlap
from neuronlens.models import load_model
from neuronlens.store import Store
from pipeline.collect import CollectSpec, collect_shard
from pipeline.compiling import have_accumulate, have_scores
from pipeline.plan import freeze, make_plan
from pipeline.statistics import compute_statistics_here
from tests.pipeline.runs import recipe

accumulate = kernels.ACCUMULATE.function
functions = (accumulate, bumps._find_runs, distributions._describe, information._inform, overlap._score_neurons)
have_accumulate()
have_scores()
assert overlap.is_compiled()
before = [list(function.signatures) for function in functions]
assert all(before), before
asked, store = recipe(Path(sys.argv[1])), Store(sys.argv[2])
plan, loaded = make_plan(asked), load_model(asked.model.id)
for shard in freeze(plan, store):
    collect_shard(loaded, CollectSpec.of(plan.description, plan.answers), store, shard)
compute_statistics_here(store, tau=2.5, memory_limit=None, on_done=print)
after = [function.signatures for function in functions]
assert after == before, (before, after)
"""


def test_compiling__leaves_a_run_nothing_to_compile(place, tmp_path):
    done = subprocess.run([sys.executable, "-c", _RUN, place, tmp_path / "store"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distributions" in done.stdout
