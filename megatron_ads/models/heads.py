"""Projected queries, keys and values made into attention heads: positions rotated in, laid out head by head.

Shape suffixes: S = tokens of a row, B = rows, H = heads on this rank, N = width of the part of a head without
positions, R = of the part with, V = of a value.
"""

from typing import Any

import torch
from torch import Tensor

Heads = tuple[Tensor, Tensor, Tensor]


class MakeHeads(torch.autograd.Function):
    """Turn (S, B, H, ...) projections into contiguous (B, H, S, ...) heads in one pass over the data.

    Each pair of neighbouring channels of the position part is one complex number, turned by the angle of its
    position. (transformers and Megatron-Core gather the even channels before the odd ones first; scores of queries
    against keys do not depend on an order that both share.) The key's position part is one for all heads.
    """

    @staticmethod
    def forward(ctx: Any, query_SBHx: Tensor, key_value_SBHx: Tensor, key_SBR: Tensor, turns_SR: Tensor) -> Heads:
        """Return query and key (B, H, S, N + R) and value (B, H, S, V).

        Args:
            query_SBHx: N, then R channels.
            key_value_SBHx: N channels of the key, then V of the value.
            key_SBR: The key's position part.
            turns_SR: Complex factor of each position and pair of channels, (S, 1, R / 2).
        """
        rotated, plain = key_SBR.size(-1), query_SBHx.size(-1) - key_SBR.size(-1)
        length, rows, heads, width = query_SBHx.shape
        query, key = query_SBHx.new_empty(2, rows, heads, length, width).unbind()
        query[..., :plain] = query_SBHx[..., :plain].permute(1, 2, 0, 3)
        query[..., plain:] = _turn(query_SBHx[..., plain:], turns_SR.unsqueeze(1)).permute(1, 2, 0, 3)
        key[..., :plain] = key_value_SBHx[..., :plain].permute(1, 2, 0, 3)
        key[..., plain:] = _turn(key_SBR, turns_SR).permute(1, 0, 2).unsqueeze(1)
        value = key_value_SBHx[..., plain:].permute(1, 2, 0, 3).contiguous()
        ctx.save_for_backward(turns_SR)
        ctx.rotated = rotated
        return query, key, value

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Lay the gradients out by token again; a rotation is undone by the opposite one."""
        (turns_SR,) = ctx.saved_tensors
        back_SR = turns_SR.conj()
        rows, heads, length, width = query.shape
        plain = width - ctx.rotated
        query_SBHx = query.new_empty(length, rows, heads, width)
        query_SBHx[..., :plain] = query[..., :plain].permute(2, 0, 1, 3)
        query_SBHx[..., plain:] = _turn(query[..., plain:].permute(2, 0, 1, 3), back_SR.unsqueeze(1))
        key_value = key.new_empty(length, rows, heads, plain + value.size(-1))
        key_value[..., :plain] = key[..., :plain].permute(2, 0, 1, 3)
        key_value[..., plain:] = value.permute(2, 0, 1, 3)
        key_SBR = _turn(key[..., plain:].sum(1).permute(1, 0, 2), back_SR)
        return query_SBHx, key_value, key_SBR, None


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply pairs of neighbouring channels, as complex numbers in FP32, by ``turns``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
