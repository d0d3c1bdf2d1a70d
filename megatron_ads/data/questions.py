"""Rows that ask, of any source, read one by one from any row on: their answers, if they have any, are left out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ads.config.data import SourceConfig, SourceKind
from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.event_tables import ANSWER_DAYS, event_rows, read_anchors
from megatron_ads.data.source_files import Part, RowOrigin, open_text
from megatron_ads.data.sources import divided, read_source
from megatron_ads.data.user_features import view_chooser
from megatron_ads.data.verl_form import VERL_FIELDS
from megatron_ads.errors import require
from megatron_ads.rows import FACTS_OF_ANSWERS, ChatRow, Message, Role
from megatron_ads.tasks.answer_format import NOTHING

_OF_ANSWERS = FACTS_OF_ANSWERS.union(VERL_FIELDS)
"""Facts that tell an answer; verl's fields are there as they came."""


@dataclass(frozen=True, slots=True)
class BadQuestion:
    """A row that cannot be asked."""

    id: str
    reason: str
    message: str


def questions(
    source: SourceConfig, section: str, *, seed: int, first: int = 0
) -> Iterator[ChatRow | BadQuestion | None]:
    """Yield every row of a source, in order; None for one that the source's ``values`` leave out.

    Args:
        source: Its tables need no columns for the answer, and its logs of events no conversion after the anchor. Its
            ``rows`` limit those of files that are read, whatever becomes of them.
        section: Its name in the recipe.
        seed: Of generated rows.
        first: How many rows to pass over.

    Raises:
        ConfigError: If a setting has no effect here.
        DataError: If it cannot be read.
    """
    for name, why in (
        ("rejected", "rows that cannot be asked are among the labels, with the reason"),
        ("variant", "variants are made from true answers"),
    ):
        require(
            getattr(source, name) is None,
            f"{section}.{name} is {getattr(source, name)!r}, which has no effect here: {why}. Remove it.",
        )
    reader = divided(replace(source, rows=None), answered=False)
    if reader is None:
        yield from map(without_answer, islice(_all_rows(source, seed), first, None))
        return
    contents = ((part, number, content) for part in reader.parts for number, content in reader.read(part, None))
    for part, number, content in islice(contents, first, source.rows):
        origin = RowOrigin(part, number)
        try:
            if isinstance(content, BadRowError):
                raise content
            row = reader.make(origin, content)
        except BadRowError as error:
            yield BadQuestion(_id_of(source, content) or origin.row_id, str(error.reason), str(error))
        else:
            yield None if row is None else without_answer(row)


def _id_of(source: SourceConfig, content: object) -> str:
    """Return the id of a row that cannot be used; empty where it has none, or that cannot be used either."""
    column = source.columns.get("id") if source.kind is SourceKind.table else "id"
    given = content.get(column) if isinstance(content, Mapping) and column is not None else None
    return str(given).strip() if isinstance(given, str | int) and not isinstance(given, bool) else ""


def count_rows(source: SourceConfig) -> int:
    """Return about how many rows a source has, to say how long the rest of them takes; 0 where that is not known."""
    if (reader := divided(replace(source, rows=None, events=None), answered=False)) is None:
        return source.rows or 0
    counted = sum(map(_rows_of_part, reader.parts))
    return counted if source.rows is None else min(counted, source.rows)


def _rows_of_part(part: Part) -> int:
    try:
        if part.form in (".parquet", ".pq"):
            return int(pq.read_metadata(part.file).num_rows)
        with open_text(part.file) as lines:
            return sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
    except (pa.ArrowException, OSError):  # whoever reads its rows says what is wrong
        return 0


def _all_rows(source: SourceConfig, seed: int) -> Iterator[ChatRow]:
    if source.kind is not SourceKind.table or not source.anchor_dates:
        return iter(read_source(source, seed=seed))
    assert source.path is not None, "checked with the recipe"
    rows = event_rows(
        Path(source.path),
        columns=source.columns,
        anchors=read_anchors(source.anchor_dates, source.anchor_spacing_days),
        view_of=view_chooser(source.history),
        answer_days=source.answer_days or ANSWER_DAYS,
        values=source.values,
        limit=source.rows,
        answered=False,
    )
    return iter(rows)


def without_answer(row: ChatRow) -> ChatRow:
    """Return a row whose target says nothing, and whose facts tell no answer."""
    facts = {name: value for name, value in row.facts.items() if name not in _OF_ANSWERS}
    return replace(row, messages=(*row.prompt, Message(Role.assistant, NOTHING)), label=None, facts=facts)
