"""What a forward pass of either side gives, on the CPU and in FP32 whatever it was computed on and in.

Shape suffixes: B = rows, S = tokens of a row, C = hidden width, T = B * S, K = experts per token, E = experts.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What one router did with every token."""

    experts_TK: Tensor
    """Sorted by number."""
    weights_TE: Tensor
    """Zero where an expert was not chosen."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    logits: Tensor
    """(B, S, vocabulary)."""
    layers: list[Tensor]
    """Output of each decoder layer, (B, S, C)."""
    routing: list[Routing]
    """Of each MoE layer."""
