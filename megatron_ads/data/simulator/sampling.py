"""Draw from one of many discrete distributions per element, all elements at once."""

import numpy as np
from numpy.typing import NDArray


class InverseTable:
    """Rows of probabilities, made ready for drawing.

    The cumulated rows are laid end to end, row r shifted by r, so that they rise throughout and one binary search finds
    a place in any of them.
    """

    def __init__(self, chances: NDArray[np.float64]) -> None:
        """Take (rows, outcomes) of probabilities; every row sums to 1."""
        cumulated = np.cumsum(chances, axis=1)
        cumulated /= cumulated[:, -1:]
        self._flat = (cumulated + np.arange(len(chances))[:, None]).ravel()
        self._outcomes = chances.shape[1]

    def draw(self, row: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
        """Return one outcome of the distribution of each ``row``."""
        place = np.searchsorted(self._flat, row + draw.random(len(row)), side="right")
        outcome: NDArray[np.int64] = (place - row * self._outcomes).clip(max=self._outcomes - 1)
        return outcome
