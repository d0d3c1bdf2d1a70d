"""What a table seems to be: its columns with types and samples, and a mapping of them to fields, for a recipe.

Columns are known by what teams call them, values by what they usually stand for; all of it is a guess to be checked.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
from megatron_ads.data import event_tables
from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.jsonl import is_chat_row, read_lines
from megatron_ads.data.own_tables import FORMS
from megatron_ads.data.source_files import JSON_LINES, Part, parts_of
from megatron_ads.data.table_fields import folded, time_of
from megatron_ads.data.table_files import Cell, Cells, column_types, read_table
from megatron_ads.errors import DataError

_OTHER_NAMES = {
    "id": "row_id pair_id example_id key uuid",
    "query": "search_term search_query searchterm search keyword q",
    "title": "ad_title product_title item_title headline ad product item name",
    "label": "grade relevance rating judgment judgement esci_label class",
    "score": "rating relevance grade label match",
    "description": "ad_text ad_description product_description body text",
    "seller": "advertiser brand product_brand merchant shop store domain",
    "reasoning": "rationale explanation why reason",
    "user": "user_id uid userid customer customer_id visitor visitor_id member_id",
    "time": "ts timestamp event_time event_ts datetime date event_date created_at dt ds",
    "event": "event_type event_name action activity what kind type",
    "text": "words search_term query title page_title item url content",
    "advertiser": "advertiser_name shop merchant store seller brand",
    "category": "item_category product_category", "brand": "product_brand",
    "age": "age_group age_range", "gender": "sex", "state": "user_state segment",
    "prompt": "question instruction input", "target": "answer response completion output",
    "queries": "generated_queries", "reasons": "query_reasons", "summary": "profile user_profile",
    "new_text": "rewritten_text new_description", "new_title": "rewritten_title",
}  # fmt: skip
_MEANINGS = {
    "Good": "e exact good relevant perfect excellent yes true highly_relevant match",
    "Fair": "s substitute partial partially_relevant somewhat_relevant ok medium",
    "Bad": "c i complement irrelevant not_relevant bad poor no false off_topic",
    "matched_conversion": "purchase order buy conversion sale checkout transaction",
    "onsite_search": "search", "click": "click", "page_view": "view visit page", "offsite_url": "url",
}  # fmt: skip
_SAMPLES, _SAMPLE_CHARACTERS, _MOST_VALUES = 3, 24, 40
_MOST_PARTS = 20
"""Of a folder, spread over it; each gives its share of the sample."""
_HISTORY_SHARE = 0.8
"""Of the events of the sample; the rest is after the anchor that is proposed."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A table's columns, and the source that they may be."""

    columns: dict[str, tuple[str, list[str]]]
    """Name -> type and samples."""
    source: SourceConfig
    missing: tuple[str, ...]
    """Required fields that no column looks like."""

    def settings(self) -> dict[str, Any]:
        """Return the source as a recipe has it; fields without a column have a placeholder."""
        source = self.source
        columns = dict(source.columns) | dict.fromkeys(self.missing, "COLUMN")
        given: dict[str, Any] = {
            "kind": str(source.kind),
            "path": source.path,
            "task": source.task and str(source.task),
        }
        given |= {"anchor": source.anchor, "columns": columns, "values": source.values}
        return {name: value for name, value in given.items() if value}

    def render(self) -> str:
        """Return the columns, and the recipe's section to paste."""
        width = max(map(len, self.columns))
        lines = [f"Columns of {self.source.path}:"]
        lines += [f"  {name:<{width}}  {kind:<12}  {' | '.join(seen)}" for name, (kind, seen) in self.columns.items()]
        section = {"data": {"sources": [self.settings()]}}
        lines += ["", "A mapping to paste into a recipe; check what is guessed:", ""]
        lines.append(yaml.safe_dump(section, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110))
        if self.missing:
            tasks = ", ".join(AdsTask)
            lines.append(f"No column looks like {', '.join(self.missing)}. Put its name in place of COLUMN, or choose")
            lines.append(f"another task with --task: {tasks}.")
        return "\n".join(lines)


def holds_chat_rows(path: Path) -> bool:
    """Return whether a source is JSONL of conversations, which needs no mapping."""
    part = parts_of(path)[0]
    if part.form not in JSON_LINES:
        return False
    first = next((row for _, row in read_lines(part.file)), None)
    return not isinstance(first, dict) or is_chat_row(first)


def propose(path: Path, task: AdsTask | None, *, rows: int) -> Proposal:
    """Return what the first rows of a table's parts suggest, for rows of ``task``; None: of the task that fits best.

    Raises:
        DataError: If the table cannot be read or holds no row.
    """
    parts = parts_of(path)
    parts = parts[:: -(-len(parts) // _MOST_PARTS)]
    types = column_types(parts[0], rows)
    sample = _sample(path, parts, list(types), -(-rows // len(parts)))
    forms = {each: (form.required, form.optional, form.choices) for each, form in FORMS.items()}
    log = (event_tables.REQUIRED, event_tables.OPTIONAL, event_tables.CHOICES)
    found = [
        (_match(list(types), required, optional), each, required, choices)
        for each, (required, optional, choices) in [(AdsTask.next_advertiser, log), *forms.items()]
        if task is None or each is task
    ]
    (matched, _), best, required, choices = max(found, key=lambda each: (each[0][1], len(each[0][0])))
    is_log = choices is event_tables.CHOICES
    source = SourceConfig(
        kind=SourceKind.table,
        path=str(path),
        task=best,
        columns=matched,
        values=_values(matched, choices, sample),
        anchor=_anchor(matched, sample) if is_log else None,
        rows=rows,
    )
    columns = {name: (kind, _glimpse(row.get(name) for row in sample)) for name, kind in types.items()}
    return Proposal(columns, source, tuple(name for name in required if name not in matched))


def _sample(path: Path, parts: Sequence[Part], columns: list[str], rows_per_part: int) -> list[Cells]:
    sample: list[Cells] = []
    first_bad = ""
    for part in parts:
        for number, row in islice(read_table(part, columns), rows_per_part):
            if not isinstance(row, BadRowError):
                sample.append(row)
            elif not first_bad:
                first_bad = f"; the first, row {number} of {part.name}: {row.reason}: {str(row).rstrip('.')}"
    if not sample:
        raise DataError(f"{path} holds no row that can be read{first_bad}.")
    return sample


def _glimpse(cells: Iterable[Cell]) -> list[str]:
    texts = dict.fromkeys(" ".join(str(cell).split())[:_SAMPLE_CHARACTERS] for cell in cells if cell not in (None, ""))
    return list(islice(texts, _SAMPLES))


def _plain_name(name: str) -> str:
    return re.sub(r"\W+|_+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).strip("_").lower()


def _match(
    columns: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, str], tuple[int, float]]:
    """Return field -> column, and how good that is: required fields missing, how alike the names of the others are."""
    matched: dict[str, str] = {}
    likeness = 0.0
    wanted = {name: [name, *_OTHER_NAMES.get(name, "").split()] for name in (*required, *optional)}
    for rank in range(max(map(len, wanted.values()))):  # the likeliest names of all fields first
        for name, words in wanted.items():
            free = [column for column in columns if column not in matched.values()]
            found = next((each for each in free if rank < len(words) and _plain_name(each) == words[rank]), None)
            if name not in matched and found is not None:
                matched[name] = found
                likeness += (1 if rank == 0 else 0.7) * (name in required)
    return matched, (-sum(name not in matched for name in required), likeness)


def _values(
    columns: Mapping[str, str], choices: Mapping[str, Sequence[str]], sample: Sequence[Cells]
) -> dict[str, dict[Any, Any]]:
    """Return what the values of each field with a label may stand for, where they are not its labels already."""
    values: dict[str, dict[Any, Any]] = {}
    for name, known in choices.items():
        if name not in columns:
            continue
        cells = [row[columns[name]] for row in sample]
        seen = {folded(cell): cell for cell in cells if not isinstance(cell, list | dict | None) and cell != ""}
        strange = [each for each in seen if each not in set(map(folded, known))]
        if not strange or len(seen) > _MOST_VALUES:
            continue
        numbers = sorted(map(int, strange)) if all(each.lstrip("+-").isdecimal() for each in strange) else []
        steps = max(len(numbers) - 1, 1)
        values[name] = {number: str(known[i * (len(known) - 1) // steps]) for i, number in enumerate(numbers)} or {
            str(seen[each]): _meaning(each, known) for each in sorted(strange)
        }
    return values


def _meaning(value: str, known: Sequence[str]) -> str | None:
    plain = _plain_name(value)
    for whole in (True, False):  # "product_view" holds the word view
        for meaning, words in _MEANINGS.items():
            if meaning in known and any(word == plain if whole else word in plain.split("_") for word in words.split()):
                return meaning
    return None


def _anchor(columns: Mapping[str, str], sample: Sequence[Cells]) -> str | None:
    times = []
    for row in sample if "time" in columns else ():
        with suppress(BadRowError):
            times.append(time_of({"time": row[columns["time"]]}, "time"))
    if not times:
        return None
    return datetime.fromtimestamp(sorted(times)[int(len(times) * _HISTORY_SHARE)], UTC).date().isoformat()
