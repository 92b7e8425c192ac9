"""Questions with choices from a local file, asked as MMLU asks them (Hendrycks et al. 2021).

One JSON object a line: {"question": "...", "choices": ["...", "..."], "answer": 1}, the answer counted from 0 or given
as its letter. The prompt is the question, the choices with their letters, and "Answer:", each on a line of its own; the
model's choice is the letter whose token, " A", " B" and so on, it finds most probable next.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuronlens.errors import UsageError

LETTERS = string.ascii_uppercase


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`right` is the place of the right choice, from 0."""

    question: str
    choices: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *lettered, "Answer:"])


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedQuestions:
    """Prompts as tokens; the tokens of the letters that follow one, as many as the longest question needs; how many of
    them each question has, and which is right (int64 [Q])."""

    prompts: tuple[tuple[int, ...], ...]
    letter_ids: tuple[int, ...]
    n_choices_Q: np.ndarray
    right_Q: np.ndarray
    n_too_long: int
    """Questions that were left out, since they do not fit the model's window."""


def load_questions(path: str) -> list[Question]:
    """The questions of a JSONL file. Raises UsageError, with the line, for what is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"test.multiple_choice is {path}, which cannot be read: {error}. Expected a local JSONL file with "
            "question, choices and answer."
        ) from error
    questions = [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UsageError(f"test.multiple_choice is {path}, which has no questions. Expected one JSON object a line.")
    return questions


def encode_questions(tokenizer: Any, questions: Sequence[Question], *, window: int) -> EncodedQuestions:
    """The questions for a decoder. Where " A", " B" and so on begin with the same tokens (some tokenizers split the
    space off), these end the prompt.

    Raises UsageError where the letters are not one token each beyond that, or no question fits the window.
    """
    n_letters = max(len(question.choices) for question in questions)
    shared, letter_ids = _letters(tokenizer, n_letters)
    prompts = [(*tokenizer(question.prompt)["input_ids"], *shared) for question in questions]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= window]
    if not fits:
        raise UsageError(
            f"None of the {len(questions)} questions of test.multiple_choice fits the model's window of {window} "
            f"tokens; the shortest has {min(map(len, prompts))}. Shorten them, or leave test.multiple_choice out."
        )
    return EncodedQuestions(
        prompts=tuple(prompts[i] for i in fits),
        letter_ids=letter_ids,
        n_choices_Q=np.array([len(questions[i].choices) for i in fits], dtype=np.int64),
        right_Q=np.array([questions[i].right for i in fits], dtype=np.int64),
        n_too_long=len(questions) - len(fits),
    )


def _letters(tokenizer: Any, n_letters: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that " A", " B", ... have in common at their beginning, and the one token that follows in each."""
    encoded = [tuple(tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]) for letter in LETTERS[:n_letters]]
    shared = encoded[0][:-1]
    last = tuple(ids[-1] if ids else -1 for ids in encoded)
    if any(ids[:-1] != shared or not ids for ids in encoded) or len(set(last)) < n_letters:
        pieces = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in encoded]
        raise UsageError(
            f"This tokenizer writes the letters of test.multiple_choice as {pieces}; expected one token each, or the "
            "same tokens and then one. Leave test.multiple_choice out for this model."
        )
    return shared, last


def _question(path: str, number: int, line: str) -> Question:
    def refused(reason: str) -> UsageError:
        return UsageError(
            f"{path}, line {number}: {reason}. Expected "
            '{"question": "...", "choices": ["...", "..."], "answer": 1}, the answer from 0 or as a letter.'
        )

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise refused(f"it is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise refused("it has no question")
    choices = row.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise refused(f"its choices are {choices!r}, no list of 2 to {len(LETTERS)}")
    answer = row.get("answer")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        answer = letters.index(answer.strip().upper())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise refused(f"its answer is {row.get('answer')!r}, none of its {len(choices)} choices")
    return Question(question=row["question"], choices=tuple(map(str, choices)), right=answer)
