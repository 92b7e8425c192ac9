"""The evaluation stage: every concept's ranges on the test texts, against the bare model, whole-neuron masking and
controls, under one setting or a sweep of them.

neuronlens evaluate STORE --sweep tau=0.5:4:0.5 --control random,shuffled
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neuronlens.controls import Control, plan_controls
from neuronlens.erasure import erasure_rows
from neuronlens.errors import RunFailed, UsageError
from neuronlens.evaluation import EvaluationPlan, Measured, plan_conditions
from neuronlens.measure import Counted
from neuronlens.models import LoadedModel, load_model
from neuronlens.programs import Edit
from neuronlens.ranges import PAPER, RangeTable, TableHeader
from neuronlens.recipe import Recipe, parse_recipe, with_changes
from neuronlens.store import Store, content_hash
from neuronlens.sweep import Grid, Setting, settings_of
from pipeline.emit import load_table
from pipeline.erasure_tables import tables_of
from pipeline.erasure_texts import TestData, check_concepts, load_labelled_test
from pipeline.evaluator import MOST_PROGRAM_BYTES, EvaluationJob, EvaluationWork
from pipeline.plan import TOKENS_PER_BATCH
from pipeline.pool import Pool, Watcher
from pipeline.stopping import GRACE_SECONDS
from pipeline.workers import Layout, Spares, WorkerSpec, choose_layout, worker_starter

if TYPE_CHECKING:
    from pipeline.driver import Reporter


ZERO = Edit()

_OPERATIONS_PER_SECOND = 5e10
"""Of one core, roughly."""
_WORKER_SECONDS = 10
"""What it takes a worker to import torch and to load a small model, roughly."""

ROWS_A_FILE = 4_000
"""DuckDB reads JSON of up to 16 MiB, and a row is about 2.5 KB."""

_ROWS_VERSION = 2
"""Of what a row says; evaluations that were kept by older code, with fewer columns, are made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is evaluated: settings of a table (`name` of the file that the rows are kept in begins so), with which
    controls, and whether the prompts' perplexity is measured."""

    name: str
    table: RangeTable
    edit: Edit
    settings: tuple[Setting, ...]
    controls: tuple[Control, ...] = ()
    perplexity: bool = True
    counted: Counted = "all"

    def as_dict(self) -> dict[str, Any]:
        """What decides the rows, besides the texts."""
        return {
            "rows_version": _ROWS_VERSION,
            "table": self.table.id,
            "settings": [[s.edit.model_dump(), s.salience, s.method, s.options, s.positions] for s in self.settings],
            "controls": self.controls,
            "perplexity": self.perplexity,
            "counted": self.counted,
        }


def recipe_of(store: Store, changes: list[str] | None = None) -> Recipe:
    """The recipe that made a store, with `changes` (section.key=value) on top."""
    return parse_recipe(with_changes(store.describe()["recipe"], changes), origin=f"the recipe in {store.root}")


def table_of_recipe(store: Store, recipe: Recipe) -> RangeTable:
    """The range table that the recipe asks for, where a store has others too: sweeps leave some. Raises UsageError as
    `load_table` does."""
    asked = recipe.ranges

    def is_it(header: TableHeader) -> bool:
        is_alike = all(
            getattr(header, key) == getattr(asked, key) for key in ("method", "options", "salience", "top_fraction")
        )
        return is_alike and (asked.method != PAPER or header.tau == asked.tau)

    found = [table for table in (load_table(store, table_id) for table_id in store.table_ids()) if is_it(table.header)]
    return found[0] if len(found) == 1 else load_table(store, None)


def evaluate_table(
    recipe: Recipe,
    store: Store,
    table: RangeTable,
    reporter: "Reporter",
    edit: Edit = ZERO,
    stop_requested: Callable[[], bool] = lambda: False,
    *,
    controls: Sequence[Control] = (),
    perplexity: bool = True,
    spares: Spares | None = None,
) -> list[dict[str, Any]]:
    """A row per concept and condition, then their means; kept in the store, so that the same is not run twice.

    `edit` says what is done to the salient neurons, and in which layers; by default all of the table's are zeroed.
    Gives no rows, and keeps none, where `stop_requested` says so before the end. Takes its workers from `spares` where
    there are any.

    Raises UsageError where the recipe has no test, or its texts do not fit the table; RunFailed where a batch failed.
    """
    asked = Asked(
        name=table.id,
        table=table,
        edit=edit,
        settings=(Setting.of(table, edit),),
        controls=tuple(controls),
        perplexity=perplexity,
    )
    return _evaluate(recipe, store, asked, reporter, stop_requested, spares)


def evaluate_sweep(
    recipe: Recipe,
    store: Store,
    table: RangeTable,
    grid: Grid,
    reporter: "Reporter",
    edit: Edit = ZERO,
    stop_requested: Callable[[], bool] = lambda: False,
    *,
    controls: Sequence[Control] = (),
    perplexity: bool = False,
    spares: Spares | None = None,
) -> list[dict[str, Any]]:
    """As `evaluate_table`, for every point of the grid, with one unmodified pass for all. What the grid does not say is
    as in `edit` and `table`; the tables that it asks for beyond that are made. Counts are of the answers' tokens.

    Raises UsageError for a point that cannot be, too.
    """
    settings = settings_of(grid, Setting.of(table, edit), table, layers=table.layers, hook_points=table.hook_points)
    asked = Asked(
        name="sweep",
        table=table,
        edit=edit,
        settings=tuple(settings),
        controls=tuple(controls),
        perplexity=perplexity,
        counted="answer",
    )
    return _evaluate(recipe, store, asked, reporter, stop_requested, spares)


def _evaluate(
    recipe: Recipe,
    store: Store,
    asked: Asked,
    reporter: "Reporter",
    stop_requested: Callable[[], bool],
    spares: Spares | None,
) -> list[dict[str, Any]]:
    test, table = recipe.test, asked.table
    if test is None:
        raise UsageError(
            "The recipe has no test section, so there is nothing to evaluate on. Add test.source, or give one: "
            "neuronlens evaluate STORE --set test.source=test.jsonl"
        )
    for setting in asked.settings:
        table.select(hook_points=setting.edit.hook_points, layers=setting.edit.layers)
    labelled = load_labelled_test(recipe, test)
    check_concepts(labelled, table.concepts, test.source, f"range table {table.id} has no ranges")
    skeleton = load_model(recipe.model.id, revision=recipe.model.revision, dtype=recipe.model.dtype, device="meta")
    data = TestData.load(recipe, test, labelled, skeleton)
    work_id = content_hash([asked.as_dict(), data.as_lists()])
    kept = f"evaluations/{asked.name}.{work_id[:12]}"
    if store.exists(f"{kept}.json"):
        reporter.say(f"evaluated before: {kept}.json")
        return _kept_rows(store, kept)
    if data.questions is not None and data.questions.n_too_long:
        reporter.say(f"{data.questions.n_too_long:,} questions are longer than the model's window and were left out.")
    plan, columns = _planned(store, asked, reporter)
    measured = _measure(recipe, store, asked, work_id, plan, data, skeleton, reporter, stop_requested, spares)
    if measured is None:
        return []
    rows = erasure_rows(
        data.texts,
        measured,
        plan.cases,
        settings=columns,
        counted=asked.counted,
        right_choice_Q=None if data.questions is None else data.questions.right_Q,
    )
    done = {
        "table": table.id,
        "edit": asked.edit.model_dump(mode="json"),
        "controls": list(asked.controls),
        "coverage": table.header.coverage,
        "n_texts": len(data.texts),
        "texts_hash": data.texts_hash,
        "n_off_task_texts": len(data.off_task),
        "n_questions": 0 if data.questions is None else len(data.questions.prompts),
        "n_passes": plan.n_passes,
    }
    _keep(store, kept, done, [dict(row) for row in rows])
    return [dict(row) for row in rows]


def _keep(store: Store, kept: str, done: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows in files that DuckDB reads whole, with the same words before them; the first one comes last, so that all
    are there where it is."""
    parts = [rows[first : first + ROWS_A_FILE] for first in range(0, len(rows), ROWS_A_FILE)]
    for number, part in reversed(list(enumerate(parts))):
        name = f"{kept}.part{number:03d}.json" if number else f"{kept}.json"
        store.create_json(name, done | {"n_parts": len(parts), "rows": part})


def _kept_rows(store: Store, kept: str) -> list[dict[str, Any]]:
    first = store.read_json(f"{kept}.json")
    others = [store.read_json(f"{kept}.part{number:03d}.json") for number in range(1, first.get("n_parts", 1))]
    return [row for part in (first, *others) for row in part["rows"]]


def _planned(store: Store, asked: Asked, reporter: "Reporter") -> tuple[EvaluationPlan, list[dict[str, Any]]]:
    """The interventions and the rows to be, and what the rows say of each setting."""
    plan, columns = EvaluationPlan(), []
    tables = tables_of(store, asked.table, asked.settings, asked.controls, reporter)
    for number, (setting, made) in enumerate(zip(asked.settings, tables, strict=True)):
        programs = plan_conditions(
            plan, number, made.own, setting.edit, asked.table.concepts, positions=setting.positions
        )
        plan_controls(
            plan,
            number,
            made.own,
            setting.edit,
            programs,
            asked.controls,
            made.controls,
            positions=setting.positions,
        )
        columns.append(setting.columns(made.own))
    return plan, columns


def _measure(
    recipe: Recipe,
    store: Store,
    asked: Asked,
    work_id: str,
    plan: EvaluationPlan,
    data: TestData,
    skeleton: LoadedModel,
    reporter: "Reporter",
    stop_requested: Callable[[], bool],
    spares: Spares | None,
) -> Measured | None:
    """All passes over all texts, spread over workers by batches; None where a stop was requested before the end."""
    import ray

    perplexity = asked.perplexity and skeleton.kind == "decoder"
    work = EvaluationWork(
        id=work_id,
        plan=plan.bare(),
        groups=tuple(plan.groups(MOST_PROGRAM_BYTES)),
        counted=asked.counted,
        perplexity=perplexity,
        letter_ids=() if data.questions is None else data.questions.letter_ids,
    )
    layout = _layout(recipe, data, skeleton, plan.n_passes)
    tokens_per_batch = recipe.compute.tokens_per_batch
    if tokens_per_batch == "auto":
        tokens_per_batch = TOKENS_PER_BATCH[layout.device_type]
    jobs = data.jobs(skeleton, tokens_per_batch, len(work.groups))
    n_questions = 0 if data.questions is None else len(data.questions.prompts)
    measured = Measured.empty(
        plan.n_passes,
        len(data.texts),
        answers=data.answer_X is not None,
        perplexity=perplexity,
        n_off_task=len(data.off_task),
        n_questions=n_questions,
    )
    n_texts = len(data.texts) + len(data.off_task) + n_questions
    spec = WorkerSpec(model=recipe.model, store=store, layout=layout)
    work_ref = ray.put(work)
    with (
        reporter.stage("evaluate", n_texts * plan.n_passes, "texts") as advance,
        Pool[EvaluationJob](start=worker_starter(spec, spares), size=lambda: layout.n_workers) as pool,
    ):
        watcher = Filling(measured, work, on_done=advance, stop_requested=stop_requested)
        failures = pool.run(jobs, lambda actor, job: actor.evaluate.remote(work_ref, job), watcher)
    if failures:
        raise RunFailed(
            f"{len(failures)} of {len(jobs)} batches of test texts failed, the first ({failures[0].job}) because "
            f"{failures[0].reason}. The store and its tables are whole: mend the reason and run 'neuronlens evaluate "
            f"{store.root}' with the same options again."
        )
    return measured if watcher.n_done == len(jobs) else None


def _layout(recipe: Recipe, data: TestData, skeleton: LoadedModel, n_passes: int) -> Layout:
    """As many workers as there is work for: what one does sooner than another starts, it does alone."""
    n_parameters = sum(parameter.numel() for parameter in skeleton.module.parameters())
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.module.parameters())
    seconds = 2 * n_parameters * data.n_tokens * n_passes / _OPERATIONS_PER_SECOND
    return choose_layout(recipe.compute, n_jobs=1 + int(seconds / _WORKER_SECONDS), worker_memory_bytes=weight_bytes)


class Filling(Watcher[EvaluationJob]):
    """Puts every batch's results in their places."""

    def __init__(
        self,
        measured: Measured,
        work: EvaluationWork,
        *,
        on_done: Callable[[int], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.n_done = 0
        self._measured, self._work = measured, work
        self._on_done, self._stop_requested = on_done, stop_requested

    def done(self, job: EvaluationJob, result: Any) -> None:
        passes = self._work.passes(job.group)
        if job.kind == "labelled":
            self._measured.put(passes, job.places, result)
        elif job.kind == "off_task":
            self._measured.put_off_task(passes, job.places, result)
        else:
            self._measured.put_choices(passes, job.places, result)
        self.n_done += 1
        self._on_done(len(job.places) * (len(passes) - (job.group > 0)))

    def stop_requested(self) -> bool:
        return self._stop_requested()

    def grace_seconds(self) -> float:
        return GRACE_SECONDS
