"""Semantic IDs as text: an item's codes, one token a level, such as ``<sid_0_17><sid_1_4><sid_2_201>``.

A model has a token for each code (``megatron-ads convert grow-vocabulary``), so that an ID of three levels is three
tokens. Items that share all codes have one more, of the level behind the last, but for the first of them.
Source: TIGER (arXiv:2305.05065), section 3.1; the advertiser paper, section 3.5.
"""

import re
from collections.abc import Iterator, Sequence

_WHOLE = re.compile(r"(?:<sid_\d+_\d+>)+")


def token_of(level: int, code: int) -> str:
    """Return the token of one code; levels and codes count from 0."""
    return f"<sid_{level}_{code}>"


def text_of(codes: Sequence[int]) -> str:
    """Return the text of an item's codes, the first level's first."""
    return "".join(token_of(level, code) for level, code in enumerate(codes))


def is_semantic_id(text: str) -> bool:
    """Return whether a text is a semantic ID and nothing else."""
    return _WHOLE.fullmatch(text) is not None


def all_tokens(levels: int, codes: int, disambiguation_codes: int) -> Iterator[str]:
    """Yield every token that an item of a codebook can have; of the last level there is no code 0."""
    for level in range(levels):
        yield from (token_of(level, code) for code in range(codes))
    yield from (token_of(levels, code) for code in range(1, disambiguation_codes))
