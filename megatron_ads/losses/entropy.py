"""Entropy of the next-token distribution, of logits that may be divided over tensor-parallel ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_TOKENS_AT_ONCE = 512
"""Tokens whose logits are copied in FP32 at a time: 0.26 GB, twice, with DeepSeek's vocabulary."""


@torch.no_grad()
def token_entropy(logits_TV: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return H_t = -sum_v p_v log p_v in nats, (T,) FP32, without gradient.

    With x_v the logits less their maximum and Z = sum_v exp(x_v): ``H = log Z - 1/Z sum_v exp(x_v) x_v``.

    Args:
        logits_TV: The whole vocabulary, or with ``group`` this rank's part of it; unchanged.
        group: The tensor-parallel ranks, which all call this; each gets the same result.
    """
    entropies = []
    for part in torch.split(logits_TV, _TOKENS_AT_ONCE):
        largest_T = part.amax(-1).float()
        if group is not None:
            dist.all_reduce(largest_T, dist.ReduceOp.MAX, group)
        x_TV = part - largest_T[:, None]  # FP32 whatever the logits are
        exp_TV = x_TV.exp()
        sums_2T = torch.stack([exp_TV.sum(-1), torch.linalg.vecdot(exp_TV, x_TV)])
        if group is not None:
            dist.all_reduce(sums_2T, group=group)
        entropies.append(sums_2T[0].log() - sums_2T[1] / sums_2T[0])
    return torch.cat(entropies)
