"""Valid names as a tree of tokens: what may follow what has been written so far, for names and nothing else.

Every name ends with the end token, so none is a prefix of another and every leaf is one name. Names are numbered in the
order of their tokens, so that the names below a node are a range.

Shape suffixes: C = children of a node, N = names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import DataError


@dataclass(frozen=True, slots=True)
class Node:
    """What has been written so far."""

    first: int
    """Names ``first`` to ``last`` (exclusive) are below."""
    last: int
    tokens_C: NDArray[np.int64]
    """What may follow; nothing behind a whole name."""
    children: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class NameTrie:
    """All valid names."""

    names: tuple[str, ...]
    """By their number."""
    root: Node
    depth: int
    """Tokens of the longest name, end token included."""


def build_trie(tokens_of: Mapping[str, Sequence[int]], end_token: int) -> NameTrie:
    """Return the tree of names; ``tokens_of`` does not hold the end token.

    Raises:
        DataError: If there are no names, or two are the same tokens.
    """
    if not tokens_of:
        raise DataError("there are no valid names to answer with; give --names, a file of them.")
    by_tokens: dict[tuple[int, ...], str] = {}
    for name, tokens in tokens_of.items():
        other = by_tokens.setdefault((*tokens, end_token), name)
        if other != name:
            raise DataError(f"{other!r} and {name!r} are the same tokens; keep one of the two names.")
    ordered = sorted(by_tokens)
    names = tuple(by_tokens[tokens] for tokens in ordered)
    return NameTrie(names=names, root=_node(ordered, 0, len(ordered), 0), depth=max(map(len, ordered)))


def _node(ordered: Sequence[tuple[int, ...]], first: int, last: int, depth: int) -> Node:
    """Return the node below which ``ordered[first:last]`` are, all with the same first ``depth`` tokens."""
    if len(ordered[first]) == depth:  # the end token was the last: there is no other name below
        return Node(first, last, np.empty(0, dtype=np.int64), ())
    tokens = [sequence[depth] for sequence in ordered[first:last]]
    starts = [first + place for place in range(len(tokens)) if place == 0 or tokens[place] != tokens[place - 1]]
    ends = [*starts[1:], last]
    children = tuple(_node(ordered, start, end, depth + 1) for start, end in zip(starts, ends, strict=True))
    return Node(first, last, np.asarray([ordered[start][depth] for start in starts], dtype=np.int64), children)
