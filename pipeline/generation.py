"""The generation evaluation: every concept's prompts continued by the bare model, without its whole neurons and without
their ranges, and a classifier that says what the continuations speak of.

neuronlens generate STORE --set test.generation.classifier=path/or/hub-id
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from neuronlens.errors import RunFailed, UsageError
from neuronlens.evaluation import EvaluationPlan, plan_conditions
from neuronlens.generation import Prompt, Writer, Written, evenly, prompts_of
from neuronlens.generation_rows import Generated, generation_rows
from neuronlens.identity import model_identity
from neuronlens.judge import Judge, Judged, classes_of
from neuronlens.measure import batches_for
from neuronlens.models import LoadedModel, import_for_generation, load_model
from neuronlens.programs import Edit, Program
from neuronlens.ranges import RangeTable
from neuronlens.recipe import GenerationSection, ModelSection, Recipe, TestSection
from neuronlens.serving.engine import Sampling
from neuronlens.sources import load_labelled
from neuronlens.steer import check_model
from neuronlens.store import Store, content_hash
from pipeline.erasure_texts import check_concepts
from pipeline.plan import TOKENS_PER_BATCH
from pipeline.pool import Place, Pool, Started, Watcher, here
from pipeline.workers import Layout, choose_layout, cpu_share

if TYPE_CHECKING:
    from pipeline.driver import Reporter

_ROWS_VERSION = 1
"""Of what a row says."""
_OPERATIONS_PER_SECOND, _STEP_SECONDS = 5e10, 0.01
"""Of one core, roughly: what it computes, and what a step of the smallest model takes it."""
_WORKER_SECONDS = 10
"""What it takes a worker to import torch and to load two small models, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """What a worker needs to begin. class_of: the classifier's class of each concept."""

    model: ModelSection
    generation: GenerationSection
    answers: tuple[str, ...]
    class_of: dict[str, int]
    plan: EvaluationPlan
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """A batch of prompts under one pass of the plan; `places` are their numbers among all prompts."""

    number: int
    places: tuple[int, ...]
    prompts: tuple[Prompt, ...]

    def __str__(self) -> str:
        return f"{len(self.prompts)} prompts of concepts {', '.join(sorted({p.concept for p in self.prompts}))}"


def run_generation(
    opened: Store, recipe: Recipe, table: RangeTable, edit: Edit, reporter: "Reporter"
) -> list[dict[str, Any]]:
    """A row per concept and condition, then their means; kept in the store, so that the same is not run twice.

    Everything is checked before Ray starts, which is done here where it has not been. Raises UsageError: no classifier
    in the recipe, or one that lacks a concept; a model that writes no text, or that the table is not for; prompts that
    do not fit the table or the model's window. Raises RunFailed where a batch failed.
    """
    test, asked = _sections(recipe)
    table.select(hook_points=edit.hook_points, layers=edit.layers)
    check_model(table, model_identity(recipe.model.id, recipe.model.revision))
    model = load_model(recipe.model.id, revision=recipe.model.revision, dtype=recipe.model.dtype, device="meta")
    _check_writes(model)
    prompts = _prompts(recipe, test, asked, table, model)
    concepts = [concept for concept in table.concepts if concept in {prompt.concept for prompt in prompts}]
    classifier = _classifier(asked, device="meta")
    class_of = classes_of(classifier, concepts, asked.labels)
    kept = f"generations/{table.id}.{_work_hash(recipe, asked, table, edit, prompts, class_of)[:12]}.json"
    if opened.exists(kept):
        reporter.say(f"generated before: {kept}")
        return list(opened.read_json(kept)["rows"])
    plan = EvaluationPlan()
    plan_conditions(plan, 0, table, edit, concepts)
    generated = _generate(opened, recipe, asked, plan, prompts, class_of, model, classifier, reporter)
    prompt_texts = model.tokenizer.batch_decode([prompt.token_ids for prompt in prompts], skip_special_tokens=True)
    rows = generation_rows(prompts, prompt_texts, generated, plan.cases)
    done = {
        "table": table.id,
        "edit": edit.model_dump(mode="json"),
        "generation": asked.model_dump(mode="json"),
        "coverage": table.header.coverage,
        "n_prompts": len(prompts),
        "n_passes": plan.n_passes,
        "rows": rows,
    }
    opened.create_json(kept, done)
    return rows


def _sections(recipe: Recipe) -> tuple[TestSection, GenerationSection]:
    if recipe.test is None or recipe.test.generation is None:
        raise UsageError(
            "The recipe has no test.generation, so nobody would say what the continuations speak of. Name a sequence "
            "classifier: --set test.generation.classifier=path/or/hub-id"
            + (" --set test.source=test.jsonl" if recipe.test is None else "")
        )
    return recipe.test, recipe.test.generation


def _check_writes(model: LoadedModel) -> None:
    if model.kind != "decoder":
        raise UsageError(
            f"{type(model.module).__name__} predicts no next token, so it continues no text. Only decoders can be "
            "evaluated by what they write; neuronlens evaluate reads a classifier's classes."
        )


def _classifier(asked: GenerationSection, *, device: str) -> LoadedModel:
    try:
        return load_model(asked.classifier, revision=asked.revision, device=device)
    except UsageError as error:
        raise UsageError(f"test.generation.classifier: {error}") from error


def _prompts(
    recipe: Recipe, test: TestSection, asked: GenerationSection, table: RangeTable, model: LoadedModel
) -> list[Prompt]:
    source = asked.prompts or test.source
    texts = load_labelled(
        source,
        split=test.split,
        text=recipe.data.text,
        concept=recipe.data.concept,
        max_per_concept=test.max_per_concept,
    )
    check_concepts(texts, table.concepts, source, f"range table {table.id} has no ranges")
    prompts = evenly(prompts_of(model.tokenizer, texts, n_tokens=asked.prompt_tokens), asked.n_prompts)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + asked.n_tokens > model.window:
        raise UsageError(
            f"test.generation asks for {asked.n_tokens} tokens after prompts of up to {longest}; the model's window is "
            f"{model.window} tokens. Lower test.generation.n_tokens or test.generation.prompt_tokens."
        )
    return prompts


def _work_hash(
    recipe: Recipe,
    asked: GenerationSection,
    table: RangeTable,
    edit: Edit,
    prompts: list[Prompt],
    class_of: dict[str, int],
) -> str:
    judge = model_identity(asked.classifier, asked.revision)
    return content_hash(
        {
            "rows_version": _ROWS_VERSION,
            "table": table.id,
            "edit": edit.model_dump(mode="json"),
            "dtype": recipe.model.dtype,
            "sampling": [asked.n_tokens, asked.temperature, asked.seed],
            "classifier": [judge.config_hash, judge.weights_fingerprint, class_of],
            "answers": recipe.data.answers,
            "prompts": [[prompt.token_ids, prompt.concept] for prompt in prompts],
        }
    )


def _generate(
    store: Store,
    recipe: Recipe,
    asked: GenerationSection,
    plan: EvaluationPlan,
    prompts: list[Prompt],
    class_of: dict[str, int],
    model: LoadedModel,
    classifier: LoadedModel,
    reporter: "Reporter",
) -> Generated:
    """All passes over all prompts, spread over workers by batches."""
    from pipeline.driver import ray_session

    generated = Generated.empty(plan.n_passes, len(prompts))
    lengths = [len(prompt.token_ids) + asked.n_tokens for prompt in prompts]
    with ray_session():
        layout = _layout(recipe, [model, classifier], asked.n_tokens, sum(lengths) * plan.n_passes)
        tokens_per_batch = recipe.compute.tokens_per_batch
        if tokens_per_batch == "auto":
            tokens_per_batch = TOKENS_PER_BATCH[layout.device_type]
        # A pass after the other: a worker compiles each program once.
        jobs = [
            GenerationJob(number=number, places=tuple(places), prompts=tuple(prompts[i] for i in places))
            for number in range(plan.n_passes)
            for places in batches_for(model, lengths, tokens_per_batch)
        ]
        spec = GenerationSpec(
            model=recipe.model,
            generation=asked,
            answers=tuple((recipe.data.answers or {}).values()),
            class_of=class_of,
            plan=plan.bare(),
            layout=layout,
        )
        with (
            reporter.stage("generate", len(prompts) * plan.n_passes, "continuations") as advance,
            Pool[GenerationJob](start=_starter(spec), size=lambda: layout.n_workers) as pool,
        ):
            watcher = _Filling(generated, on_done=advance)
            failures = pool.run(jobs, lambda actor, job: actor.write.remote(job), watcher)
    if failures:
        raise RunFailed(
            f"{len(failures)} of {len(jobs)} batches of prompts failed, the first ({failures[0].job}) because "
            f"{failures[0].reason}. The store and its tables are whole: mend the reason and run 'neuronlens generate "
            f"{store.root}' with the same options again."
        )
    return generated


def _layout(recipe: Recipe, models: list[LoadedModel], n_steps: int, n_tokens: int) -> Layout:
    """As many workers as there is work for, which is n_tokens in batches of so many steps: what one does sooner than
    another starts, it does alone."""
    weights = [list(loaded.module.parameters()) for loaded in models]
    n_operations = 2 * sum(parameter.numel() for parameter in weights[0]) * n_tokens
    n_batches = n_tokens / TOKENS_PER_BATCH["cpu"]
    seconds = n_operations / _OPERATIONS_PER_SECOND + n_batches * n_steps * _STEP_SECONDS
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameters in weights for parameter in parameters)
    return choose_layout(recipe.compute, n_jobs=1 + int(seconds / _WORKER_SECONDS), worker_memory_bytes=n_bytes)


class GenerationWorker:
    """A Ray actor that holds the model, the classifier, and the program of the pass that it was last asked for."""

    def __init__(self) -> None:
        import_for_generation()

    def ready(self, spec: GenerationSpec) -> Place:
        """Load both. Must be called first, and be done before anything else is asked. Raises UsageError where this node
        does not see them."""
        torch.set_num_threads(spec.layout.n_threads)
        model, asked = spec.model, spec.generation
        loaded = load_model(model.id, revision=model.revision, dtype=model.dtype, device=spec.layout.device_type)
        sampling = Sampling(max_tokens=asked.n_tokens, temperature=asked.temperature, seed=asked.seed)
        self._writer = Writer(loaded, sampling, answers=spec.answers, overrides=model.modules or None)
        self._judge = Judge(_classifier(asked, device=spec.layout.device_type), spec.class_of)
        self._plan = spec.plan
        self._held: tuple[int, Program | None] = (0, None)
        return here()

    def write(self, job: GenerationJob) -> tuple[Written, Judged]:
        """One batch of prompts, continued and scored."""
        if self._held[0] != job.number:
            at_work = self._plan.at_work(slice(job.number - 1, job.number)) if job.number else []
            self._held = (job.number, at_work[0].program if at_work else None)
        written = self._writer.write(job.prompts, job.places, self._held[1])
        return written, self._judge.score(written.texts, [prompt.concept for prompt in job.prompts])


def _starter(spec: GenerationSpec) -> Callable[[], Started]:
    layout, spec_ref = spec.layout, ray.put(spec)
    actor_class: Any = ray.remote(GenerationWorker).options(
        num_cpus=1 if layout.n_gpus else cpu_share(layout),
        num_gpus=layout.n_gpus,
        max_restarts=0,
        max_task_retries=0,
    )

    def start() -> Started:
        actor = actor_class.remote()
        return Started(actor, actor.ready.remote(spec_ref))

    return start


class _Filling(Watcher[GenerationJob]):
    """Puts every batch's results in their places."""

    def __init__(self, generated: Generated, *, on_done: Callable[[int], None]) -> None:
        self._generated, self._on_done = generated, on_done

    def done(self, job: GenerationJob, result: tuple[Written, Judged]) -> None:
        self._generated.put(job.number, job.places, *result)
        self._on_done(len(job.places))
