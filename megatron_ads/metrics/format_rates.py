"""How often answers have the form that was asked for. Source: Taiji, table 3 (names), definitions ours."""

from collections.abc import Sequence


def format_rates(texts: Sequence[str]) -> dict[str, float | None]:
    """Return the shares of answers with a closed ``<think>`` block, with text in it, and with text after it.

    An answer without a closed block has no answer part. All are None without answers.
    """
    blocks = [_block(text) for text in texts]
    return {
        "think_tag_presence_rate": _share([block is not None for block in blocks]),
        "think_non_empty_rate": _share([block is not None and bool(block[0]) for block in blocks]),
        "answer_non_empty_rate": _share([block is not None and bool(block[1]) for block in blocks]),
    }


def _block(text: str) -> tuple[str, str] | None:
    """Return what is inside the first ``<think>`` block and what follows it; None without a closed block."""
    _, opening, rest = text.partition("<think>")
    reasoning, closing, answer = rest.partition("</think>")
    return (reasoning.strip(), answer.strip()) if opening and closing else None


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
