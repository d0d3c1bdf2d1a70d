"""Which rows are labelled: those of users that are worth it, and of these what no earlier job has labelled already.

Source: advertiser paper, 3.2.1 (active users with a conversion in the last 90 days) and 3.7 (incremental updates).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.labelling import SelectionConfig
from megatron_ads.errors import DataError
from megatron_ads.labelling.parquet_files import epoch_files, read_table
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.user_history import CONVERSIONS

_CONVERSIONS = frozenset(map(str, CONVERSIONS))


class UserSelection:
    """Who is labelled."""

    def __init__(self, config: SelectionConfig) -> None:
        self._config = config

    def left_out(self, row: ChatRow) -> str | None:
        """Return why a row is not labelled; None: it is.

        Raises:
            DataError: If somebody is to be selected, and the row has no events of a user.
        """
        if not self._config.selects:
            return None
        events = row.facts.get(Fact.events)
        if not isinstance(events, Sequence):
            raise DataError(
                f"row {row.id!r} of {row.task} is about no user's events, by which select chooses. Label such sources "
                "in a job without select."
            )
        given = [event for event in events if isinstance(event, Mapping)]
        bought = [event for event in given if event.get("kind") in _CONVERSIONS]
        if not _any_within(given, self._config.active_days):
            return "inactive users"
        return None if _any_within(bought, self._config.conversion_days) else "users without a recent conversion"


def _any_within(events: Sequence[Mapping[str, object]], days: float | None) -> bool:
    if days is None:
        return True
    ages = (event.get("days_ago") for event in events)
    return any(isinstance(age, int | float) and age <= days for age in ages)


class Labelled:
    """What earlier jobs have labelled: digests, in order."""

    def __init__(self, digests: "NDArray[np.bytes_]") -> None:
        self._digests = digests

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Self:
        """Read the labels of earlier jobs; rows that have none, as the answer could not be read, are not among them.

        Raises:
            DataError: If one cannot be read.
        """
        found: list[NDArray[np.bytes_]] = []
        for folder in folders:
            for file in epoch_files(folder):
                table = read_table(file, ["digest", "failure"])
                read = table.filter(table["failure"].is_null())["digest"]
                found.append(_as_array(read.to_pylist()))
        return cls(np.unique(np.concatenate(found)) if found else _as_array([]))

    def known(self, digests: Sequence[bytes]) -> "NDArray[np.bool_]":
        """Return of each question whether it has a label already."""
        if not len(self._digests):
            return np.zeros(len(digests), dtype=np.bool_)
        asked = _as_array(digests)
        places = np.searchsorted(self._digests, asked).clip(max=len(self._digests) - 1)
        known: NDArray[np.bool_] = self._digests[places] == asked
        return known


def _as_array(digests: Sequence[bytes]) -> "NDArray[np.bytes_]":
    # Zeros at the end play no part in numpy's comparison of bytes; all digests being of one length, none are confused.
    return np.array(digests, dtype="S16")
