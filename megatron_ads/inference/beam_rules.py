"""What an answer may go on with, and how much that counts for a beam: any token, or tokens of valid names.

    gain(token) = (1 - a) log p_model(token | written) + a log [ P(written, token) / P(written) ]

P(written) is the share that a collaborative model gives to all names that begin so; a = 0 leaves it out. Over a whole
name the gains add up to (1 - a) log p_model(name) + a log P(name). Source: D3 (arXiv:2406.14900), equation 4 and its
text-free assistant.

Valid names are a tree of tokens. Every name ends with the end token, so none is a prefix of another and every leaf is
one name. Names are numbered in the order of their tokens, so that the names below a node are a range.

Shape suffixes: K = beams of one row, V = vocabulary, C = candidates, or children of a node, N = names.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Node:
    """What has been written so far."""

    first: int
    """Names ``first`` to ``last`` (exclusive) are below."""
    last: int
    tokens_C: NDArray[np.int64]
    """What may follow; nothing behind a whole name."""
    children: tuple["Node", ...]

    def child(self, token: int) -> "Node":
        """Return what has been written with one of ``tokens_C`` more."""
        return self.children[int(np.searchsorted(self.tokens_C, token))]


@dataclass(frozen=True, slots=True)
class NameTrie:
    """All valid names."""

    names: tuple[str, ...]
    """By their number."""
    root: Node
    depth: int
    """Tokens of the longest name, end token included."""

    def name_of(self, tokens: Sequence[int]) -> str:
        """Return the name with these tokens, the end token included."""
        node = self.root
        for token in tokens:
            node = node.child(token)
        return self.names[node.first]


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
    return NameTrie(names=names, root=_root(ordered), depth=max(map(len, ordered)))


def _root(ordered: Sequence[tuple[int, ...]]) -> Node:
    """Return the tree of sorted sequences, built from its leaves: a name may be longer than Python's recursion."""
    by_depth: dict[int, list[Node]] = defaultdict(list)
    for number, sequence in enumerate(ordered):
        by_depth[len(sequence)].append(Node(number, number + 1, np.empty(0, dtype=np.int64), ()))
    nodes: list[Node] = []
    for depth in range(max(by_depth), -1, -1):
        nodes_at = by_depth[depth]
        for _, group in groupby(nodes, key=lambda node, depth=depth: ordered[node.first][:depth]):  # type: ignore[misc]
            children = tuple(group)
            tokens_C = np.asarray([ordered[child.first][depth] for child in children], dtype=np.int64)
            nodes_at.append(Node(children[0].first, children[-1].last, tokens_C, children))
        nodes = sorted(nodes_at, key=lambda node: node.first)
    return nodes[0]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every way to lengthen the beams of one row by a token, (C,) each."""

    beams_C: NDArray[np.int64]
    """Which beam is lengthened."""
    tokens_C: NDArray[np.int64]
    log_probabilities_C: NDArray[np.float64]
    """By the model."""
    gains_C: NDArray[np.float64]
    """What the beam's score gains; not above 0."""
    forced_C: NDArray[np.bool_]
    """There was no other token."""
    states: Sequence[Any]
    """What the rules know of the lengthened beams."""


class AnyToken:
    """Everything may be written; of each beam the most probable tokens are enough to find the best beams."""

    start = None
    """What is known before anything is written."""

    def __init__(self, beams: int) -> None:
        """Take the number of beams; each may end at once, so that as many again must be at hand."""
        self._most = 2 * beams

    def candidates(self, states: Sequence[Any], log_probabilities_KV: "Tensor") -> Candidates:
        beams, vocabulary = log_probabilities_KV.shape
        most = min(self._most, vocabulary)
        values_KC, tokens_KC = log_probabilities_KV.topk(most, dim=1)
        values_C = values_KC.double().cpu().numpy().reshape(-1)
        return Candidates(
            beams_C=np.repeat(np.arange(beams), most),
            tokens_C=tokens_KC.cpu().numpy().reshape(-1),
            log_probabilities_C=values_C,
            gains_C=values_C,
            forced_C=np.zeros(beams * most, dtype=np.bool_),
            states=[None] * (beams * most),
        )


class ValidNames:
    """Only the names of a trie may be written."""

    def __init__(self, trie: NameTrie, *, chances: Sequence[float] | None = None, collaborative: float = 0.0) -> None:
        """Take the names, the collaborative model's probability of each (all above 0), and its share ``a``."""
        self.start = trie.root
        self._share = collaborative if chances is not None else 0.0
        chances_N = np.ones(len(trie.names)) if chances is None else np.asarray(chances, dtype=np.float64)
        self._up_to = np.concatenate([[0.0], np.cumsum(chances_N)])

    def candidates(self, states: Sequence[Node], log_probabilities_KV: "Tensor") -> Candidates:
        counts = np.asarray([len(node.tokens_C) for node in states])
        beams_C = np.repeat(np.arange(len(states)), counts)
        tokens_C = np.concatenate([node.tokens_C for node in states])
        import torch  # takes seconds, and names are also written without it

        chosen = log_probabilities_KV[torch.from_numpy(beams_C), torch.from_numpy(tokens_C)]
        values_C = chosen.double().cpu().numpy()
        children = [child for node in states for child in node.children]
        gains_C = values_C
        if self._share:
            before_C = np.repeat([self._log_mass(node) for node in states], counts)
            after_C = np.asarray([self._log_mass(child) for child in children])
            gains_C = (1 - self._share) * values_C + self._share * (after_C - before_C)
        return Candidates(
            beams_C=beams_C,
            tokens_C=tokens_C,
            log_probabilities_C=values_C,
            gains_C=gains_C,
            forced_C=np.repeat(counts == 1, counts),
            states=children,
        )

    def _log_mass(self, node: Node) -> float:
        return float(np.log(self._up_to[node.last] - self._up_to[node.first]))


Rules = AnyToken | ValidNames
"""What may be written in one row."""


def only_valid(logits_RV: "Tensor", nodes: Sequence[Node | None]) -> "Tensor":
    """Return the logits of rows, -inf for what no valid name goes on with behind the row's node; None is any token."""
    if not any(nodes):
        return logits_RV
    of_names = [(row, node.tokens_C) for row, node in enumerate(nodes) if node is not None]
    rows_C = np.repeat([row for row, _ in of_names], [len(tokens_C) for _, tokens_C in of_names])
    tokens_C = np.concatenate([tokens_C for _, tokens_C in of_names])
    import torch

    device = logits_RV.device
    valid_RV = torch.tensor([node is None for node in nodes], device=device)[:, None].repeat(1, logits_RV.size(1))
    valid_RV[torch.from_numpy(rows_C).to(device), torch.from_numpy(tokens_C).to(device)] = True
    return logits_RV.masked_fill(~valid_RV, float("-inf"))
