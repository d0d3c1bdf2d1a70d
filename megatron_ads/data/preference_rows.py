"""Read preferences, Parquet or JSONL: a prompt with a chosen answer and rejected ones; other columns are not read.

    {"prompt": "...", "chosen": "...", "rejected": ["...", "..."]}

``prompt`` is a text, the user's, or a conversation; ``rejected`` is one answer or several. The forms of TRL
(its documentation, "Dataset formats and types", preference) are read too: answers as messages, ``[{"role":
"assistant", "content": "..."}]``, and without a ``prompt`` whole conversations that differ in their last message. A row
may have ``id, task, weight, group, label, facts`` as in ``megatron_ads.data.jsonl``.

The row has the chosen answer as its target, and the others as its fact ``rejected``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ads.data.bad_rows import BadRow, BadRowError, RowReader, usable_rows
from megatron_ads.data.jsonl import parse_row
from megatron_ads.data.source_files import JSON_LINES, Part, RowOrigin, Span, parts_of
from megatron_ads.data.table_files import Cells, ReadRow, column_types, read_table
from megatron_ads.data.verl_form import object_in
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Fact, Role
from megatron_ads.tasks.text_rows import facts_of_text_row

_ANSWERS = ("chosen", "rejected")
_ROW_FIELDS = ("id", "task", "weight", "group", "label", "facts")
FIELDS = ("prompt", *_ANSWERS, *_ROW_FIELDS)

Turns = list[Any]
"""Messages as a file has them, before they are checked."""


def preference_rows(path: Path, *, limit: int | None = None, rejected: Path | None = None) -> list[ChatRow]:
    """Return the rows of a file, or of the files of a folder or glob, the first ``limit`` of them.

    With ``rejected``, rows that cannot be used are counted and written to that file.

    Raises:
        DataError: If a file cannot be read or lacks a column; with the row number, for the first row that cannot be
            used, unless ``rejected`` says where to write it; if there is no usable row.
    """
    return usable_rows(preference_reader(path), rejected=rejected, limit=limit)


def preference_reader(path: Path) -> RowReader[Cells]:
    """Return how the rows of ``preference_rows`` are read."""

    def make(origin: RowOrigin, cells: Cells) -> ChatRow:
        return facts_of_text_row(parse_row(from_preference(cells), default_id=origin.row_id))

    return RowReader(path=path, parts=parts_of(path), read=_read, make=make)


def _read(part: Part, span: Span | None) -> Iterator[tuple[int, ReadRow]]:
    """Yield the fields that a file has; a missing one and null are the same."""
    there = FIELDS if part.form in JSON_LINES else column_types(part, 0)
    if absent := [name for name in _ANSWERS if name not in there]:
        raise DataError(f"{part.file} has no column {absent[0]!r}; kind preference reads {', '.join(FIELDS)}.")
    for number, row in read_table(part, [name for name in FIELDS if name in there], span):
        if isinstance(row, BadRowError):
            yield number, row
        else:
            yield number, {name: cell for name, cell in row.items() if cell is not None}


def from_preference(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row in this project's form.

    Raises:
        BadRowError: Naming the field that is missing or of another type, or why it tells no preference.
    """
    prompt = fields.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": str(Role.user), "content": prompt}]
    before, chosen = _answer(fields.get("chosen"), "chosen")
    given = fields.get("rejected")
    several = isinstance(given, list) and not any(isinstance(item, dict) for item in given)
    rejected = given if isinstance(given, list) and several else [] if given is None else [given]
    others = [_answer(item, "rejected") for item in rejected]
    texts = [text for _, text in others]
    if not texts or chosen in texts:
        what = "has the chosen answer among its rejected ones" if texts else "has no rejected answer"
        raise BadRowError(BadRow.no_preference, f"{what}.")
    if any(turns != before for turns, _ in others):
        message = "chosen and rejected do not continue the same messages. Give each the same ones, or a prompt."
        raise BadRowError(BadRow.no_preference, message)
    if not isinstance(prompt, list) or not (prompt or before):
        message = f"prompt is {fields.get('prompt')!r:.80}; it must be text or messages, unless the answers have them."
        raise BadRowError(BadRow.no_target, message)
    messages = [*prompt, *before, {"role": str(Role.assistant), "content": chosen}]
    row = {name: fields[name] for name in _ROW_FIELDS if name in fields}
    return row | {"messages": messages, "facts": {**object_in(fields, "facts"), Fact.rejected: texts}}


def _answer(given: Any, name: str) -> tuple[Turns, str]:
    """Return the messages before an answer, and its text."""
    before, answer = [], given
    if isinstance(given, list) and given and isinstance(given[-1], dict) and given[-1].get("role") == Role.assistant:
        before, answer = given[:-1], given[-1].get("content")
    if not isinstance(answer, str):
        message = f"{name} is {given!r:.80}; it must be text, or messages that end with the assistant's."
        raise BadRowError(BadRow.wrong_type, message)
    if not answer.strip():
        raise BadRowError(BadRow.empty_text, f"{name} is {answer!r:.60}; it must be text that is not empty.")
    return before, answer
