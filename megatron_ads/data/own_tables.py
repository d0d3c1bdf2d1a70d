"""A team's own logs as rows: columns of any names, mapped to the fields of a task, every row checked.

Fields of a task are declared here; the columns that hold them, in the recipe. A row that cannot be used has a named
reason and its number; it ends the reading, or is counted and written aside where the recipe names a file for that.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ads.config.data import AdsTask
from megatron_ads.data.bad_rows import BadRow, BadRowError, RejectedRows, require_new
from megatron_ads.data.rows import ChatRow, Message, Role
from megatron_ads.data.table_file import Cell, read_table
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.tasks import relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Flag, Label
from megatron_ads.tasks.text_rows import facts_of_text_row

Cells = Mapping[str, Cell]
"""By field, not by column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What rows of a task are made from."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[str, Cells], ChatRow]
    """From a row's id and its fields."""


def table_rows(
    file: Path,
    *,
    columns: Mapping[str, str],
    task: AdsTask | None = None,
    rejected: Path | None = None,
    limit: int | None = None,
) -> list[ChatRow]:
    """Return the usable rows of a file, the first ``limit`` of them.

    Args:
        file: A JSONL, Parquet, CSV or TSV file.
        columns: Field -> the column that holds it.
        task: What the rows ask for; None: they have a prompt and a target already.
        rejected: Where to write rows that cannot be used; None: the first one is an error.
        limit: None is all.

    Raises:
        ConfigError: If a field is unknown or missing, or rows of the task cannot be made from a table.
        DataError: If the file cannot be read or holds no usable row; with the row number, for the first bad row.
    """
    form = _form(task, columns)
    bad = RejectedRows(file, rejected)
    rows: list[ChatRow] = []
    first_seen: dict[str, int] = {}
    for number, cells in read_table(file, list(dict.fromkeys(columns.values()))):
        if len(rows) == limit:
            break
        try:
            if isinstance(cells, BadRowError):
                raise cells
            row = _make_row(form, {name: cells[column] for name, column in columns.items()}, f"{file.name}-{number}")
            require_new(row.id, number, first_seen)
        except BadRowError as error:
            bad.add(number, error, None if isinstance(cells, BadRowError) else cells)
            continue
        rows.append(row)
    bad.finish(used=len(rows))
    return rows


def _form(task: AdsTask | None, columns: Mapping[str, str]) -> Form:
    if task not in FORMS:
        known = ", ".join(str(name) for name in FORMS if name is not None)
        raise ConfigError(f"a table cannot be read as rows of {task}; known: {known}, or none for prompt and target.")
    form = FORMS[task]
    check_columns(columns, required=form.required, optional=form.optional)
    return form


def check_columns(columns: Mapping[str, str], *, required: Sequence[str], optional: Sequence[str]) -> None:
    """Refuse a mapping that names an unknown field, or leaves a required one out.

    Raises:
        ConfigError: Naming the field.
    """
    known = [*required, *optional]
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"columns names the field {name!r}; known: {', '.join(known)}.{hint}")
    missing = [name for name in required if name not in columns]
    if missing:
        raise ConfigError(f"columns does not say which column holds {', '.join(missing)}. Add it: {missing[0]}: NAME.")


def _make_row(form: Form, cells: Cells, default_id: str) -> ChatRow:
    for name in form.required:
        text_of(cells, name)
    row_id = optional_text(cells, "id") or default_id
    try:
        return form.make(row_id, cells)
    except BadRowError:
        raise
    except DataError as error:  # from the task: the text holds what the answer's form needs for itself
        raise BadRowError(BadRow.unusable_text, str(error)) from None


def text_of(cells: Cells, name: str) -> str:
    """Return a cell's text; numbers are written out.

    Raises:
        BadRowError: If there is none.
    """
    cell = cells.get(name)
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return str(cell)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise BadRowError(BadRow.empty_text, f"{name} is {cell!r}; it must be text that is not empty.")
    if not isinstance(cell, str):
        raise BadRowError(BadRow.wrong_type, f"{name} is {cell!r:.80}; it must be text.")
    return cell.strip()


def optional_text(cells: Cells, name: str) -> str:
    """Return a cell's text, empty where there is none."""
    cell = cells.get(name)
    return "" if cell is None or cell == "" else text_of(cells, name)


def _pair_row(row_id: str, cells: Cells) -> ChatRow:
    ad = Ad(text_of(cells, "title"), optional_text(cells, "description"), optional_text(cells, "seller"))
    flags = {name: _one_of(cells, name, tuple(Flag)) for name in ("location", "quality") if optional_text(cells, name)}
    label = _one_of(cells, "label", tuple(Label))
    query, reasoning = text_of(cells, "query"), optional_text(cells, "reasoning")
    return relevance.chat_row(row_id, query, ad, Label(label), reasoning, **{k: Flag(v) for k, v in flags.items()})


def _one_of(cells: Cells, name: str, known: tuple[str, ...]) -> str:
    """Return the label that a cell holds, whatever its capitals."""
    given = text_of(cells, name)
    found = next((str(label) for label in known if label.lower() == given.lower()), None)
    if found is None:
        raise BadRowError(BadRow.unknown_label, f"{name} is {given!r:.80}; known: {', '.join(known)}.")
    return found


def _chat_row(row_id: str, cells: Cells) -> ChatRow:
    messages = (
        Message(Role.user, text_of(cells, "prompt")),
        Message(Role.assistant, text_of(cells, "target")),
    )
    row = ChatRow(
        id=row_id,
        task=optional_text(cells, "task") or "chat",
        messages=messages,
        group=optional_text(cells, "group"),
        label=optional_text(cells, "label") or None,
    )
    return facts_of_text_row(replace(row, weight=_weight(cells)))


def _weight(cells: Cells) -> float:
    given = optional_text(cells, "weight")
    try:
        weight = float(given or 1.0)
    except ValueError:
        raise BadRowError(BadRow.wrong_type, f"weight is {given!r:.80}; it must be a number, 0 or above.") from None
    if not 0 <= weight < float("inf"):
        raise BadRowError(BadRow.wrong_type, f"weight is {given}; it must be a number, 0 or above.")
    return weight


FORMS: dict[AdsTask | None, Form] = {
    None: Form(
        required=("prompt", "target"), optional=("id", "task", "group", "label", "weight"), make=_chat_row
    ),
    AdsTask.query_ad_relevance: Form(
        required=("query", "title", "label"),
        optional=("id", "description", "seller", "reasoning", "location", "quality"),
        make=_pair_row,
    ),
}  # fmt: skip
"""What can be read from a table with one row an example."""
