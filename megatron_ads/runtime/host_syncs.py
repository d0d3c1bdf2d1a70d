"""Let the host run ahead of the device where megatron-core 0.16 waits for it, or keeps it busy with small pieces.

The values are Megatron's own, bit for bit; ``tests/runtime/test_host_syncs.py`` compares them.
"""

import importlib
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_installed = False


def install() -> None:
    """Replace both functions in Megatron-Core's modules; call it after ``cpu_compat.install``. May be repeated."""
    global _installed
    if _installed:
        return
    mtp: Any = importlib.import_module("megatron.core.transformer.multi_token_prediction")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    mtp._roll_tensor_packed_seq = _rolling_packed_samples(mtp._roll_tensor_packed_seq)
    dispatcher.sort_chunks_by_idxs = _sorting_chunks(dispatcher.sort_chunks_by_idxs)
    _installed = True


def _rolling_packed_samples(original: Any) -> Any:
    """Megatron slices the row at each boundary, which is on the device: four waits for each sample."""

    @wraps(original)
    def roll(tensor: Tensor, shifts: int, dims: int, packed_seq_params: Any, cp_group: Any = None) -> Any:
        if cp_group is not None and cp_group.size() > 1:
            return original(tensor, shifts, dims, packed_seq_params, cp_group)
        rolled = roll_samples(tensor, packed_seq_params.cu_seqlens_q)
        return rolled, rolled.sum()

    return roll


def roll_samples(tensor: Tensor, boundaries: Tensor) -> Tensor:
    """Move each sample of the last dimension one to the left; its last place becomes 0.

    Args:
        tensor: (..., S).
        boundaries: Where each sample begins, and S last; on the same device.
    """
    return tensor.roll(-1, -1).index_fill_(-1, boundaries[1:].long() - 1, 0)


def _sorting_chunks(original: Any) -> Any:
    """Without Transformer Engine, Megatron cuts the tokens into ranks x experts pieces and joins them again."""

    @wraps(original)
    def sort(
        input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if fused:
            return original(input, split_sizes, sorted_idxs, probs, fused)
        order = order_of_chunks(split_sizes, sorted_idxs, rows=input.size(0), device=input.device)
        return _Reorder.apply(input, order), None if probs is None else _Reorder.apply(probs, order)

    return sort


def order_of_chunks(sizes: Tensor, chunks: Tensor | Sequence[int], *, rows: int, device: torch.device) -> Tensor:
    """Return the row that comes to each place when consecutive chunks of rows are put into another order; (rows,).

    The sizes, which may be on the host, are the only thing copied to ``device``.
    """
    sizes = sizes.to(device, torch.int64, non_blocking=True)
    chunks = torch.as_tensor(chunks).to(device, non_blocking=True)
    begin, moved = sizes.cumsum(0) - sizes, sizes[chunks]
    shift = begin[chunks] - (moved.cumsum(0) - moved)
    return torch.arange(rows, device=device) + shift.repeat_interleave(moved, output_size=rows)


class _Reorder(torch.autograd.Function):
    """Take rows in another order, each once, so that the backward pass takes them too and adds nothing up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad, memory_format=torch.contiguous_format).index_copy_(0, order, grad), None
