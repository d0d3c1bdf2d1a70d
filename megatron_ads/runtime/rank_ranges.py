"""Name many ranks in few words."""

from collections.abc import Sequence
from itertools import groupby


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return ``"rank 3"``, or for several ``"ranks 0-7, 9"``."""
    ordered = sorted(ranks)
    runs = [
        [rank for _, rank in run] for _, run in groupby(enumerate(ordered), lambda indexed: indexed[1] - indexed[0])
    ]
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ordered) != 1 else ''} {named}"
