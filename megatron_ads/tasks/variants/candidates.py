"""Lists to choose from: the true one among others drawn by the row's id, in an order drawn by it as well."""

import hashlib
import random
from collections.abc import Iterable, Sequence

from megatron_ads.data.rows import Fact
from megatron_ads.errors import DataError
from megatron_ads.tasks.prompt_templates import LABELS

CANDIDATES = 20


def candidates_of(row_id: str, truth: str, pool: Sequence[str], count: int = CANDIDATES) -> tuple[str, ...]:
    """Return ``count`` different names, ``truth`` among them; the others are also the negatives of a preference loss.

    Args:
        row_id: Decides which names are drawn and their order.
        truth: The true one.
        pool: Where the others come from; may hold the true one.
        count: How many, the true one included.

    Raises:
        DataError: If the pool has too few others.
    """
    others = [name for name in dict.fromkeys(pool) if name != truth]
    if len(others) < count - 1:
        raise DataError(f"the pool has {len(others)} others than {truth!r}; {count - 1} are needed to choose from.")
    draw = random.Random(hashlib.sha256(row_id.encode()).digest())
    chosen = [truth, *draw.sample(others, count - 1)]
    draw.shuffle(chosen)
    return tuple(chosen)


def candidate_lines(names: Iterable[str]) -> list[str]:
    """Return the lines of a prompt that list candidates."""
    return [f"{LABELS[Fact.candidates]}:", *names]
