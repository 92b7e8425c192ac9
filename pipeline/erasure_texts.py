"""The texts of an evaluation: the recipe's test, as prompts made the way that the training texts were."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronlens.errors import UsageError
from neuronlens.evaluation import TestText, answers_of
from neuronlens.measure import n_logits
from neuronlens.models import LOGITS_AT_ONCE, LoadedModel
from neuronlens.multiple_choice import EncodedQuestions, encode_questions, load_questions
from neuronlens.prompts import encode_prompts
from neuronlens.recipe import Recipe, TestSection
from neuronlens.sources import LabelledText, load_labelled, load_texts
from neuronlens.store import content_hash
from pipeline.evaluator import EvaluationJob, jobs_of
from pipeline.plan import check_answers

OFF_TASK_TOKENS = 256
"""Of an unlabelled text, its first so many tokens are used: the bare model's distributions after all of them are
held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestData:
    """What a model is asked: labelled prompts and the right token or class of each (int64; None where nothing is known
    to be right), unlabelled texts, and questions with choices."""

    __test__ = False  # not a test, whatever pytest makes of the name

    texts: tuple[TestText, ...]
    answer_X: np.ndarray | None
    off_task: tuple[tuple[int, ...], ...] = ()
    questions: EncodedQuestions | None = None

    @classmethod
    def load(cls, recipe: Recipe, test: TestSection, labelled: list[LabelledText], skeleton: LoadedModel) -> "TestData":
        """Raises UsageError where a text, an answer or a question does not fit the model."""
        concepts = Counter(text.concept for text in labelled)
        texts = _prompts(recipe, labelled, skeleton)
        answers = check_answers(skeleton, recipe, concepts) if recipe.data.answers else None
        answer_X = answers_of(skeleton, [text.concept for text in texts], answers)
        for name in ("off_task", "multiple_choice"):
            if getattr(test, name) is not None and skeleton.kind != "decoder":
                raise UsageError(
                    f"test.{name} is given, and {type(skeleton.module).__name__} predicts no next token. Leave it out, "
                    "or take a decoder."
                )
        return cls(
            texts=texts,
            answer_X=answer_X,
            off_task=_off_task(recipe, test, skeleton),
            questions=_questions(test, skeleton),
        )

    @property
    def n_tokens(self) -> int:
        """Of all texts of all kinds."""
        return sum(len(row) for rows in (self._labelled, self.off_task, self._questions) for row in rows)

    @property
    def _labelled(self) -> tuple[tuple[int, ...], ...]:
        return tuple(text.token_ids for text in self.texts)

    @property
    def _questions(self) -> tuple[tuple[int, ...], ...]:
        return () if self.questions is None else self.questions.prompts

    def jobs(self, loaded: LoadedModel, tokens_per_batch: int, n_groups: int) -> list[EvaluationJob]:
        """All texts under every group of interventions, group by group, cut into batches that do not depend on who runs
        them: texts of similar length together, and no more than fit LOGITS_AT_ONCE with the bare model's logits that a
        batch holds."""
        n_off_task = min(tokens_per_batch, max(1, LOGITS_AT_ONCE // n_logits(loaded)))
        n_choices_Q = None if self.questions is None else self.questions.n_choices_Q
        return [
            *jobs_of("labelled", loaded, self._labelled, self.answer_X, tokens_per_batch, n_groups),
            *jobs_of("off_task", loaded, self.off_task, None, n_off_task, n_groups),
            *jobs_of("choices", loaded, self._questions, n_choices_Q, tokens_per_batch, n_groups),
        ]

    @property
    def texts_hash(self) -> str:
        """Of the labelled texts: evaluations that share it can be compared, whatever else they measured."""
        return content_hash(self._labelled_as_lists())

    def _labelled_as_lists(self) -> list[Any]:
        return [
            [[text.token_ids, text.concept] for text in self.texts],
            None if self.answer_X is None else self.answer_X.tolist(),
        ]

    def as_lists(self) -> list[Any]:
        """What decides what is measured, for a hash."""
        questions = self.questions
        asked = [] if questions is None else [questions.letter_ids, questions.n_choices_Q.tolist()]
        return [
            *self._labelled_as_lists(),
            self.off_task,
            [self._questions, *asked, [] if questions is None else questions.right_Q.tolist()],
        ]


def load_labelled_test(recipe: Recipe, test: TestSection) -> list[LabelledText]:
    return load_labelled(
        test.source,
        split=test.split,
        text=recipe.data.text,
        concept=recipe.data.concept,
        max_per_concept=test.max_per_concept,
    )


def load_test_texts(recipe: Recipe, test: TestSection, skeleton: LoadedModel) -> tuple[TestText, ...]:
    """The labelled test texts as prompts."""
    return _prompts(recipe, load_labelled_test(recipe, test), skeleton)


def check_test(recipe: Recipe, concepts: Collection[str]) -> None:
    """Raise UsageError where the recipe's test has texts of a concept that its data have not, before hours of
    collecting show it."""
    test = recipe.test
    if test is not None:
        labelled = load_labelled_test(recipe, test)
        check_concepts(labelled, concepts, test.source, f"{recipe.data.source} has no texts")


def check_concepts(labelled: list[LabelledText], known: Collection[str], source: str, holder: str) -> None:
    """Raise UsageError where a test text is labelled with a concept that `holder` (in words) does not know."""
    concepts = Counter(text.concept for text in labelled)
    unknown = sorted(set(concepts) - set(known))
    if unknown:
        raise UsageError(
            f"{source} has the concept {unknown[0]!r} ({concepts[unknown[0]]} of {concepts.total()} rows), for "
            f"which {holder}. Known: {', '.join(sorted(known))}. Drop those rows, or collect texts of that concept."
        )


def _prompts(recipe: Recipe, labelled: list[LabelledText], skeleton: LoadedModel) -> tuple[TestText, ...]:
    prompts = encode_prompts(
        skeleton.tokenizer, recipe.data.prompt, [text.text for text in labelled], window=skeleton.window
    )
    return tuple(
        TestText(token_ids=tuple(prompt.token_ids), concept=text.concept)
        for text, prompt in zip(labelled, prompts, strict=True)
    )


def _off_task(recipe: Recipe, test: TestSection, skeleton: LoadedModel) -> tuple[tuple[int, ...], ...]:
    if test.off_task is None:
        return ()
    texts = load_texts(test.off_task, split=test.split, text=recipe.data.text, at_most=test.off_task_texts)
    window = min(skeleton.window, OFF_TASK_TOKENS)
    encoded = skeleton.tokenizer(texts, truncation=True, max_length=window)["input_ids"]
    return tuple(tuple(token_ids) for token_ids in encoded)


def _questions(test: TestSection, skeleton: LoadedModel) -> EncodedQuestions | None:
    if test.multiple_choice is None:
        return None
    return encode_questions(skeleton.tokenizer, load_questions(test.multiple_choice), window=skeleton.window)
