"""Backend vllm, as far as no vLLM is needed: what is refused, the store's name, where engines go. What they collect is
held to transformers in tests/vllm."""

import pytest
import ray

from neuronlens.errors import UsageError
from neuronlens.recipe import ComputeSection
from neuronlens.store import Store
from pipeline import vllm_worker
from pipeline.backends import tensor_parallel_of
from pipeline.collect import CollectSpec
from pipeline.plan import freeze, make_plan
from pipeline.pool import here
from pipeline.vllm_worker import engine_starter
from pipeline.workers import Layout, Spares, WorkerSpec, choose_layout
from tests.pipeline.runs import recipe
from tests.tiny_models import save_tiny


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("pipeline.backends.vllm_is_installed", lambda: True)


def vllm_recipe(place, **sections):
    sections.setdefault("model", {})["backend"] = "vllm"
    return recipe(place, **sections)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"collect": {"unit": "mean"}}, "collect.unit is mean.* Take last_token or token"),
        ({"collect": {"unit": "cls"}}, "collect.unit is cls"),
        ({"collect": {"raw": "all"}}, "collect.raw is all.* Set it to none or auto"),
        ({"collect": {"raw": {"layers": [0]}}}, "collect.raw is some layers or neurons"),
        ({"collect": {"predictions": True}}, "collect.predictions is true.* Set it to false or auto"),
        ({"data": {"only_correct": True}}, "data.only_correct is true.* Set data.only_correct to false"),
        ({"ranges": {"salience": "probe"}}, "ranges.salience is probe.* Take another method"),
        (
            {"compute": {"tensor_parallel": 2, "gpus_per_worker": 4}},
            r"tensor_parallel is 2 and compute.gpus_per_worker 4; .*Set both to 2",
        ),
        ({"compute": {"gpus_per_worker": 1.5}}, "gpus_per_worker is 1.5; .* 1 or 2"),
    ],
)
def test_plan__refuses_what_vllm_cannot_do(place, installed, sections, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_plan(vllm_recipe(place, **sections))


def test_plan__refuses_vllm_where_it_is_not_installed(place, monkeypatch):
    monkeypatch.setattr("pipeline.backends.vllm_is_installed", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'neuronlens\[vllm\]'.* infra/install-vllm-cpu.sh"):
        make_plan(vllm_recipe(place))


@pytest.mark.parametrize(("architecture", "head"), [("bert", "lm"), ("llama", "classifier"), ("gpt2", "none")])
def test_plan__refuses_vllm_for_what_is_no_decoder(place, installed, tmp_path, architecture, head):
    folder = save_tiny(tmp_path / "model", architecture, head=head)
    with pytest.raises(UsageError, match="only decoders with their language model's head"):
        make_plan(vllm_recipe(place, model={"id": str(folder)}, data={"answers": None}))


def test_plan__refuses_the_papers_choice_of_samples_in_vllm(place, installed, tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    paper = {"model": {"id": str(folder), "backend": "vllm"}}
    asked = recipe(place, **paper).model_copy(update={"preset": "paper"})
    with pytest.raises(UsageError, match=r"preset paper keeps .* Set data.only_correct to false"):
        make_plan(asked)


def test_plan__refuses_ranks_in_transformers(place):
    with pytest.raises(UsageError, match=r"compute.tensor_parallel is 2, which transformers cannot do"):
        make_plan(recipe(place, compute={"tensor_parallel": 2}))


def test_plan__takes_auto_for_what_vllm_can_do(place, installed):
    plan = make_plan(vllm_recipe(place))
    assert plan.description["backend"] == "vllm"
    assert plan.description["raw"]["policy"] == "none"
    assert not plan.description["predictions"]
    assert "vllm" in plan.description["versions"]
    assert plan.longest_prompt == max(len(sample.token_ids) for samples, _ in plan.members for sample in samples)


def test_store__of_another_backend_is_another_store(place, installed, tmp_path):
    without = {"collect": {"raw": "none", "predictions": False}}
    ours, theirs = make_plan(vllm_recipe(place)), make_plan(recipe(place, **without))
    assert "backend" not in theirs.description
    assert ours.store_hash != theirs.store_hash
    store = Store(str(tmp_path))
    freeze(theirs, store)
    with pytest.raises(UsageError, match="backend: transformers in the store, vllm asked for"):
        freeze(ours, store)


@pytest.mark.parametrize(
    ("compute", "has_gpus", "expected"),
    [
        ({}, False, (1, 0)),
        ({}, True, (1, 1)),
        ({"gpus_per_worker": 4}, True, (4, 4)),
        ({"tensor_parallel": 2}, True, (2, 2)),
        ({"tensor_parallel": 2}, False, (2, 0)),
        ({"gpus_per_worker": 0, "tensor_parallel": 2}, True, (2, 0)),
        ({"gpus_per_worker": 0.5}, True, (1, 0.5)),
    ],
)
def test_ranks__are_as_many_as_the_workers_gpus(compute, has_gpus, expected):
    assert tensor_parallel_of(ComputeSection(**compute), has_gpus=has_gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "compute", "expected"),
    [
        ([(8, 0)], {}, (1, 0, 8, 1)),
        ([(8, 0), (8, 0)], {}, (2, 0, 8, 1)),
        ([(8, 4)], {"gpus_per_worker": 2}, (2, 2, 4, 2)),
        ([(8, 3), (8, 3)], {"gpus_per_worker": 2}, (2, 2, 8, 2)),
        ([(8, 3), (8, 3)], {}, (6, 1, 2, 1)),
    ],
)
def test_layout__puts_an_engine_on_one_machine(monkeypatch, nodes, compute, expected):
    seen = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: seen)
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": sum(c for c, _ in nodes), "GPU": sum(g for _, g in nodes)}
    )
    section = ComputeSection(**compute)
    layout = choose_layout(section, n_jobs=20, worker_memory_bytes=1, backend="vllm")
    assert (layout.n_workers, layout.n_gpus, layout.n_threads, layout.tensor_parallel) == expected
    with pytest.raises(UsageError, match=r"needs 4 GPUs of one machine; the largest here has 3|but Ray sees"):
        choose_layout(
            ComputeSection(gpus_per_worker=4 if nodes != [(8, 4)] else 8),
            n_jobs=1,
            worker_memory_bytes=1,
            backend="vllm",
        )


class StandIn:
    """An engine worker without an engine: its start says in which placement group it is."""

    def ready(self, spec):
        group = ray.util.get_current_placement_group()
        return here(), None if group is None else group.id.hex()


@pytest.mark.usefixtures("ray_cluster")
def test_starter__places_ranks_in_a_group_that_goes_with_the_worker(place, tmp_path, installed, monkeypatch):
    monkeypatch.setattr(vllm_worker, "EngineWorker", StandIn)
    plan = make_plan(vllm_recipe(place))

    def started(tensor_parallel):
        layout = Layout(n_workers=1, n_gpus=0, n_threads=2, tensor_parallel=tensor_parallel)
        spec = WorkerSpec(
            model=vllm_recipe(place).model,
            store=Store(str(tmp_path)),
            layout=layout,
            collect=CollectSpec.of(plan.description, plan.answers),
        )
        worker = engine_starter(spec)()
        return worker, ray.get(worker.ready)[1]

    worker, group = started(2)
    table = ray.util.placement_group_table()[group]
    assert (table["strategy"], table["state"], table["bundles"]) == ("STRICT_PACK", "CREATED", {0: {"CPU": 2.0}})
    worker.end(worker.actor)
    assert ray.util.placement_group_table()[group]["state"] == "REMOVED"
    worker, group = started(1)
    assert group is None
    worker.end(worker.actor)


@pytest.mark.usefixtures("ray_cluster")
def test_spares__are_none_where_vllm_collects():
    with Spares(ComputeSection(), "vllm") as spares:
        assert spares.take() is None
