"""How often answers have the form that was asked for. Source: Taiji, table 3 (names), definitions ours."""

import re
from collections.abc import Sequence

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def format_rates(texts: Sequence[str]) -> dict[str, float | None]:
    """Return the shares of answers with a closed ``<think>`` block, with text in it, and with text after it.

    An answer without a closed block has no answer part. All are None without answers.
    """
    blocks = [_THINK.search(text) for text in texts]
    return {
        "think_tag_presence_rate": _share([block is not None for block in blocks]),
        "think_non_empty_rate": _share([block is not None and bool(block[1].strip()) for block in blocks]),
        "answer_non_empty_rate": _share([
            block is not None and bool(text[block.end() :].strip()) for text, block in zip(texts, blocks, strict=True)
        ]),
    }  # fmt: skip


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
