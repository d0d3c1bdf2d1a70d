"""Inner products of several gradients of the same weights, over all trained parameters of a job.

    G_kj = <g_k, g_j> = sum over the ranks of the products of their own elements

Every element counts once, however the job is laid out: a rank takes the shards that its distributed optimizer updates,
without those that the norm of gradients leaves out as repeated by tensor parallelism or by the MTP stage. FP64, so that
the division among ranks does not show.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ads.runtime.device import device

_PIECE, _PIECE_ON_GPU = 1 << 18, 1 << 24
"""Elements multiplied at a time: their FP64 copies stay in a CPU's cache, and take 0.3 GB of a GPU."""


def inner_products(gradients: Iterable[Sequence[Tensor]], count: int) -> Tensor:
    """Return G, (K, K), in FP64 on the CPU, the same on every rank; a collective.

    All but the last of the K gradients are kept on the host until they have met the others: (K - 1) x 4 bytes for each
    element that this rank updates, as much as K - 1 FP32 moments of its optimizer. The device holds one piece more.

    Args:
        gradients: Each one's tensors of this rank, none where it trains nothing; not read after the next is asked for.
        count: K.
    """
    table_KK = torch.zeros(count, count, dtype=torch.float64, device=device())
    kept: list[list[Tensor]] = []
    for number, own in enumerate(gradients):
        for other, theirs in enumerate([*kept, own]):
            table_KK[number, other] = table_KK[other, number] = _product(own, theirs)
        if number < count - 1:
            kept.append([gradient.to("cpu", copy=True) for gradient in own])
    dist.all_reduce(table_KK)
    return table_KK.cpu()


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the sum of the products of all elements."""
    total = torch.zeros((), dtype=torch.float64, device=device())
    for here, there in zip(left, right, strict=True):
        size = _PIECE_ON_GPU if here.is_cuda else _PIECE
        for one, other in zip(here.flatten().split(size), there.flatten().split(size), strict=True):
            total += torch.dot(one.double(), other.to(one.device).double())
    return total
