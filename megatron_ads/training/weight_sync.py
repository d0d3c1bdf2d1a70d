"""Hugging Face tensors straight from a running job, in bounded buckets: for weight sync and export while training.

Every rank walks the same list of parameters in model order and, bucket by bucket, receives the slices that make them
up from the ranks that own them. Nothing but one bucket is held besides the model.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.names import Kind, Parameter, parameters
from conversion.rank_files import OwnedSlice, ShardsLayout
from conversion.sources import WeightSource
from conversion.tensor_parallel import slice_rectangles
from megatron_ads.runtime.device import device
from megatron_ads.training.export import canonical_weights

DEFAULT_BUCKET_BYTES = 1 << 30


def iterate_hf_tensors(
    models: Sequence[GPTModel],
    spec: LayerSpec,
    source: WeightSource,
    shards: ShardsLayout,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every ``(HF name, tensor)`` of the model on every rank, repeats of the MTP layers included.

    A collective: all ranks must take all tensors. A tensor is this rank's own copy, on its device, and in the dtype
    that is trained; the router bias is FP32. A bucket exceeds ``bucket_bytes`` only for a parameter that is larger.
    """
    own = canonical_weights(models, spec)
    repeats: dict[str, list[str]] = {}
    for alias, canonical in source.aliases.items():
        repeats.setdefault(canonical, []).append(alias)
    dtype = next(models[0].parameters()).dtype
    for bucket in _buckets(shards, dtype, bucket_bytes):
        for parameter, whole in _exchange(bucket, own, shards, dtype):
            row = 0
            for part in parameter.parts:
                yield part.name, whole[row : row + part.shape[0]]
                row += part.shape[0]
            for alias in repeats.get(parameter.name, ()):
                yield alias, whole


Bucket = list[tuple[Parameter, tuple[OwnedSlice, ...]]]


def _buckets(shards: ShardsLayout, dtype: torch.dtype, bucket_bytes: int) -> Iterator[Bucket]:
    bucket: Bucket = []
    filled = 0
    for parameter in parameters(shards.shape).values():
        nbytes = torch.Size(parameter.shape).numel() * _dtype(parameter, dtype).itemsize
        if bucket and filled + nbytes > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((parameter, shards.owners(parameter)))
        filled += nbytes
    if bucket:
        yield bucket


def _dtype(parameter: Parameter, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if parameter.kind is Kind.ROUTER_BIAS else dtype


def _exchange(
    bucket: Bucket, own: dict[str, Tensor], shards: ShardsLayout, dtype: torch.dtype
) -> Iterator[tuple[Parameter, Tensor]]:
    """Broadcast the slices of a bucket, one message per owner and dtype, and put the parameters together."""
    received: dict[tuple[str, int], Tensor] = {}
    for owner in sorted({piece.owner for _, slices in bucket for piece in slices}):
        for kind in (dtype, torch.float32) if dtype is not torch.float32 else (dtype,):
            wanted = [
                (parameter, piece)
                for parameter, slices in bucket
                for piece in slices
                if piece.owner == owner and _dtype(parameter, dtype) is kind
            ]
            received |= _broadcast(wanted, owner, own, shards, kind)
    for parameter, slices in bucket:
        yield parameter, _assemble(parameter, [(piece, received[parameter.name, piece.index]) for piece in slices])


def _broadcast(
    wanted: Sequence[tuple[Parameter, OwnedSlice]],
    owner: int,
    own: dict[str, Tensor],
    shards: ShardsLayout,
    dtype: torch.dtype,
) -> dict[tuple[str, int], Tensor]:
    if not wanted:
        return {}
    shapes = [torch.Size(shards.slice_shape(parameter)) for parameter, _ in wanted]
    if dist.get_rank() == owner:
        message = torch.cat([own[parameter.name].to(device(), dtype).flatten() for parameter, _ in wanted])
    else:
        message = torch.empty(sum(shape.numel() for shape in shapes), dtype=dtype, device=device())
    dist.broadcast(message, src=owner)
    flat = message.split([shape.numel() for shape in shapes])
    return {
        (parameter.name, piece.index): values.view(shape)
        for (parameter, piece), values, shape in zip(wanted, flat, shapes, strict=True)
    }


def _assemble(parameter: Parameter, slices: Sequence[tuple[OwnedSlice, Tensor]]) -> Tensor:
    first_piece, first = slices[0]
    if first_piece.count == 1:
        return first
    whole = torch.empty(parameter.shape, dtype=first.dtype, device=first.device)
    matrix = whole.view(-1, whole.size(-1))
    for piece, values in slices:
        row = 0
        for rectangle in slice_rectangles(parameter, piece.index, piece.count):
            rows = values.view(-1, values.size(-1))[row : row + rectangle.rows]
            matrix[
                rectangle.row : rectangle.row + rectangle.rows, rectangle.column : rectangle.column + rectangle.columns
            ] = rows
            row += rectangle.rows
    return whole
