"""Draw samples from several weighted sources, in an order that can be resumed exactly from a few integers.

Source k with weight w_k is drawn next if it is the furthest behind its share,

    k = argmax_k ( w_k / sum(w) * (n + 1) - drawn_k ),

so that a prefix of any length holds the shares to within a sample or so; n and drawn_k count from where the shares were
last changed. Inside a source every epoch has its own shuffled order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from megatron_ads.errors import DataError
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import TokenizedRow
from megatron_ads.stable_random import key_of, shuffled

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """One source of rows."""

    rows: Sequence[TokenizedRow]
    weight: float = 1.0
    """Share of the samples drawn from this source, relative to the others."""
    name: str = "rows"
    adaptive_task: str | None = None
    """The task whose validation metric decides over the share; None keeps the share."""
    known_content: str | None = None
    """The digest of the rows, where it need not be computed."""

    @property
    def content(self) -> str:
        """Return a digest of the content of the rows and their order."""
        return self.known_content or content_of(map(row_digest, self.rows))


class Draw(NamedTuple):
    """One sample, as it was drawn."""

    source: int
    row: TokenizedRow
    number: int
    """Of the row, counted through all sources."""


class Mixture:
    """An endless, reproducible sequence of samples; its state is one count per source."""

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
        self._first_number = [0, *accumulate(self.sizes)]
        self._shares = _normalized([source.weight for source in sources])
        self._seed = seed
        self.drawn = [0] * len(sources)
        self._drawn_before = [0] * len(sources)
        """Under earlier shares."""

    @property
    def rows(self) -> Iterator[TokenizedRow]:
        """Every row of every source, at its number."""
        return (row for source in self._sources for row in source.rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(len(source.rows) for source in self._sources)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """Of each source, a digest of its rows and their order."""
        return tuple(source.content for source in self._sources)

    @cached_property
    def older_digests(self) -> tuple[str, ...]:
        """The same as checkpoints had it before ``contents``; reads every row."""
        return tuple(_older_digest(source.rows) for source in self._sources)

    def draw(self) -> Draw:
        """Return the next sample."""
        drawn = [now - before for now, before in zip(self.drawn, self._drawn_before, strict=True)]
        upcoming = sum(drawn) + 1
        behind = [share * upcoming - count for share, count in zip(self._shares, drawn, strict=True)]
        chosen = behind.index(max(behind))
        rows = self._sources[chosen].rows
        epoch, place = divmod(self.drawn[chosen], len(rows))
        self.drawn[chosen] += 1
        index = shuffled(place, len(rows), key_of(self._seed, chosen, epoch))
        return Draw(chosen, rows[index], self._first_number[chosen] + index)

    def put_back(self, sources: Sequence[int]) -> None:
        """Undo the latest draws, given the sources they came from."""
        for source in sources:
            self.drawn[source] -= 1

    @property
    def adaptive_tasks(self) -> tuple[str, ...]:
        """Tasks whose share may change."""
        return tuple(sorted({source.adaptive_task for source in self._sources if source.adaptive_task is not None}))

    def adapt(self, task_shares: Mapping[str, float]) -> dict[str, float]:
        """From the next draw on, divide among the adaptive tasks what they have together.

        Sources of one task keep their proportions; those that are not adaptive keep their share of the whole.

        Args:
            task_shares: Of every adaptive task; they sum to 1.

        Returns:
            The share of each adaptive task in all samples.
        """
        declared = dict.fromkeys(self.adaptive_tasks, 0.0)
        for source in self._sources:
            if source.adaptive_task is not None:
                declared[source.adaptive_task] += source.weight
        together = sum(declared.values())
        weights = [source.weight for source in self._sources]
        for number, source in enumerate(self._sources):
            if (task := source.adaptive_task) is not None:
                weights[number] = source.weight / declared[task] * together * task_shares[task]
        self._shares, self._drawn_before = _normalized(weights), list(self.drawn)
        return {task: together * task_shares[task] / sum(weights) for task in declared}

    def state_dict(self) -> dict[str, Any]:
        """Return the current state of the sequence."""
        return {
            "drawn": list(self.drawn),
            "drawn_before": list(self._drawn_before),
            "shares": list(self._shares),
            "source_weights": [source.weight for source in self._sources],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; weights that have changed since hold from the next draw on."""
        self.drawn, self._drawn_before = list(state["drawn"]), list(state["drawn_before"])
        self._shares = tuple(state["shares"])
        # Older states lack the weights; their shares are those, unless they had adapted.
        before = _normalized(state.get("source_weights") or (() if self.adaptive_tasks else self._shares))
        now = _normalized([source.weight for source in self._sources])
        if before and not np.allclose(before, now, rtol=1e-9, atol=0.0):
            changed = zip(self._sources, before, now, strict=True)
            logger.info(
                "the sources' weights have changed, and hold from here on: %s",
                ", ".join(f"{source.name} {old:.4g} -> {new:.4g} of the samples" for source, old, new in changed),
            )
            self._shares = _normalized(
                [share * new / old for share, old, new in zip(self._shares, before, now, strict=True)]
            )
            self._drawn_before = list(self.drawn)


def row_digest(row: TokenizedRow) -> bytes:
    """Return a digest of a row; no zero byte ends it, which numpy would not keep."""
    digest = hashlib.blake2b(digest_size=15)
    for part in _content(row):
        digest.update(part)
    return digest.digest() + b"."


def content_of(row_digests: Iterable[bytes]) -> str:
    """Return the digest of rows in their order, from those of each."""
    digest = hashlib.sha256()
    for each in row_digests:
        digest.update(each)
    return digest.hexdigest()


def _older_digest(rows: Sequence[TokenizedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for part in _content(row):
            digest.update(part)
    return digest.hexdigest()


def _content(row: TokenizedRow) -> Iterator[bytes]:
    name = f"{row.id}\0{row.task}".encode(errors="surrogatepass")
    for part in (name, row.tokens.tobytes(), row.loss_weights.tobytes()):
        yield len(part).to_bytes(8, "little") + part


def _normalized(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)
