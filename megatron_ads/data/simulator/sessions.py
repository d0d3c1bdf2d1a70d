"""The sessions of one day, as arrays of one row a session."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
"""A table of events, by column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sessions:
    """N sessions; M remembered conversions of each user before it."""

    user: NDArray[np.int64]
    day: NDArray[np.int64]
    minute: NDArray[np.int64]
    kind: NDArray[np.int64]
    """What is needed."""
    query: NDArray[np.int64]
    onsite: NDArray[np.bool_]
    price: NDArray[np.int64]
    """Price level of the user."""
    recent_NM: NDArray[np.int64]
    """Advertisers of the user's latest conversions."""
    shares_NM: NDArray[np.float64]
    """Share of each of them in the user's loyalty."""

    def __len__(self) -> int:
        return len(self.user)

    @property
    def has_bought(self) -> NDArray[np.bool_]:
        """Whether the user converted before."""
        bought: NDArray[np.bool_] = self.shares_NM.sum(axis=1) > 0
        return bought

    def take(self, chosen: NDArray[Any]) -> "Sessions":
        """Return the sessions at some places, or where a mask is true."""
        return Sessions(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def columns(self, *names: str) -> Columns:
        """Return who and when, and what else is named."""
        return {name: getattr(self, name) for name in ("user", "day", "minute", *names)}
