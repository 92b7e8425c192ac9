"""The evaluation stage: every concept's ranges on the test texts, against the bare model and whole-neuron masking.

neuronlens evaluate STORE
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from neuronlens.errors import RunFailed, UsageError
from neuronlens.evaluation import Case, CaseResult, TestText, erasure_cases, erasure_rows
from neuronlens.models import LoadedModel, load_model
from neuronlens.programs import Edit
from neuronlens.prompts import encode_prompts
from neuronlens.ranges import RangeTable
from neuronlens.recipe import Recipe, TestSection, parse_recipe, with_changes
from neuronlens.sources import load_labelled
from neuronlens.store import Store, content_hash
from pipeline.plan import TOKENS_PER_BATCH, check_answers
from pipeline.pool import Pool, Watcher
from pipeline.stopping import GRACE_SECONDS
from pipeline.workers import WorkerSpec, choose_layout, worker_starter

if TYPE_CHECKING:
    from pipeline.driver import Reporter


ZERO = Edit()


def recipe_of(store: Store, changes: list[str] | None = None) -> Recipe:
    """The recipe that made a store, with `changes` (section.key=value) on top."""
    return parse_recipe(with_changes(store.describe()["recipe"], changes), origin=f"the recipe in {store.root}")


def evaluate_table(
    recipe: Recipe,
    store: Store,
    table: RangeTable,
    reporter: "Reporter",
    edit: Edit = ZERO,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """A row per concept and condition; kept in the store, so that the same evaluation is not run twice.

    `edit` says what is done to the salient neurons, and in which layers; by default all of the table's are zeroed.
    Gives no rows, and keeps none, where `stop_requested` says so before the end.

    Raises UsageError where the recipe has no test, or its texts do not fit the table; RunFailed where a case failed.
    """
    if recipe.test is None:
        raise UsageError(
            "The recipe has no test section, so there is nothing to evaluate on. Add test.source, or give one: "
            "neuronlens evaluate STORE --set test.source=test.jsonl"
        )
    skeleton = load_model(recipe.model.id, revision=recipe.model.revision, dtype=recipe.model.dtype, device="meta")
    texts = load_test_texts(recipe, recipe.test, skeleton)
    concepts = Counter(text.concept for text in texts)
    _check_concepts(concepts, table, recipe.test)
    answers = check_answers(skeleton, recipe, concepts) if recipe.data.answers else None
    asked = content_hash([table.id, edit.model_dump(), answers, [[text.token_ids, text.concept] for text in texts]])
    kept = f"evaluations/{table.id}.{asked[:12]}.json"
    if store.exists(kept):
        reporter.say(f"evaluated before: {kept}")
        return list(store.read_json(kept)["rows"])
    results = _run_cases(recipe, store, table, edit, texts, answers, skeleton, reporter, stop_requested)
    if stop_requested():
        return []
    rows = [dict(row) for row in erasure_rows(texts, results[0], results[1:])]
    done = {
        "table": table.id,
        "edit": edit.model_dump(mode="json"),
        "coverage": table.header.coverage,
        "n_texts": len(texts),
        "rows": rows,
    }
    store.create_json(kept, done)
    return rows


def load_test_texts(recipe: Recipe, test: TestSection, skeleton: LoadedModel) -> tuple[TestText, ...]:
    """The test texts as prompts, made the way that the training texts were."""
    labelled = load_labelled(
        test.source,
        split=test.split,
        text=recipe.data.text,
        concept=recipe.data.concept,
        max_per_concept=test.max_per_concept,
    )
    prompts = encode_prompts(
        skeleton.tokenizer, recipe.data.prompt, [text.text for text in labelled], window=skeleton.window
    )
    return tuple(
        TestText(token_ids=tuple(prompt.token_ids), concept=text.concept)
        for text, prompt in zip(labelled, prompts, strict=True)
    )


def _run_cases(
    recipe: Recipe,
    store: Store,
    table: RangeTable,
    edit: Edit,
    texts: tuple[TestText, ...],
    answers: dict[str, int] | None,
    skeleton: LoadedModel,
    reporter: "Reporter",
    stop_requested: Callable[[], bool],
) -> list[CaseResult]:
    import ray

    cases = erasure_cases(table.concepts)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.module.parameters())
    layout = choose_layout(recipe.compute, n_jobs=len(cases), worker_memory_bytes=weight_bytes)
    tokens_per_batch = recipe.compute.tokens_per_batch
    if tokens_per_batch == "auto":
        tokens_per_batch = TOKENS_PER_BATCH[layout.device_type]
    spec = WorkerSpec(model=recipe.model, store=store, layout=layout, tokens_per_batch=tokens_per_batch)
    table_ref, texts_ref = ray.put(table), ray.put(texts)
    with (
        reporter.stage("evaluate", len(cases) * len(texts), "texts") as advance,
        Pool[Case](start=worker_starter(spec), size=lambda: layout.n_workers) as pool,
    ):
        kept = _Results(on_done=lambda: advance(len(texts)), stop_requested=stop_requested)
        failures = pool.run(
            cases, lambda actor, case: actor.evaluate.remote(table_ref, edit, case, texts_ref, answers), kept
        )
    if failures:
        raise RunFailed(
            f"{len(failures)} of {len(cases)} evaluations failed, the first ({failures[0].job.condition}, "
            f"{failures[0].job.concept}) because {failures[0].reason}. The store and its table are whole: mend the "
            f"reason and run 'neuronlens evaluate {store.root} --table {table.id}'."
        )
    return [kept.found[case] for case in cases if case in kept.found]


class _Results(Watcher[Case]):
    """Keeps what each case gave."""

    def __init__(self, *, on_done: Callable[[], None], stop_requested: Callable[[], bool]) -> None:
        self.found: dict[Case, CaseResult] = {}
        self._on_done, self._stop_requested = on_done, stop_requested

    def done(self, job: Case, result: CaseResult) -> None:
        self.found[job] = result
        self._on_done()

    def stop_requested(self) -> bool:
        return self._stop_requested()

    def grace_seconds(self) -> float:
        return GRACE_SECONDS


def _check_concepts(concepts: Counter[str], table: RangeTable, test: TestSection) -> None:
    unknown = sorted(set(concepts) - set(table.concepts))
    if unknown:
        raise UsageError(
            f"{test.source} has the concept {unknown[0]!r} ({concepts[unknown[0]]} of {concepts.total()} rows), for "
            f"which the table has no ranges. It has: {', '.join(table.concepts)}. Drop those rows, or collect texts "
            "of that concept."
        )
