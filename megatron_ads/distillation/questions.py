"""What the teacher is asked: the rows of the sources without their answers, and without all that is judged later."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.config.distillation import DistillConfig
from megatron_ads.config.recipes import load_job
from megatron_ads.data.jsonl import parse_row, read_records
from megatron_ads.data.questions import BadQuestion, questions
from megatron_ads.data.sources import read_source
from megatron_ads.data.split import group_of
from megatron_ads.errors import DataError
from megatron_ads.evaluation.held_out_rows import EvaluationRows, held_out
from megatron_ads.rows import ChatRow

JUDGED = "judged"
"""Why a row is left out that is judged, or shares a query or a user with one that is."""
_LEFT_OUT_BY_VALUES = "left_out_by_values"


def judged_rows(config: DistillConfig) -> EvaluationRows:
    """Return the rows that models are compared on.

    Raises:
        ConfigError: If the recipe does not compose.
        DataError: If it holds no rows of an ads task out.
    """
    rows = held_out(load_job(config.judged.recipe, config.judged_settings, sections=["data"]).data)
    if not rows.tasks:
        raise DataError(f"{config.judged.recipe} holds no row of an ads task out. Give judged.settings others.")
    return rows


def write_questions(config: DistillConfig, file: Path) -> dict[str, Any]:
    """Write the rows that the teacher is asked about, and return how many they are and how many were left out.

    Raises:
        DataError: If a source cannot be read, two rows have one id, or no row is left.
    """
    left_out, rows, seen = Counter[str](), list[ChatRow](), set[str]()
    judged = groups_of(judged_rows(config))
    for index, source in enumerate(config.sources):
        for row in questions(source, f"sources[{index}]", seed=config.seed):
            if row is None:
                left_out[_LEFT_OUT_BY_VALUES] += 1
            elif isinstance(row, BadQuestion):
                left_out[row.reason] += 1
            elif group_of(row) in judged:
                left_out[JUDGED] += 1
            else:
                _require_new(row, seen)
                rows.append(row)
    if not rows:
        why = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common()) or "they have none"
        raise DataError(f"no row of sources can be asked: {why}. Give other sources.")
    write_rows(file, rows)
    return {"rows": len(rows), "left_out": dict(left_out.most_common())}


def read_questions(file: Path) -> list[ChatRow]:
    """Return what ``write_questions`` wrote, in order."""
    return list(read_records(file, lambda number, fields: parse_row(fields, default_id=str(number))))


def answered_rows(config: DistillConfig, left_out: Counter[str]) -> Iterator[ChatRow]:
    """Yield the rows that have a teacher's answer already; those that are judged are counted in ``left_out``.

    Raises:
        DataError: If a source cannot be read, or two rows have one id.
    """
    seen = set[str]()
    judged = groups_of(judged_rows(config)) if config.answered else frozenset()
    for source in config.answered:
        for row in read_source(source, seed=config.seed):
            if group_of(row) in judged:
                left_out[JUDGED] += 1
            else:
                _require_new(row, seen)
                yield row


def groups_of(rows: EvaluationRows) -> frozenset[str]:
    """Return the groups of all rows that are held out."""
    return frozenset(map(group_of, [*rows.tasks, *rows.general]))


def write_rows(file: Path, rows: Iterable[ChatRow]) -> None:
    """Write rows as lines of JSON, which the source kind ``jsonl`` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_small(file, "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows))


def _require_new(row: ChatRow, seen: set[str]) -> None:
    if row.id in seen:
        raise DataError(f"id {row.id!r} is another row's too. Ids must differ over all sources.")
    seen.add(row.id)
