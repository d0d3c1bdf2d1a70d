"""From the sources of a recipe to rows in memory: read, check, split, and tell what had to be left out and why."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.data import DataConfig, SourceConfig, SplitBy
from megatron_ads.data.chat import ChatTokenizer, tokenize_row
from megatron_ads.data.sources import describe_source, read_source, source_names
from megatron_ads.data.split import Repeats, RowSplit, count_repeats, group_of, split_by_group, split_by_time
from megatron_ads.errors import DataError
from megatron_ads.layout import rank
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import ChatRow, Fact, Message, Role, TokenizedRow
from megatron_ads.tasks.answer_format import without_reasoning
from megatron_ads.tasks.registry import TASKS, reasoning_required
from megatron_ads.tasks.row_checks import FaultyRow, RowFault, check_rows

logger = get_logger(__name__)

_FEW_GROUPS = 10
"""Held out; so few queries or users are told."""


class LeftOut(StrEnum):
    """Why a row that can be used takes no part, as the job is set up."""

    zero_weight = "zero_weight"
    target_longer_than_seq_length = "target_longer_than_seq_length"
    """A shorter prompt would not help."""
    longer_than_seq_length = "longer_than_seq_length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """Rows in tokens, and how many were left out for which reason."""

    rows: list[TokenizedRow]
    left_out: Counter[LeftOut]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What a recipe's ``data`` section means, before tokens."""

    training: list[list[ChatRow]]
    """Rows of each source."""
    validation: list[ChatRow]
    """Held out of all sources together."""
    sources: list[SourceConfig]
    faulty: list[FaultyRow]
    """Rows of all sources that can be neither trained on nor judged."""
    repeats: Repeats
    """Rows of all sources that ask what an earlier one asks."""

    def __str__(self) -> str:
        """Return it for people."""
        rows = [*(row for rows in self.training for row in rows), *self.validation]
        parts = [f"{len(rows) - len(self.validation):,} rows to train on, {len(self.validation):,} held out"]
        parts += [f"{len(self.faulty):,} cannot be used"] if self.faulty else []
        return "; ".join([*parts, *notes_on(rows, self.repeats)])


def read_corpus(config: DataConfig) -> Corpus:
    """Read all sources and hold validation rows out, by group or by time over all sources together.

    Each row has the name of its source. Rows that cannot be used are counted in a warning.

    Raises:
        ConfigError: If a setting of the section is impossible.
        DataError: If a source cannot be read or has no usable row, or nothing is left to train on.
    """
    config.check()
    checked = [check_rows(read_source(source, seed=config.seed)) for source in config.sources]
    for found, name in zip(checked, map(describe_source, config.sources), strict=True):
        if found.faulty:
            report_faulty(len(found.faulty), found.faulty[0], found.counts(), name, usable=len(found.rows))
        facts = {fact for row in found.rows if row.task in TASKS for fact in row.facts}
        report_misspelt({row.task for row in found.rows}, facts, name)
    sources = [found.rows if config.reasoning else answers_alone(found.rows) for found in checked]
    sources = [
        [replace(row, source=name) for row in rows]
        for rows, name in zip(sources, source_names(config.sources), strict=True)
    ]
    everything = [row for rows in sources for row in rows]
    repeats = count_repeats(everything)
    report_notes(notes_on(everything, repeats), repeats)
    split = _split(everything, config)
    report_lost({row.task for row in everything}, {row.task for row in split.training})
    kept = {id(row) for row in split.training}
    return Corpus(
        training=[[row for row in rows if id(row) in kept] for rows in sources],
        validation=split.validation,
        sources=list(config.sources),
        faulty=[row for found in checked for row in found.faulty],
        repeats=repeats,
    )


def _split(rows: Sequence[ChatRow], config: DataConfig) -> RowSplit:
    if config.split_by is SplitBy.time:
        return split_by_time(rows, validation_rows=config.validation_rows, seed=config.seed)
    per_group = config.validation_rows_per_group
    split = split_by_group(rows, validation_rows=config.validation_rows, seed=config.seed, max_per_group=per_group)
    held_out, training = (len(set(map(group_of, side))) for side in (split.validation, split.training))
    report_few_groups(len(split.validation), held_out, training)
    return split


def notes_on(rows: Sequence[ChatRow], repeats: Repeats) -> list[str]:
    """Return a sentence on repeats if there are any, and one on targets without reasoning in tasks that reason."""
    wanted = [row for row in rows if row.task in TASKS and TASKS[row.task].reasons]
    return notes(repeats, wanted=len(wanted), without=sum(not reasoning_required(row) for row in wanted))


def notes(repeats: Repeats, *, wanted: int, without: int) -> list[str]:
    """Return the same sentences, given how many rows are of tasks that reason, and how many of them do not."""
    found = [str(repeats)] if repeats.rows else []
    if without:
        found.append(f"{without:,} of {wanted:,} targets give no reasoning, so answers need none")
    return found


def answers_alone(rows: Sequence[ChatRow]) -> list[ChatRow]:
    """Return rows whose reasoning is empty; rows of general domains are left as they are."""

    def shortened(row: ChatRow) -> ChatRow:
        target = Message(Role.assistant, without_reasoning(row.target))
        facts = {**row.facts, Fact.reasoning: ""}
        if Fact.rejected in facts:
            facts[Fact.rejected] = [without_reasoning(answer) for answer in row.list_fact(Fact.rejected)]
        return replace(row, messages=(*row.prompt, target), facts=facts)

    return [shortened(row) if row.task in TASKS else row for row in rows]


def _warn(message: str, *values: object) -> None:
    """Log once and not on every rank."""
    if rank() == 0:
        logger.warning(message, *values)


def report_notes(found: Sequence[str], repeats: Repeats) -> None:
    """Log the sentences of ``notes``, once and not on every rank."""
    for note in found if rank() == 0 else ():
        logger.log(logging.WARNING if repeats.contradicting else logging.INFO, "%s.", note)


def report_lost(tasks: set[str], trained: set[str]) -> None:
    """Log the tasks of which nothing is left to train on."""
    for task in sorted(tasks - trained):
        _warn(
            "%s: all rows are held out, or share a group with held-out rows, so nothing is trained on. Lower "
            "data.validation_rows, or add rows of other groups.",
            task,
        )


def report_faulty(count: int, first: FaultyRow, faults: Counter[RowFault], name: str, *, usable: int) -> None:
    """Log how many rows of a source cannot be used and why.

    Raises:
        DataError: If none of its rows can.
    """
    why = f"{first.fault} ({first.reason})" if first.reason else first.fault
    example = f"The first is {first.row_id!r:.80} of task {first.task}: {why:.200}."
    if not usable:
        raise DataError(
            f"None of the {count} rows of {name} can be used. {example} Correct them, or give rows of another form a "
            "task name of their own."
        )
    counts = ", ".join(f"{number} {fault}" for fault, number in faults.most_common())
    _warn("%s: rows that cannot be used: %s. %s", name, counts, example)


def report_few_groups(rows: int, groups: int, training_groups: int) -> None:
    """Log that the ``rows`` held out are of few groups, where the others could give some."""
    many_each = groups < _FEW_GROUPS and rows >= max(2 * _FEW_GROUPS, 4 * groups)
    if many_each and training_groups > _FEW_GROUPS:
        _warn(
            "the %d held-out rows are of %d groups such as queries, so scores say little about others. "
            "data.validation_rows_per_group=%d holds out more groups.",
            *(rows, groups, max(1, rows // _FEW_GROUPS)),
        )


def report_misspelt(tasks: set[str], facts: set[str], name: str) -> None:
    """Log tasks, and facts of ads tasks, of a source that are unknown, but are named much like a known one."""
    for kind, given, known, result in (
        ("ads task", tasks, list(TASKS), "its targets are not checked"),
        ("fact", facts, list(Fact), "nothing reads it"),
    ):
        for word in sorted(given.difference(known)):
            if near := " or ".join(get_close_matches(word, known)):
                _warn("%s: %r is no %s, so %s. Did you mean %s?", name, word, kind, result, near)


def tokenize(rows: Sequence[ChatRow], tokenizer: ChatTokenizer, *, seq_length: int) -> Tokenized:
    """Tokenize rows; a row that predicts more than ``seq_length`` tokens is left out and counted, never cut.

    Raises:
        DataError: If the chat template refuses a conversation.
    """
    tokenized = [tokenize_row(row, tokenizer) for row in rows]
    codes = codes_left_out(
        np.array([row.weight for row in rows]),
        np.array([np.count_nonzero(row.loss_weights) for row in tokenized]),
        np.array([row.predictions for row in tokenized]),
        seq_length=seq_length,
    )
    kept = [row for row, code in zip(tokenized, codes.tolist(), strict=True) if code == TAKES_PART]
    return Tokenized(rows=kept, left_out=count_left_out(codes))


TAKES_PART = -1
_REASONS = tuple(LeftOut)


def codes_left_out(
    weights: NDArray[Any], targets: NDArray[Any], predictions: NDArray[Any], *, seq_length: int
) -> NDArray[np.int64]:
    """Return why each row is left out, as its place in ``LeftOut``, or ``TAKES_PART``; (N,) each."""
    # In the order of LeftOut.
    codes: NDArray[np.int64] = np.select(
        [weights == 0, targets > seq_length, predictions > seq_length], range(len(_REASONS)), TAKES_PART
    )
    return codes


def count_left_out(codes: NDArray[np.int64]) -> Counter[LeftOut]:
    """Return how many rows are left out for each reason, in the order in which the reasons appear."""
    values, first, counts = np.unique(codes, return_index=True, return_counts=True)
    found = [(int(values[index]), int(counts[index])) for index in np.argsort(first) if values[index] != TAKES_PART]
    return Counter({_REASONS[code]: count for code, count in found})


def none_left(rows: str, left_out: Counter[LeftOut], seq_length: int) -> DataError:
    """Return the error for rows that are all left out, with the reasons and what to do about each."""
    advice = {
        LeftOut.zero_weight: "Give rows a weight above 0.",
        LeftOut.target_longer_than_seq_length: f"Raise data.seq_length = {seq_length}, or shorten the targets.",
        LeftOut.longer_than_seq_length: f"Raise data.seq_length = {seq_length}, or shorten the prompts.",
    }
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    return DataError(f"None of the {rows} can be used: {reasons}. {' '.join(advice[reason] for reason in left_out)}")
