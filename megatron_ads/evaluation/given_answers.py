"""Answers that were made elsewhere: a JSONL file with the ids of held-out rows, which is read and never written.

One object a line; what `megatron-ads evaluate --model DIR --answers FILE` writes is of this form:

    {"id": "r1", "text": "<think>...</think><Label>Good</Label>"}

``task`` and ``source`` tell rows apart that share an id. ``ended`` says whether the model ended the answer itself.
``beams`` are several answers to the row, the best first, with ``text``, ``log_probability`` and ``score``. ``expected``
is the row's label: answers to another row of the same id are noticed by it. Further fields are left alone.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.data.jsonl import read_records
from megatron_ads.errors import DataError
from megatron_ads.evaluation.answer_records import Answer, AnswerBeam
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow

logger = get_logger(__name__)
_NAMED = 3
"""So many ids are told of those that something is wrong with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenAnswers:
    """What an evaluation is of where no model is asked."""

    file: Path


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    row: int | None
    """Its place among the held-out rows; None: there is none of this id."""
    name: str
    fields: Mapping[str, Any]


def read_given_answers(file: Path, rows: Sequence[ChatRow], *, allow_missing: bool = False) -> list[Answer]:
    """Return the answers of a file to held-out rows, in the order of the rows.

    Args:
        file: In the form above.
        rows: Every one must have an answer.
        allow_missing: Leave rows without an answer out, which is logged, instead of refusing the file.

    Raises:
        DataError: If the file cannot be read, an answer is to none of the rows or to a row that has one already, or a
            row has none; and with ``allow_missing``, if none has.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        numbers[row.id].append(number)
    lines = list(read_records(file, lambda number, fields: _read_line(number, fields, rows, numbers)))
    _require_known(file, lines, rows)
    answers = {}
    for line in lines:
        assert line.row is not None, "unknown ones were refused"
        answers[line.row] = _answer(file, line, rows[line.row])
    missing = [row.id for number, row in enumerate(rows) if number not in answers]
    if missing and not (allow_missing and answers):
        raise DataError(
            f"{file} has no answer to {len(missing)} of {len(rows)} held-out rows: {_some(missing)}. Add them"
            f"{', or leave these rows out with --allow-missing' if answers else ''}."
        )
    if missing:
        logger.warning("%s has no answer to %d of %d rows, which are left out.", file, len(missing), len(rows))
    return [answers[number] for number in sorted(answers)]


def _read_line(
    number: int, fields: Mapping[str, Any], rows: Sequence[ChatRow], numbers: Mapping[str, Sequence[int]]
) -> _Line:
    name = fields.get("id")
    name = str(name) if type(name) is int else name  # ids that are numbers lose their quotes in many a tool
    if not isinstance(name, str):
        raise DataError(f"id is {name!r:.80}; it must be the id of a held-out row.")
    if not isinstance(fields.get("text"), str):
        raise DataError(f"text is {fields.get('text')!r:.80}; it must be the answer to the row, a text.")
    if not isinstance(fields.get("ended"), bool | None):
        raise DataError(f"ended is {fields['ended']!r:.80}; it must be true or false.")
    found = [row for row in numbers.get(name, ()) if _may_be_to(rows[row], fields)]
    if len(found) > 1:
        raise DataError(f"{len(found)} held-out rows have the id {name!r:.80}. Add their task, or their source.")
    return _Line(number, found[0] if found else None, name, fields)


def _may_be_to(row: ChatRow, fields: Mapping[str, Any]) -> bool:
    """Return whether a line names no other task or source than a row's, as far as it is known."""
    told = ((fields.get("task"), row.task), (fields.get("source"), row.source))
    return all(not said or not true or said == true for said, true in told)


def _require_known(file: Path, lines: Sequence[_Line], rows: Sequence[ChatRow]) -> None:
    """Refuse answers to no row, and several answers to one row."""
    if unknown := [f"{line.name} (line {line.number})" for line in lines if line.row is None]:
        example = f", such as {rows[0].id!r}" if rows else ""
        raise DataError(
            f"{file} answers {len(unknown)} rows that the recipe does not hold out: {_some(unknown)}. Remove them, or "
            f"evaluate with the recipe and settings that hold them out; the {len(rows)} rows here have ids{example}."
        )
    of_rows = defaultdict(list)
    for line in lines:
        of_rows[line.row].append(line)
    repeated = [several for several in of_rows.values() if len(several) > 1]
    if repeated:
        named = [f"{of[0].name} (lines {' and '.join(str(line.number) for line in of[:2])})" for of in repeated]
        raise DataError(f"{file} has several answers to {len(repeated)} rows: {_some(named)}. Keep one of each.")


def _answer(file: Path, line: _Line, row: ChatRow) -> Answer:
    expected = line.fields.get("expected")
    if expected is not None and row.label is not None and expected != row.label:
        raise DataError(
            f"{file}, row {line.number}: {line.name!r:.80} is expected to be {expected!r:.80}, and the held-out row is "
            f"{row.label!r:.80}, so it is another row. Evaluate with the recipe and settings that it was answered for."
        )
    beams = line.fields.get("beams") or []
    if not (isinstance(beams, list) and all(map(_is_beam, beams))):
        raise DataError(
            f"{file}, row {line.number}: beams is {beams!r:.80}; it must be a list of objects with text, "
            "log_probability and score."
        )
    return Answer(row, line.fields["text"], line.fields.get("ended"), tuple(AnswerBeam(**beam) for beam in beams))


def _is_beam(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() - {"samples"} != {"text", "log_probability", "score"}:
        return False
    numbers = (value["log_probability"], value["score"], value.get("samples", 1))
    return isinstance(value["text"], str) and all(type(number) in (int, float) for number in numbers)


def _some(names: Collection[str]) -> str:
    """Return a few names, and that there are more."""
    first = [f"{name:.80}" for name in list(names)[:_NAMED]]
    return ", ".join(first) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
