"""Read chat rows of your own from a JSONL file, checking every row before it is used.

One object a line:

    {"id": "r1", "task": "query_ad_relevance", "messages": [{"role": "user",
     "content": "..."}, {"role": "assistant", "content": "<think>...</think><Label>Good</Label>"}],
     "weight": 1.0, "group": "what validation must not share", "label": "Good",
     "facts": {"query": "...", "ground_truth": {"label": "Good"}}}

``messages`` is required and ends with the assistant's target; the rest has defaults. ``facts`` are those of
``megatron_ads.rows.Fact``; a row of an ads task without them has those that its texts tell.

Rows in the form of verl are read too, as ``verl_form`` has it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ads.data.bad_rows import BadRow, BadRowError, Made, RowReader, usable_rows, usable_weight
from megatron_ads.data.source_files import JSON_LINES, RowOrigin, Span, open_text, parts_of
from megatron_ads.data.verl_form import VERL_FIELDS, from_verl, object_in, text_in
from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow, Message, Role, wrong_fact
from megatron_ads.tasks.answer_format import NOTHING
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.text_rows import facts_of_text_row

MAX_LINE_BYTES = 10_000_000
_KEYS = frozenset({"id", "task", "messages", "weight", "group", "label", "facts"})


def read_records(file: Path, read: Callable[[int, dict[str, Any]], Made]) -> Iterator[Made]:
    """Yield what ``read`` returns for the number, from 1, and the object of every line that is not empty.

    Memory does not grow with the file.

    Raises:
        DataError: If there is no such file; with the row number, if a line is too long, not UTF-8, not JSON, or no
            object, or ``read`` raises it.
    """
    for number, record in read_lines(file):
        try:
            if isinstance(record, BadRowError):
                raise record
            made = read(number, record)
        except DataError as error:
            raise DataError(f"{file}, row {number}: {error}") from None
        yield made


def read_lines(
    file: Path, longest: int | None = None, span: Span | None = None
) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    """Yield the number and object of every line that is not empty, with the reason in place of one that cannot be read.

    Args:
        longest: Bytes of the longest line that is kept in memory; None: ``MAX_LINE_BYTES``.
        span: Which lines of an uncompressed file; None: all.

    Raises:
        DataError: If there is no such file, or it cannot be read as text.
    """
    longest = longest or MAX_LINE_BYTES
    with open_text(file) as lines:

        def next_line(most: int) -> bytes:
            try:
                return lines.readline(most)
            except OSError as error:
                raise DataError(f"{file} cannot be read to its end ({error}). Copy or write it again.") from None

        first = 1 if span is None else _seek(lines, span)
        for number, line in enumerate(iter(lambda: next_line(longest + 1), b""), first):
            begins = 0 if span is None else lines.tell() - len(line)
            if span is not None and begins >= span.end:
                return
            if len(line) > longest:
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = next_line(longest)
                message = f"longer than {longest:,} bytes. Shorten or remove it."
                yield number, BadRowError(BadRow.cell_too_long, message)
            elif line.strip():
                yield number, _parse_line(line)


def _seek(lines: BinaryIO, span: Span) -> int:
    """Go to the first line that begins in a stretch of an open file; return its number."""
    if span.start == 0:
        return 1
    lines.seek(span.start - 1)
    if lines.read(1) == b"\n":
        return span.newlines_before + 1
    while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass  # a line that begins in the stretch before
    return span.newlines_before + 2


def _constant(name: str) -> float | None:
    """Return what JSON has no name for: NaN, as pandas writes it, is a missing value."""
    return None if name == "NaN" else float(name)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, unless one of its names comes twice: which value is meant cannot be known."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise BadRowError(BadRow.unreadable_row, f"holds {repeated!r:.80} more than once. Remove or rename one.")
    return found


def _parse_line(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        parsed = json.loads(line, parse_constant=_constant, object_pairs_hook=_each_once)
        if b"\\u" in line:  # an escape alone may stand for what no file can hold
            json.dumps(parsed, ensure_ascii=False).encode()
    except BadRowError as error:
        return error
    except UnicodeEncodeError:
        return BadRowError(BadRow.invalid_utf8, f"{_not_text(parsed)} holds half a surrogate pair, which is no text.")
    except UnicodeDecodeError as error:
        return BadRowError(BadRow.invalid_utf8, f"not UTF-8 at byte {error.start}. Save the file as UTF-8.")
    except (ValueError, RecursionError) as error:  # ValueError alone: a whole number of thousands of digits
        return BadRowError(BadRow.unreadable_row, f"not JSON ({error}). One object per line is expected.")
    if not isinstance(parsed, dict):
        return BadRowError(BadRow.unreadable_row, f"a {type(parsed).__name__}, not an object.")
    return parsed


def _not_text(parsed: object) -> str:
    """Return the first field with what UTF-8 cannot hold; of something else than an object, what it is."""
    for name, value in parsed.items() if isinstance(parsed, dict) else ():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return str(name.encode(errors="replace").decode())
    return f"a {type(parsed).__name__}"


def jsonl_rows(path: Path, *, limit: int | None = None, rejected: Path | None = None) -> list[ChatRow]:
    """Return the rows of a file, or of the JSONL files of a folder or glob, the first ``limit`` of them.

    With ``rejected``, rows that cannot be used are counted and written to that file.

    Raises:
        DataError: With the row number, for the first row that is not a chat row or repeats an id, unless ``rejected``
            says where to write it; if there is no usable row.
    """

    return usable_rows(jsonl_reader(path), rejected=rejected, limit=limit)


def jsonl_reader(path: Path, *, answered: bool = True) -> RowReader[dict[str, Any]]:
    """Return how the rows of ``jsonl_rows`` are read. Without ``answered``, conversations may end with a question."""

    def make(origin: RowOrigin, fields: dict[str, Any]) -> ChatRow:
        if not answered:
            fields = _with_target(fields)
        return facts_of_text_row(parse_row(fields, default_id=origin.row_id))

    return RowReader(
        path=path,
        parts=parts_of(path, JSON_LINES),
        read=lambda part, span: read_lines(part.file, span=span),
        make=make,
    )


def _with_target(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose conversation ends with an answer that says nothing, whatever the row has there."""
    fields = {name: value for name, value in fields.items() if name not in ("label", "weight")}
    if "messages" not in fields and fields.keys() & set(VERL_FIELDS):
        return from_verl(fields, needs_target=False)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return fields
    asking = messages[:-1] if messages[-1].get("role") == Role.assistant else messages
    return {**fields, "messages": [*asking, {"role": str(Role.assistant), "content": NOTHING}]}


def is_chat_row(fields: Mapping[str, Any]) -> bool:
    """Return whether an object is, or is meant to be, a conversation."""
    return "messages" in fields or "extra_info" in fields or "reward_model" in fields


def parse_row(fields: Mapping[str, Any], *, default_id: str) -> ChatRow:
    """Check one parsed row, in this project's form or verl's.

    Raises:
        BadRowError: Naming the field, its value and what is expected.
    """
    if "messages" not in fields and fields.keys() & set(VERL_FIELDS):
        fields = from_verl(fields)
    if unknown := sorted(fields.keys() - _KEYS):
        raise BadRowError(BadRow.unknown_field, f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}.")
    weight = usable_weight(fields.get("weight", 1.0))
    label = fields.get("label")
    if label is not None and not isinstance(label, str):
        raise BadRowError(BadRow.wrong_type, f"label is {label!r}; it must be text or null.")
    task, facts = text_in(fields, "task", "chat"), object_in(fields, "facts")
    if not task.isprintable():
        raise BadRowError(
            BadRow.unusable_text, f"task is {task!r:.80}; it must be a name on one line that can be shown."
        )
    if task in TASKS and (wrong := wrong_fact(facts)):
        raise BadRowError(BadRow.wrong_type, wrong)
    return ChatRow(
        id=text_in(fields, "id", default_id),
        task=task,
        messages=_parse_messages(fields.get("messages")),
        weight=weight,
        group=text_in(fields, "group", ""),
        label=label,
        facts=facts,
    )


def _parse_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise _no_target("messages must be a list of at least two: a question and the assistant's target.")
    messages = tuple(_parse_message(item, f"messages[{index}]") for index, item in enumerate(value))
    if messages[-1].role is not Role.assistant:
        raise _no_target(f"the last message is the {messages[-1].role}'s; it must be the assistant's, the target.")
    if messages[0].role is Role.assistant:
        raise _no_target("the first message is the assistant's; it must be the system's or the user's.")
    for index, (before, after) in enumerate(pairwise(messages), 1):
        if after.role is not (Role.assistant if before.role is Role.user else Role.user):
            raise _no_target(f"messages[{index}] is the {after.role}'s after the {before.role}'s.")
    return messages


def _no_target(message: str) -> BadRowError:
    return BadRowError(BadRow.no_target, message)


def _parse_message(item: Any, name: str) -> Message:
    if not isinstance(item, dict) or item.keys() != {"role", "content"}:
        raise BadRowError(BadRow.wrong_type, f"{name} must have exactly the fields role and content.")
    role, content = item["role"], item["content"]
    if role not in list(Role):
        raise BadRowError(BadRow.wrong_type, f"{name}.role is {role!r}; known: {', '.join(Role)}.")
    if not isinstance(content, str) or not content.strip():
        raise BadRowError(BadRow.empty_text, f"{name}.content is {content!r:.60}; it must be text that is not empty.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        message = f"{name}.content holds half a surrogate pair at character {error.start}, which is no text."
        raise BadRowError(BadRow.invalid_utf8, message) from None
    return Message(role=Role(role), content=content)
