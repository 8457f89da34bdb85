"""Rows become problems with answers: finds the columns, and names or counts every bad row.

`prompts.py` calls it. `sources.py` gives the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dapo_async.config import Source
from dapo_async.data.cells import ABSENT, STRUCT, damage, is_blank, json_kind, lookup, text_of
from dapo_async.data.conversation import ASSISTANT, USER, Turn, turn_path, turns_of
from dapo_async.data.places import Places, column_names
from dapo_async.data.presets import Preset, answer_of
from dapo_async.data.screening import Problem, RowCounts
from dapo_async.data.sources import read_rows
from dapo_async.data.templates import Template

# The columns without a preset: those of this project, of verl, of TRL and of ShareGPT.
PROMPT_COLUMNS = ("prompt", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth")
SOURCE_COLUMN = "data_source"  # names the data set that a row is from; rows may lack it
PROMPT_KNOB, ANSWER_KNOB = "data.prompt_key", "data.answer_key"
NO_USER_TURN = "not ending in a user turn"
MAX_ANSWER = 20_000  # characters; comparing a longer one would take seconds per response
LONG_ANSWER = f"with an answer of more than {MAX_ANSWER:,} characters"


class ProblemReader:
    """The problems of one source, in its order. Iterate once."""

    def __init__(
        self,
        source: Source,
        preset: Preset | None,
        *,
        prompt_key: str | None,
        answer_key: str | None,
        with_answers: bool = True,
    ) -> None:
        self.places = Places()
        self.left_out = RowCounts(self.places)
        # The column of the last user turn, of the first chat of several turns that ends in a user
        # turn (True) and of the first one that does not (False).
        self.user_turns: dict[bool, str] = {}
        self._source, self._preset, self._with_answers = source, preset, with_answers
        prompts = preset.problem if preset else PROMPT_COLUMNS
        answers = preset.answer if preset else ANSWER_COLUMNS
        self._keys = {PROMPT_KNOB: (prompt_key,) if prompt_key else prompts}
        if with_answers:
            self._keys[ANSWER_KNOB] = (answer_key,) if answer_key else answers
        self._wrapped = Template(preset.wrapped) if preset and preset.wrapped else None
        self._num_missing = 0
        self._first_missing: tuple[str, str] = ("", "")  # its place, and what it lacks

    def __iter__(self) -> Iterator[Problem]:
        """Every row with a problem and an answer; the others are counted in `left_out`.

        Raises ValueError for a column that holds no text, number or chat, and at the end when rows
        lacked a column.
        """
        columns = [*self._keys.values(), (SOURCE_COLUMN,)]
        rows = read_rows(self._source, columns=columns, places=self.places)
        for row, values in enumerate(rows):
            problem = self._problem(row, values)
            if isinstance(problem, Problem):
                yield problem
            elif problem is not None:
                self.left_out.add(problem, row)
        if self._num_missing:
            place, what = self._first_missing
            more = f", the first of {self._num_missing} such rows," if self._num_missing > 1 else ""
            raise ValueError(f"{place}{more} {what}")

    def _problem(self, row: int, values: Mapping[str, Any]) -> Problem | str | None:
        """The problem of a row; or why it is left out; or None for a row that lacks a column."""
        prompt = _first_found(values, self._keys[PROMPT_KNOB])
        if prompt is None:
            self._count_missing(row, values, PROMPT_KNOB)
            return None
        answer = ""
        if self._with_answers:
            gold = _first_found(values, self._keys[ANSWER_KNOB])
            if gold is None:
                self._count_missing(row, values, ANSWER_KNOB)
                return None
            if isinstance(gold[1], str) and len(gold[1]) > MAX_ANSWER:
                return LONG_ANSWER
            answer = self._answer(row, *gold)
        *context, (role, text) = self._turns(row, *prompt)
        if role != USER:
            return NO_USER_TURN
        text = self._wrapped.without(text) if self._wrapped else text
        if is_blank(text) or (self._with_answers and is_blank(answer)):
            return "empty"
        origin = values.get(SOURCE_COLUMN, "") if self._with_answers else ""
        if not isinstance(origin, str):
            origin = self._text(row, SOURCE_COLUMN, origin, knob=None)
        texts = "\n".join([text, answer, origin, *(turn.content for turn in context)])
        return damage(texts) or Problem(row, text, answer, origin, tuple(context))

    def _count_missing(self, row: int, values: Mapping[str, Any], knob: str) -> None:
        self._num_missing += 1
        if self._num_missing > 1:
            return
        example = values if self.places.example is None else self.places.example
        there = column_names(example, chats=knob == PROMPT_KNOB)
        remedy = f"set {knob} to one of {there}" if there else "the row has no text: remove it"
        what = f"has no column {self._keys[knob][0]!r}; {remedy}"
        self._first_missing = (self.places.of(row), what)

    def _turns(self, row: int, key: str, value: Any) -> tuple[Turn, ...]:
        """The turns of a prompt; of a text one user turn. Never empty."""
        if isinstance(value, str) and not STRUCT.match(value):
            return (Turn(USER, value),)
        try:
            turns = turns_of(value)
        except ValueError as error:
            raise ValueError(f"column {key!r} in {self.places.of(row)} {error}") from error
        if turns is None:
            text = "" if value == [] else self._text(row, key, value, knob=PROMPT_KNOB)
            return (Turn(USER, text),)
        users = [at for at, turn in enumerate(turns) if turn.role == USER]
        if len(turns) == 1 or not users:
            return turns
        column = f"{key}.{turn_path(value, users[-1] - len(turns))}"
        if turns[-1].role == ASSISTANT and is_blank(turns[-1].content):
            turns = turns[:-1]  # an empty turn is the place of the response
        self.user_turns.setdefault(turns[-1].role == USER, column)
        return turns

    def _answer(self, row: int, key: str, value: Any) -> str:
        form = self._preset.answer_form.get(key) if self._preset else None
        text = value if isinstance(value, str) else self._text(row, key, value, knob=ANSWER_KNOB)
        if STRUCT.match(text) and (kind := json_kind(text)) is not None:
            raise self._wrong_type(row, key, text, f"{kind} as JSON text", ANSWER_KNOB)
        return answer_of(text, form)

    def _text(self, row: int, key: str, value: Any, *, knob: str | None) -> str:
        text = text_of(value)
        if text is None:
            raise self._wrong_type(row, key, value, type(value).__name__, knob)
        return text

    def _wrong_type(
        self, row: int, key: str, value: Any, kind: str, knob: str | None
    ) -> ValueError:
        remedy = "write text or a number"
        if knob is not None:
            inside = column_names({key: value}, chats=knob == PROMPT_KNOB)
            other = f"one of {inside}" if ", " in inside else inside or "another column"
            remedy += f", or set {knob} to {other}"
        return ValueError(f"column {key!r} in {self.places.of(row)} holds a {kind}; {remedy}")


def _first_found(values: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of the columns that a row has, and its value; None when it has none."""
    for key in keys:
        if key in values:
            return key, values[key]
        if "." in key and (value := lookup(values, key)) is not ABSENT:
            return key, value
    return None
