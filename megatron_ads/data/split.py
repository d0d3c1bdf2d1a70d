"""Hold rows out for validation so that nothing that identifies them is trained on."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and rows held out; no group is on both sides."""

    training: list[ChatRow]
    validation: list[ChatRow]


def split_by_group(
    rows: Sequence[ChatRow], *, validation_rows: int, seed: int, most_per_group: int | None = None
) -> Split:
    """Hold out whole groups (queries, users), in an order that ``seed`` decides, until there are enough rows.

    With ``most_per_group``, a held-out group gives so many of its rows at most, drawn by ``seed``. Its other rows, and
    those of the last group beyond ``validation_rows``, are on neither side. The order of ``rows`` plays no part in
    which groups are held out.

    Raises:
        DataError: If nothing would be left to train on.
    """
    groups: dict[str, list[ChatRow]] = defaultdict(list)
    for row in rows:
        groups[row.group or row.id].append(row)
    held_out: set[str] = set()
    validation: list[ChatRow] = []
    for group in sorted(groups, key=lambda group: _drawn(seed, group)):
        if len(validation) >= validation_rows:
            break
        held_out.add(group)
        validation += sorted(groups[group], key=lambda row: _drawn(seed, row.id))[:most_per_group]
    training = [row for row in rows if (row.group or row.id) not in held_out]
    if not training:
        raise DataError(
            f"data.validation_rows = {validation_rows} leaves none of the {len(rows)} rows ({len(groups)} groups such "
            "as queries, which stay together) to train on. Lower it, or add rows."
        )
    return Split(training=training, validation=validation[:validation_rows])


def split_by_time(rows: Sequence[ChatRow], *, validation_rows: int, seed: int) -> Split:
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
    return Split(training=training, validation=sorted(late, key=lambda row: _drawn(seed, row.id))[:validation_rows])


def _drawn(seed: int, name: str) -> bytes:
    """Return a sort key that looks random and depends on nothing but the seed and the name."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
