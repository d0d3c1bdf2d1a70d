"""Hold rows out for validation so that nothing that identifies them is trained on."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.errors import DataError
from megatron_ads.rows import ChatRow
from megatron_ads.stable_random import stable_key


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Rows to train on and rows held out; no group is on both sides."""

    training: list[ChatRow]
    validation: list[ChatRow]


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
    for row in rows:
        groups[_group(row)].append(row)
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
    training = [row for row in rows if _group(row) not in held_out]
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
    training = [row for row in rows if row.time is None or row.time < cut]
    if not training:
        raise DataError(
            f"data.validation_rows = {validation_rows} leaves none of the {len(rows)} rows, held out by time, to train "
            "on. Lower it, or add rows."
        )
    return RowSplit(training, sorted(late, key=lambda row: stable_key(seed, row.id))[:validation_rows])


def _shared_out(validation_rows: int, rows_of_task: Counter[str]) -> Counter[str]:
    """Return how many rows each task gives, in proportion to its rows; the sum is exact."""
    left, rows_left = validation_rows, rows_of_task.total()
    wanted: Counter[str] = Counter()
    for task, rows in sorted(rows_of_task.items()):
        wanted[task] = round(left * rows / rows_left)
        left, rows_left = left - wanted[task], rows_left - rows
    return +wanted


def _group(row: ChatRow) -> str:
    """Return what must not be on both sides; a query is the same whatever its capitals and spaces."""
    return " ".join((row.group or row.id).casefold().split())
