"""Draw samples from several weighted sources, in an order that can be resumed exactly from a few integers.

Source k with weight w_k is drawn next if it is the furthest behind its share,

    k = argmax_k ( w_k / sum(w) * (n + 1) - drawn_k ),

so that a prefix of any length holds the shares to within a sample or so. Inside a source every epoch has its own
shuffled order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import TokenizedRow
from megatron_ads.data.shuffle import key_of, shuffled
from megatron_ads.errors import DataError


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """One source of rows."""

    rows: Sequence[TokenizedRow]
    weight: float = 1.0
    """Share of the samples drawn from this source, relative to the others."""
    name: str = "rows"


class Mixture:
    """An endless, reproducible sequence of samples; where it stands is one count per source."""

    def __init__(self, sources: Sequence[WeightedRows], *, seed: int) -> None:
        """Start at the first sample.

        Raises:
            DataError: If there is no source, or one without rows.
        """
        empty = [source.name for source in sources if not source.rows]
        if empty or not sources:
            where = ", ".join(empty) or "data.sources"
            raise DataError(f"There are no rows to train on in {where}. Check the path, and data.validation_rows.")
        self._sources = tuple(sources)
        total = sum(source.weight for source in sources)
        self._shares = tuple(source.weight / total for source in sources)
        self._seed = seed
        self.drawn = [0] * len(sources)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(len(source.rows) for source in self._sources)

    def draw(self) -> tuple[int, TokenizedRow]:
        """Return the next sample, and the number of its source."""
        upcoming = sum(self.drawn) + 1
        behind = [share * upcoming - drawn for share, drawn in zip(self._shares, self.drawn, strict=True)]
        chosen = behind.index(max(behind))
        rows = self._sources[chosen].rows
        epoch, place = divmod(self.drawn[chosen], len(rows))
        self.drawn[chosen] += 1
        return chosen, rows[shuffled(place, len(rows), key_of(self._seed, chosen, epoch))]

    def put_back(self, sources: Sequence[int]) -> None:
        """Undo the latest draws, given the sources they came from."""
        for source in sources:
            self.drawn[source] -= 1
