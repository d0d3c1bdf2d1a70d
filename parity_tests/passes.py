"""What a forward pass of either side gives, on the CPU and in FP32 whatever computed it, and how two are compared.

FP32 passes must agree to rounding, and the first layer that does not is named. Two BF16 passes never agree to the bit:
ours is judged against FP32, next to transformers' own BF16 pass.

Shape suffixes: B = rows, S = tokens of a row, C = hidden width, T = B * S, K = experts per token, E = experts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from parity_tests.tolerances import LAYER


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


@dataclass(frozen=True, slots=True)
class Departure:
    """A layer whose output differs although that of the layer before it does not."""

    layer: int
    difference: float
    """Largest |difference| of its output over the output's root mean square."""
    row: int
    position: int
    """Where in the tokens the difference is largest."""

    def __str__(self) -> str:
        return (
            f"layer {self.layer} departs first: its output is off by {self.difference:.1e} of its size, most at "
            f"position {self.position} of row {self.row}; the layers before it agree"
        )


def first_departure(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Departure | None:
    """Compare the outputs (B, S, C) of all layers; return the first beyond the tolerance, None if none is."""
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference_BS = (a - b).abs().amax(dim=-1) / b.pow(2).mean().sqrt()
        largest = float(difference_BS.max())
        if not largest < LAYER.value:
            row, position = divmod(int(difference_BS.argmax()), difference_BS.size(1))
            return Departure(layer, largest, row, position)
    return None


def noise_ratio(ours: Tensor, theirs: Tensor, exact: Tensor) -> float:
    """Return the root-mean-square error of ``ours`` over that of ``theirs``, both in BF16, against FP32."""
    return float(torch.dist(ours, exact) / torch.dist(theirs, exact))


def mean_kl(exact_BSV: Tensor, other_BSV: Tensor) -> float:
    """Return the mean over positions of KL(exact || other) of the next-token distribution, in nats."""
    p, q = (log_softmax(logits, dim=-1).flatten(0, 1) for logits in (exact_BSV, other_BSV))
    return float(kl_div(q, p, reduction="batchmean", log_target=True))


def largest_noise_ratio(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Return the largest ``noise_ratio`` of any kind of parameter, and the kind.

    A kind is what has one name but for the numbers of layer and expert: one expert alone gets so few tokens that a
    single one more or less, by a rounding in its router, decides its gradient.
    """
    assert set(ours) == set(theirs) == set(exact)
    kinds: dict[str, list[str]] = {}
    for name in exact:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    joined = [
        (kind, [torch.cat([side[name].flatten() for name in names]) for side in (ours, theirs, exact)])
        for kind, names in kinds.items()
    ]
    return max((noise_ratio(*sides), kind) for kind, sides in joined)
