"""Tokenized rows whose every token tells where it comes from."""

import numpy as np

from megatron_ads.rows import TokenizedRow


def row(name: str, length: int, *, first: int = 100, prompt: int | None = None, weight: float = 1.0) -> TokenizedRow:
    """Return a row of ``length`` tokens first, first + 1, ...; loss on all but the first ``prompt`` (default half)."""
    weights = np.full(length, weight, dtype=np.float32)
    weights[: length // 2 if prompt is None else prompt] = 0
    return TokenizedRow(name, "test", np.arange(first, first + length, dtype=np.int32), weights)


def rows(count: int, *, shortest: int = 5, longest: int = 30, prefix: str = "r") -> list[TokenizedRow]:
    """Return rows of various lengths with disjoint tokens."""
    spread = longest - shortest + 1
    return [
        row(f"{prefix}{number}", shortest + (number * 7) % spread, first=1000 * (number + 1)) for number in range(count)
    ]
