"""Causal attention within each sample of a row, on the fastest exact kernel at hand.

Shapes: B = rows, H = heads, S = tokens of a row, L = of one sample, D = width of a query or key, V = of a value.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

BLOCK = 128
"""Queries taken at a time by ``BlockedAttention``."""
LONGEST_BLOCKED = 1024
"""Longest sample whose attention probabilities are kept for the backward pass; beyond, memory would grow with L^2."""


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, boundaries: Tensor | None = None) -> Tensor:
    """Return (B, H, S, V): each token's attention over itself and the tokens before it in its sample.

    Samples that share a row do not see each other, and cost what they cost, not the square of the row.

    Args:
        query: (B, H, S, D); key likewise, value with V, which may be less than D.
        scale: Factor on the scores before the softmax.
        boundaries: Where the samples of the one row begin, and its length last (int32); None: each row is one sample.
    """
    if boundaries is None:
        return _attend_sample(query, key, value, scale)
    if query.is_cuda and query.dtype is not torch.float32:
        return _attend_varlen(query, key, value, scale, boundaries)
    lengths = boundaries.diff().tolist()
    samples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_attend_sample(q, k, v, scale) for q, k, v in samples], dim=2)


def _attend_sample(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if query.device.type == "cpu" and query.dtype is torch.float32 and query.size(2) <= LONGEST_BLOCKED:
        return BlockedAttention.apply(query, key, value, scale)
    # The fused kernels take heads of one width only; zeros appended to the values add nothing to the result.
    wide = pad(value, (0, query.size(-1) - value.size(-1)))
    return scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scale)[..., : value.size(-1)]


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, boundaries: Tensor) -> Tensor:
    """All samples in one launch of the flash kernel, which takes 16-bit types only."""
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    wide = pad(value, (0, query.size(-1) - value.size(-1)))
    query_SHD, key_SHD, value_SHD = (x.squeeze(0).transpose(0, 1) for x in (query, key, wide))
    longest = int(boundaries.diff().max())
    output_SHD: Any = varlen_attn(
        query_SHD, key_SHD, value_SHD, boundaries, boundaries, longest, longest, scale=scale, window_size=(-1, 0)
    )
    return output_SHD[..., : value.size(-1)].transpose(0, 1).unsqueeze(0)


class BlockedAttention(torch.autograd.Function):
    """Causal attention in matrix products over blocks of queries, each against the keys that it may see.

    1.5 to 2 times as fast as torch's CPU kernels: they want values as wide as keys, or compute what the causal mask
    then removes. P = softmax(scale Q K^T), O = P V; with dP = dO V^T the gradient of the scores is
    P (dP - rowsum(dO O)) (arXiv:2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the output (B, H, L, V) for FP32 arguments."""
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        output = v.new_empty(q.size(0), q.size(1), v.size(2))
        probabilities = []
        for begin in range(0, q.size(1), BLOCK):
            end = min(begin + BLOCK, q.size(1))
            scores = torch.bmm(q[:, begin:end], k[:, :end].transpose(1, 2)).mul_(scale)
            future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu_(1)
            scores[:, :, begin:].masked_fill_(future, -torch.inf)
            probabilities.append(torch.softmax(scores, dim=-1))
            torch.bmm(probabilities[-1], v[:, :end], out=output[:, begin:end])
        ctx.save_for_backward(q, k, v, output, *probabilities)
        ctx.scale, ctx.shape = scale, query.shape
        return output.unflatten(0, query.shape[:2])

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of query, key and value."""
        q, k, v, output, *probabilities = ctx.saved_tensors
        grad = output_grad.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad * output).sum(-1, keepdim=True)
        for index, p in enumerate(probabilities):
            begin, end = index * BLOCK, p.size(2)
            block_grad = grad[:, begin:end]
            dv[:, :end].baddbmm_(p.transpose(1, 2), block_grad)
            ds = torch.bmm(block_grad, v[:, :end].transpose(1, 2)).sub_(mean[:, begin:end]).mul_(p)
            dq[:, begin:end] = torch.bmm(ds, k[:, :end]).mul_(ctx.scale)
            dk[:, :end].baddbmm_(ds.transpose(1, 2), q[:, begin:end], alpha=ctx.scale)
        rows = ctx.shape[:2]
        return dq.unflatten(0, rows), dk.unflatten(0, rows), dv.unflatten(0, rows), None
