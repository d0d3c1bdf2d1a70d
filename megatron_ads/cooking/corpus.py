"""The last step: candidates that passed become chat rows of one form, shuffled, split by group, as JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.cooking.candidates import Candidate
from megatron_ads.cooking.config import CookConfig
from megatron_ads.cooking.requests import drawn
from megatron_ads.data.rows import ChatRow, Fact, Message, Role
from megatron_ads.data.split import split_by_group

TRAINING, VALIDATION = "train.jsonl", "validation.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What is in the files."""

    training_rows: int
    validation_rows: int
    left_out_by_split: int
    """Rows of held-out groups beyond ``validation_rows``: on neither side."""


def write_corpus(out: Path, kept: Sequence[Candidate], config: CookConfig) -> Written:
    """Write ``train.jsonl`` and, if rows are held out, ``validation.jsonl``; without candidates both are empty.

    Raises:
        DataError: If holding rows out would leave nothing to train on.
    """
    rows = sorted(map(cooked_row, kept), key=lambda row: drawn(config.seed, "order", row.id))
    training, validation = rows, []
    if config.validation_rows and rows:
        split = split_by_group(rows, validation_rows=config.validation_rows, seed=config.seed)
        training, validation = split.training, split.validation
    _write(out / TRAINING, training)
    if config.validation_rows:
        _write(out / VALIDATION, validation)
    else:
        (out / VALIDATION).unlink(missing_ok=True)  # of an earlier run with other settings, as below
    return Written(
        training_rows=len(training),
        validation_rows=len(validation),
        left_out_by_split=len(rows) - len(training) - len(validation),
    )


def remove_corpus(out: Path) -> None:
    """Remove what an earlier run wrote, so that no corpus stands beside a report that does not describe it."""
    for name in (TRAINING, VALIDATION):
        (out / name).unlink(missing_ok=True)


def cooked_row(candidate: Candidate) -> ChatRow:
    """Return the row: the source's question and label, this reasoning, the source's answer."""
    row = candidate.row
    return ChatRow(
        id=candidate.name,
        task=row.task,
        messages=(*row.prompt, Message(Role.assistant, candidate.target)),
        weight=row.weight,
        group=row.group or row.id,
        label=row.label,
        facts={**row.facts, Fact.reasoning: candidate.reasoning},
    )


def _write(file: Path, rows: Sequence[ChatRow]) -> None:
    from conversion.atomic_file import write_small  # imports torch

    write_small(file, "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows))
