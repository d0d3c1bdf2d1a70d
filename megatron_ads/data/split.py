"""Hold rows out for validation so that nothing that identifies them is trained on, and no question of theirs is.

Rows belong together by the group that they declare, such as a query or a user, or else by what they ask: their prompt
without the wording of the instruction. Both are folded as names are.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow
from megatron_ads.stable_random import stable_key
from megatron_ads.tasks.registry import TASKS

Numbers: TypeAlias = NDArray[np.int64]
"""Rows by their numbers."""
KEY_BYTES = 16
KEY = f"S{KEY_BYTES}"
"""numpy's type of a digest."""


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Rows to train on and rows held out; no group is on both sides."""

    training: list[ChatRow]
    validation: list[ChatRow]


def group_of(row: ChatRow) -> str:
    """Return what must not be on both sides: the group that a row declares, folded, or what it asks."""
    return same_name(row.group) or question_of(row)


def question_of(row: ChatRow) -> str:
    """Return a digest of the messages before the target, folded; every wording of an instruction is the same."""
    *before, last = row.prompt
    asked = same_name(last.content)
    instructions = _instructions()
    if asked.startswith(tuple(instructions)):
        wording = max(filter(asked.startswith, instructions), key=len)
        asked = f"{instructions[wording]}{asked.removeprefix(wording)}"
    texts = [*(f"{message.role}: {same_name(message.content)}" for message in before), asked]
    return hashlib.blake2b("\n".join(texts).encode(errors="surrogatepass"), digest_size=16).hexdigest()


@cache
def _instructions() -> dict[str, str]:
    """Return the name of the template by each wording of its instruction, folded."""
    templates = [template for task in TASKS.values() for template in task.templates]
    return {same_name(wording): template.name for template in templates for wording in template.instructions()}


@dataclass(frozen=True, slots=True)
class Repeats:
    """How many rows ask what an earlier row asks, and how many of these have another label than that row."""

    rows: int
    contradicting: int

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.rows:,} rows ask what an earlier one asks, {self.contradicting:,} of them with another answer"


def count_repeats(rows: Iterable[ChatRow]) -> Repeats:
    """Count the repeats among rows in memory."""
    keys = [(key_digest(question_of(row)), key_digest(answer_of(row))) for row in rows]
    questions, answers = np.array(keys, dtype=KEY).reshape(-1, 2).T
    return repeats_of(questions, answers)


def answer_of(row: ChatRow) -> str:
    """Return what makes two rows that ask the same contradict each other where it differs.

    It is the label; where rows of no ads task have none, the target.
    """
    if row.label is not None:
        return f"label {row.label}"
    return "no label" if row.task in TASKS else same_name(row.target)


def repeats_of(questions: NDArray[np.bytes_], answers: NDArray[np.bytes_]) -> Repeats:
    """Count the repeats, given the digests of what each row asks and answers, (N,) each."""
    _, first, question = np.unique(questions, return_index=True, return_inverse=True)
    contradicting = np.count_nonzero(answers != answers[first[question.reshape(-1)]])
    return Repeats(len(questions) - len(first), int(contradicting))


def split_by_group(
    rows: Sequence[ChatRow], *, validation_rows: int, seed: int, max_per_group: int | None = None
) -> RowSplit:
    """Hold out whole groups of rows, as :func:`hold_out_groups`."""
    keys = RowKeys.of(rows)
    return _of_numbers(rows, hold_out_groups(keys, validation_rows, seed=seed, max_per_group=max_per_group))


def split_by_time(rows: Sequence[ChatRow], *, validation_rows: int, seed: int) -> RowSplit:
    """Hold out the latest rows, as :func:`hold_out_latest`."""
    return _of_numbers(rows, hold_out_latest(RowKeys.of(rows), validation_rows, seed=seed))


def _of_numbers(rows: Sequence[ChatRow], split: "NumberSplit") -> RowSplit:
    return RowSplit(
        [rows[number] for number in split.training.tolist()], [rows[number] for number in split.validation.tolist()]
    )


class NumberSplit(NamedTuple):
    """The numbers of rows to train on, ascending, and of those held out."""

    training: Numbers
    validation: Numbers


@dataclass(frozen=True, slots=True)
class RowKeys:
    """What decides on which side a row is, column by column: about 50 bytes a row, ids and groups not counted."""

    ids: Sequence[bytes]
    declared: Sequence[bytes]
    """The group as the row has it; empty without one. Texts are in UTF-8, which sorts as they do."""
    groups: NDArray[np.bytes_]
    """(N,) ``group_of``, digested."""
    questions: NDArray[np.bytes_]
    """(N,) ``question_of``, digested."""
    tasks: Sequence[str]
    times: NDArray[np.float64]
    """(N,) NaN: none."""

    @classmethod
    def of(cls, rows: Sequence[ChatRow]) -> Self:
        """Take the keys of rows in memory."""
        questions = [question_of(row) for row in rows]
        groups = [same_name(row.group) or question for row, question in zip(rows, questions, strict=True)]
        return cls(
            ids=[in_utf8(row.id) for row in rows],
            declared=[in_utf8(row.group) for row in rows],
            groups=np.array(list(map(key_digest, groups)), dtype=KEY),
            questions=np.array(list(map(key_digest, questions)), dtype=KEY),
            tasks=[row.task for row in rows],
            times=np.array([np.nan if row.time is None else row.time for row in rows], dtype=np.float64),
        )

    @property
    def has_group(self) -> NDArray[np.bool_]:
        """(N,) whether a row declares a group."""
        return np.fromiter(map(bool, self.declared), dtype=bool, count=len(self.declared))


def in_utf8(text: str) -> bytes:
    """Return the bytes of a text, of half a surrogate pair too."""
    return text.encode(errors="surrogatepass")


def key_digest(text: str | bytes) -> bytes:
    """Return the digest by which equal texts are found; no zero byte ends it, which numpy would not keep."""
    data = in_utf8(text) if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=KEY_BYTES - 1).digest() + b"."


def hold_out_groups(keys: RowKeys, validation_rows: int, *, seed: int, max_per_group: int | None = None) -> NumberSplit:
    """Hold out whole groups (queries, users), in an order that ``seed`` decides, until there are enough rows.

    Every task gives validation rows in proportion to its rows; one with too few groups may have none left to train on.
    With ``max_per_group``, a held-out group gives so many rows of a task at most, drawn by ``seed``. Rows of held-out
    groups beyond these numbers are on neither side. The order of ``rows`` plays no part in which groups are held out.

    Raises:
        DataError: If nothing would be left to train on.
    """
    count = len(keys.ids)
    if not validation_rows:
        return _not_empty(NumberSplit(np.arange(count), np.arange(0)), "", validation_rows, count)
    of_row, members = _grouped(keys.groups)
    names = [min(keys.declared[row] or keys.ids[row] for row in rows.tolist()) for rows in members]
    wanted = _shared_out(validation_rows, Counter(keys.tasks))
    held_out = np.zeros(len(members), dtype=bool)
    validation: list[int] = []
    for group in sorted(range(len(members)), key=lambda group: stable_key(seed, _text(names[group]))):
        if not wanted:
            break
        of_task: dict[str, list[int]] = defaultdict(list)
        for row in sorted(members[group].tolist(), key=lambda row: stable_key(seed, _text(keys.ids[row]))):
            of_task[keys.tasks[row]].append(row)
        for task in sorted(of_task.keys() & wanted):
            given = of_task[task][:max_per_group][: wanted[task]]
            held_out[group] = True
            validation += given
            wanted[task] -= len(given)
        wanted = +wanted  # without those that have enough
    held = np.array(validation, dtype=np.int64)
    training = _without_questions_of(keys, held, np.flatnonzero(~held_out[of_row]))
    groups = f" ({len(members)} groups such as queries, which stay together)"
    return _not_empty(NumberSplit(training, held), groups, validation_rows, count)


def hold_out_latest(keys: RowKeys, validation_rows: int, *, seed: int) -> NumberSplit:
    """Hold out the latest rows: every held-out row is later than every row trained on, except those without a time.

    Rows of one time stay together. Rows of the held-out times beyond ``validation_rows``, drawn by ``seed``, are on
    neither side. A user may be on both sides: what such a row shows of the user is what was known at its time.

    Raises:
        DataError: If no row has a time, or nothing would be left to train on.
    """
    times = np.sort(keys.times[~np.isnan(keys.times)])[::-1]
    if validation_rows and not len(times):
        raise DataError(
            f"data.split_by is time, but none of the {len(keys.ids)} rows has one. Set data.split_by=group, or add a "
            "source with times, such as next_brand."
        )
    cut = times[min(validation_rows, len(times)) - 1] if validation_rows else np.inf
    late = np.flatnonzero(keys.times >= cut).tolist()
    late = sorted(late, key=lambda row: stable_key(seed, _text(keys.ids[row])))[:validation_rows]
    held = np.array(late, dtype=np.int64)
    training = _without_questions_of(keys, held, np.flatnonzero(~(keys.times >= cut)))
    return _not_empty(NumberSplit(training, held), ", held out by time,", validation_rows, len(keys.ids))


def _not_empty(split: NumberSplit, how: str, validation_rows: int, rows: int) -> NumberSplit:
    if not len(split.training):
        raise DataError(
            f"data.validation_rows = {validation_rows} leaves none of the {rows} rows{how} to train on. Lower it, or "
            "add rows."
        )
    return split


def _text(name: bytes) -> str:
    return name.decode(errors="surrogatepass")


def _grouped(keys: NDArray[np.bytes_]) -> tuple[Numbers, list[Numbers]]:
    """Return the group of each row and the rows of each group; groups are numbered as they first appear."""
    _, first, sorted_group = np.unique(keys, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    of_row = numbers[sorted_group.reshape(-1)]
    ends = np.cumsum(np.bincount(of_row, minlength=len(first)))
    return of_row, np.split(np.argsort(of_row, kind="stable"), ends[:-1])


def _without_questions_of(keys: RowKeys, held_out: Numbers, training: Numbers) -> Numbers:
    """Return the rows that ask nothing that a held-out row asks; two rows that both declare a group may do so."""
    declares = keys.has_group
    if declares[held_out].all() and declares[training].all():
        return training
    asked = keys.questions[training]
    everything = np.isin(asked, keys.questions[held_out])
    of_no_group = np.isin(asked, keys.questions[held_out[~declares[held_out]]])
    left: Numbers = training[~np.where(declares[training], of_no_group, everything)]
    return left


def _shared_out(validation_rows: int, rows_of_task: Counter[str]) -> Counter[str]:
    """Return how many rows each task gives, in proportion to its rows; the sum is exact."""
    left, rows_left = validation_rows, rows_of_task.total()
    wanted: Counter[str] = Counter()
    for task, rows in sorted(rows_of_task.items()):
        wanted[task] = round(left * rows / rows_left)
        left, rows_left = left - wanted[task], rows_left - rows
    return +wanted
