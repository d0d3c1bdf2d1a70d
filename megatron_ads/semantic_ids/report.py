"""How good semantic IDs are: which share of a codebook is used, how evenly, how many items collide, what is lost.

    perplexity of a level = exp(-sum_c p_c log p_c),   p_c = share of the items with code c

Equal to the codes of a level if all are used evenly. The collision rate is the share of the items that share the codes
of all levels with another one, before they are told apart.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.reporting.page import fixed, text_table
from megatron_ads.semantic_ids.disambiguation import Codes


def measure(code_NL: NDArray[np.int64], codes: Sequence[Codes], *, size: int, lost: float) -> dict[str, Any]:
    """Return the measures, as JSON values.

    Args:
        code_NL: Codes of all items, before they are told apart.
        codes: Afterwards.
        size: Codes of a level.
        lost: Relative reconstruction error.
    """
    items, levels = code_NL.shape
    groups = Counter(map(tuple, code_NL.tolist()))
    return {
        "items": items,
        "collision_rate": sum(count for count in groups.values() if count > 1) / items,
        "largest_collision": max(groups.values()),
        "items_with_another_code": sum(len(own) > levels for own in codes),
        "different_ids": len(set(codes)),
        "reconstruction_error": lost,
        "levels": [_level(code_NL[:, level], size) for level in range(levels)],
    }


def _level(code_N: NDArray[np.int64], size: int) -> dict[str, Any]:
    shares_C = np.bincount(code_N, minlength=size) / len(code_N)
    used_C = shares_C[shares_C > 0]
    return {
        "codes": size,
        "used": len(used_C),
        "use": len(used_C) / size,
        "perplexity": float(np.exp(-(used_C * np.log(used_C)).sum())),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return the measures as lines of text."""
    rows = [
        [
            str(level),
            f"{of_level['codes']:,}",
            f"{of_level['used']:,}",
            fixed(of_level["use"]),
            fixed(of_level["perplexity"]),
        ]
        for level, of_level in enumerate(report["levels"])
    ]
    return [
        f"items                    {report['items']:>10,}",
        f"share that collides      {report['collision_rate']:>10.4f}",
        f"largest group of these   {report['largest_collision']:>10,}",
        f"told apart by a code     {report['items_with_another_code']:>10,}",
        f"reconstruction error     {report['reconstruction_error']:>10.4f} of the variance",
        *text_table(rows, ["level", "codes", "used", "share", "perplexity"], left=[]),
    ]
