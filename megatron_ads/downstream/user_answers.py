"""What a model said of users at anchors: names, interests and lines of text, from its answers and the rows they are to.

Answers are JSON lines as `megatron-ads evaluate --answers FILE` writes them, or the Parquet files of a labelling job:
``id`` and ``text``, and ``beams`` where there are several answers to a row. A row says its user and its anchor in its
facts; several rows of one user and anchor, such as those of two tasks, are taken together.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.source_files import JSON_LINES, parts_of
from megatron_ads.data.table_fields import time_of
from megatron_ads.data.table_files import Cells, column_types, read_table
from megatron_ads.downstream.anchored_rows import ANCHOR
from megatron_ads.downstream.examples import Place, place_at
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import each_once
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import ReadFailure, split_reasoning
from megatron_ads.tasks.answer_texts import texts_of_answer
from megatron_ads.tasks.next_advertiser import Prediction, Ranking
from megatron_ads.tasks.registry import TASKS, read_answer
from megatron_ads.tasks.user_profile import Profile

_COLUMNS = ("id", "text", "beams")


@dataclass(frozen=True, kw_only=True, slots=True)
class UserAnswer:
    """What was said of one user at one anchor; all empty if nothing of it could be read."""

    user: str
    anchor: int
    """Whole seconds since 1970."""
    advertisers: tuple[str, ...] = ()
    """The likeliest first, each once, as written."""
    interests: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    """All texts, the most important first; reasoning is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadAnswers:
    """All answers, and what was not read."""

    answers: list[UserAnswer]
    """Of each user and anchor one, in the order of the rows."""
    unreadable: Counter[str]
    """Answers that are not in their task's form, by the reason."""
    unanswered: int
    """Rows without an answer."""


def read_user_answers(rows_file: Path, answers_path: Path) -> ReadAnswers:
    """Return what a model said of the users of some rows.

    Args:
        rows_file: JSON lines of `megatron-ads downstream rows`.
        answers_path: A file, or a folder of Parquet files.

    Raises:
        DataError: If a file cannot be read, a row says no user or anchor, an answer is to none of the rows or to one
            that has an answer already, or no row has one.
    """
    rows = {row.id: row for row in jsonl_rows(rows_file)}
    places = {row.id: place_of(row) for row in rows.values()}
    said: dict[str, UserAnswer] = {}
    unreadable: Counter[str] = Counter()
    for where, cells in _cells(answers_path):
        row = rows.get(str(cells.get("id")))
        if row is None:
            raise DataError(f"{where} answers {cells.get('id')!r:.80}, which is no row of {rows_file}. Remove it.")
        if row.id in said:
            raise DataError(f"{where} answers {row.id!r:.80} once more. Keep one of the answers.")
        said[row.id] = _read(row, places[row.id], cells, where, unreadable)
    if not said:
        raise DataError(f"{answers_path} answers none of the {len(rows)} rows of {rows_file}. Name their answers.")
    together: dict[Place, list[UserAnswer]] = {}
    for name in rows:
        if name in said:
            together.setdefault(places[name], []).append(said[name])
    answers = [_joined(of_one) for of_one in together.values()]
    return ReadAnswers(answers=answers, unreadable=unreadable, unanswered=len(rows) - len(said))


def place_of(row: ChatRow) -> Place:
    """Return the user and the anchor that a row is about.

    Raises:
        DataError: If its facts do not say both.
    """
    user, anchor = row.facts.get(Fact.user), row.facts.get(ANCHOR)
    if not isinstance(user, str) or not user or not isinstance(anchor, str):
        raise DataError(
            f"row {row.id!r:.80} does not say its user and its anchor in its facts. Write rows with `megatron-ads "
            "downstream rows`."
        )
    try:
        return place_at(user, time_of({ANCHOR: anchor}, ANCHOR))
    except BadRowError as error:
        raise DataError(f"row {row.id!r:.80}: {error}") from None


def _cells(path: Path) -> Iterator[tuple[str, Cells]]:
    """Yield the cells of each answer, and where it is."""
    for part in parts_of(path):
        there = _COLUMNS if part.form in JSON_LINES else column_types(part, 0)
        for number, cells in read_table(part, [name for name in _COLUMNS if name in there]):
            where = f"{part.file}, row {number}"
            if isinstance(cells, BadRowError):
                raise DataError(f"{where}: {cells}")
            yield where, cells


def _read(row: ChatRow, place: Place, cells: Cells, where: str, unreadable: Counter[str]) -> UserAnswer:
    text, user, anchor = cells.get("text"), *place
    if not isinstance(text, str | None):
        raise DataError(f"{where}: text is {text!r:.80}; it must be the answer, a text.")
    beams = [_text_of(beam, where) for beam in _list(cells.get("beams"), where)]
    answer = read_answer(row, text or "") if row.task in TASKS else None
    if text is None or isinstance(answer, ReadFailure):
        unreadable["no text" if text is None else str(answer)] += 1
        return UserAnswer(user=user, anchor=anchor)
    advertisers, interests = _names(row, answer, beams), _interests(answer)
    reasoning = split_reasoning(text, required=False)
    thought = "" if isinstance(reasoning, ReadFailure) else reasoning.reasoning
    lines = [*advertisers, *interests] if advertisers else texts_of_answer(row, text)
    return UserAnswer(
        user=user,
        anchor=anchor,
        advertisers=advertisers,
        interests=interests,
        lines=tuple(line for line in (*lines, thought) if line),
    )


def _names(row: ChatRow, answer: Any, beams: list[str]) -> tuple[str, ...]:
    """Return the advertisers that an answer names, with those of its other beams."""
    if isinstance(answer, Ranking):
        return each_once(answer.advertisers)
    if not isinstance(answer, Prediction):
        return ()
    others = [read_answer(row, text) for text in beams]
    return each_once(one.advertiser for one in (answer, *others) if isinstance(one, Prediction))


def _interests(answer: Any) -> tuple[str, ...]:
    if isinstance(answer, Profile):
        return each_once((*answer.intents, *answer.interests))
    return each_once(answer.interests) if isinstance(answer, Ranking) else ()


def _list(beams: Any, where: str) -> list[Any]:
    try:
        found = json.loads(beams) if isinstance(beams, str) else beams or []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise DataError(f"{where}: beams is {beams!r:.80}; it must be a list of objects with text.")
    return found


def _text_of(beam: Any, where: str) -> str:
    text = beam.get("text") if isinstance(beam, Mapping) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: beams has {beam!r:.80}; it must be an object with text.")
    return text


def _joined(answers: list[UserAnswer]) -> UserAnswer:
    """Return several answers about one user and anchor as one."""
    if len(answers) == 1:
        return answers[0]
    return UserAnswer(
        user=answers[0].user,
        anchor=answers[0].anchor,
        advertisers=each_once(name for one in answers for name in one.advertisers),
        interests=each_once(name for one in answers for name in one.interests),
        lines=tuple(dict.fromkeys(line for one in answers for line in one.lines)),
    )
