"""Hold rows out for validation so that nothing that identifies them is trained on, and no question of theirs is.

Rows belong together by the group that they declare, such as a query or a user, or else by what they ask: their prompt
without the wording of the instruction. Both are folded as names are.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow
from megatron_ads.stable_random import stable_key
from megatron_ads.tasks.registry import TASKS


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
    """Count; where rows of no ads task have no label, another target is another answer."""
    first: dict[str, str | None] = {}
    repeated = contradicting = 0
    for row in rows:
        answer = same_name(row.target) if row.label is None and row.task not in TASKS else row.label
        question = question_of(row)
        if question in first:
            repeated += 1
            contradicting += answer != first[question]
        first.setdefault(question, answer)
    return Repeats(repeated, contradicting)


def split_by_group(
    rows: Sequence[ChatRow], *, validation_rows: int, seed: int, max_per_group: int | None = None
) -> RowSplit:
    """Hold out whole groups (queries, users), in an order that ``seed`` decides, until there are enough rows.

    Every task gives validation rows in proportion to its rows; one with too few groups may have none left to train on.
    With ``max_per_group``, a held-out group gives so many rows of a task at most, drawn by ``seed``. Rows of held-out
    groups beyond these numbers are on neither side. The order of ``rows`` plays no part in which groups are held out.

    Raises:
        DataError: If nothing would be left to train on.
    """
    groups: dict[str, list[ChatRow]] = defaultdict(list)
    group_of_rows = [group_of(row) for row in rows]
    for row, group in zip(rows, group_of_rows, strict=True):
        groups[group].append(row)
    names = {group: min(row.group or row.id for row in rows) for group, rows in groups.items()}
    wanted = _shared_out(validation_rows, Counter(row.task for row in rows))
    held_out: set[str] = set()
    validation: list[ChatRow] = []
    for group in sorted(groups, key=lambda group: stable_key(seed, names[group])):
        if not wanted:
            break
        of_task: dict[str, list[ChatRow]] = defaultdict(list)
        for row in sorted(groups[group], key=lambda row: stable_key(seed, row.id)):
            of_task[row.task].append(row)
        for task in sorted(of_task.keys() & wanted):
            given = of_task[task][:max_per_group][: wanted[task]]
            held_out.add(group)
            validation += given
            wanted[task] -= len(given)
        wanted = +wanted  # without those that have enough
    training = [row for row, group in zip(rows, group_of_rows, strict=True) if group not in held_out]
    training = _without_questions_of(validation, training)
    if not training:
        raise DataError(
            f"data.validation_rows = {validation_rows} leaves none of the {len(rows)} rows ({len(groups)} groups such "
            "as queries, which stay together) to train on. Lower it, or add rows."
        )
    return RowSplit(training=training, validation=validation)


def split_by_time(rows: Sequence[ChatRow], *, validation_rows: int, seed: int) -> RowSplit:
    """Hold out the latest rows: every held-out row is later than every row trained on, except those without a time.

    Rows of one time stay together. Rows of the held-out times beyond ``validation_rows``, drawn by ``seed``, are on
    neither side. A user may be on both sides: what such a row shows of the user is what was known at its time.

    Raises:
        DataError: If no row has a time, or nothing would be left to train on.
    """
    times = sorted((row.time for row in rows if row.time is not None), reverse=True)
    if validation_rows and not times:
        raise DataError(
            f"data.split_by is time, but none of the {len(rows)} rows has one. Set data.split_by=group, or add a "
            "source with times, such as next_brand."
        )
    cut = times[min(validation_rows, len(times)) - 1] if validation_rows else float("inf")
    late = [row for row in rows if row.time is not None and row.time >= cut]
    late = sorted(late, key=lambda row: stable_key(seed, row.id))[:validation_rows]
    training = _without_questions_of(late, [row for row in rows if row.time is None or row.time < cut])
    if not training:
        raise DataError(
            f"data.validation_rows = {validation_rows} leaves none of the {len(rows)} rows, held out by time, to train "
            "on. Lower it, or add rows."
        )
    return RowSplit(training, late)


def _without_questions_of(held_out: Sequence[ChatRow], training: list[ChatRow]) -> list[ChatRow]:
    """Return the rows that ask nothing that a held-out row asks; two rows that both declare a group may do so."""
    if all(row.group for row in (*held_out, *training)):
        return training
    everything = {question_of(row) for row in held_out}
    of_no_group = {question_of(row) for row in held_out if not row.group}
    return [row for row in training if question_of(row) not in (of_no_group if row.group else everything)]


def _shared_out(validation_rows: int, rows_of_task: Counter[str]) -> Counter[str]:
    """Return how many rows each task gives, in proportion to its rows; the sum is exact."""
    left, rows_left = validation_rows, rows_of_task.total()
    wanted: Counter[str] = Counter()
    for task, rows in sorted(rows_of_task.items()):
        wanted[task] = round(left * rows / rows_left)
        left, rows_left = left - wanted[task], rows_left - rows
    return +wanted
