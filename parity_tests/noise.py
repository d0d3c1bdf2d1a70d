"""How BF16 passes are judged: against FP32, beside transformers' own BF16 pass. Two of them never agree to the bit."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


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
