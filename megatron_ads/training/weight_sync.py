"""Hugging Face tensors straight from a running job, bucket by bucket: for inference engines that follow the training.

Every rank walks the same list of parameters in model order. The ranks that own slices of a bucket send them, as one
message each, to the ranks that feed an engine, the destinations; these put the parameters together. Nothing passes
through the host, adapters are merged as a message is filled, and besides the model

    a destination      holds the messages of one bucket, and one parameter of it put together; a single one reads
                       what it owns where it is
    another owner      holds its own message of one bucket
    every other rank   sends and holds nothing
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.names import Parameter, ParameterKind, parameters
from conversion.rank_files import OwnedSlice, ShardsLayout
from conversion.regions import part_values, slice_rectangles
from conversion.sources import WeightSource
from megatron_ads.errors import ConfigError
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import device
from megatron_ads.training.export import LiveWeight, live_weights

DEFAULT_BUCKET_BYTES = 1 << 30
HOST_BUCKET_BYTES = 1 << 24
"""Without a GPU: the host's allocator uses memory of this size again, but maps larger blocks anew, page by page, which
takes several times as long as a copy."""

Slices = Sequence[tuple[Parameter, Sequence[OwnedSlice]]]
"""Parameters, each with the parts that ranks own of it."""


@dataclass(frozen=True, slots=True)
class WeightMessage:
    """What one owner sends at once."""

    owner: int
    dtype: torch.dtype
    pieces: Sequence[tuple[Parameter, OwnedSlice]]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive parameters, and the messages that bring them."""

    slices: Slices
    messages: Sequence[WeightMessage]

    @classmethod
    def of(cls, slices: Slices, dtype: torch.dtype) -> Self:
        """Return one message per owner and dtype."""
        pieces: dict[tuple[int, bool], list[tuple[Parameter, OwnedSlice]]] = defaultdict(list)
        for parameter, of_parameter in slices:
            for piece in of_parameter:
                pieces[piece.owner, _dtype(parameter, dtype) is not dtype].append((parameter, piece))
        messages = [
            WeightMessage(owner, torch.float32 if in_fp32 else dtype, pieces[owner, in_fp32])
            for owner, in_fp32 in sorted(pieces)
        ]
        return cls(slices, messages)


class WeightSync:
    """Brings a job's weights to its destinations, as often as its engines should see an update."""

    def __init__(
        self,
        shards: ShardsLayout,
        source: WeightSource,
        *,
        destinations: Sequence[int] = (0,),
        bucket_bytes: int | None = None,
    ) -> None:
        """Prepare the groups; a collective, with the same arguments on every rank.

        Args:
            source: What the job was loaded from: it says which repeated tensors belong.
            destinations: Ranks of the job that feed an engine. Rank 0 serves an engine that takes its weights from one
                process and spreads them itself, as vLLM and SGLang do; with an engine on every node it is one rank a
                node; engines inside the training processes need every rank.
            bucket_bytes: Exceeded only for a parameter that is larger; None: ``DEFAULT_BUCKET_BYTES``, and on a CPU
                ``HOST_BUCKET_BYTES``.

        Raises:
            ConfigError: If there is no destination, or one that is not a rank of the job.
        """
        chosen = sorted(set(destinations))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < shards.layout.world:
            raise ConfigError(
                f"destinations are {list(destinations)}; they must be ranks from 0 to {shards.layout.world - 1}."
            )
        self._shards = shards
        self._destinations = chosen
        default = HOST_BUCKET_BYTES if device().type == "cpu" else DEFAULT_BUCKET_BYTES
        self._bucket_bytes = bucket_bytes or default
        self._repeats: dict[str, list[str]] = {}
        for alias, canonical in source.aliases.items():
            self._repeats.setdefault(canonical, []).append(alias)
        self._buckets: list[Bucket] = []
        self._group: Any = None
        if 1 < len(chosen) < shards.layout.world:
            self._group = process_groups.new_group(chosen)

    def tensors(self, models: Sequence[GPTModel], spec: LayerSpec) -> Iterator[tuple[str, Tensor]]:
        """Yield every ``(HF name, tensor)`` of the model on the destinations, repeats of the MTP layers included.

        A collective: every rank must iterate to the end, also those that are no destination and get nothing. Where one
        stops early, the others wait for it until a communication timeout ends the job. A tensor is on the
        destination's device, in the dtype that is trained; the router bias is FP32. What a single destination owns
        itself is the model's own memory: to be read before the next update, and never written to.
        """
        own = live_weights(models, spec)
        dtype = next(models[0].parameters()).dtype
        self._buckets = self._buckets or list(self._planned(dtype))
        for bucket in self._buckets:
            for parameter, whole in self._exchange(bucket, own):
                yield from part_values(parameter, whole)
                for alias in self._repeats.get(parameter.name, ()):
                    yield alias, whole

    def _planned(self, dtype: torch.dtype) -> Iterator[Bucket]:
        slices: list[tuple[Parameter, tuple[OwnedSlice, ...]]] = []
        filled = 0
        for parameter in parameters(self._shards.shape).values():
            nbytes = torch.Size(parameter.shape).numel() * _dtype(parameter, dtype).itemsize
            if slices and filled + nbytes > self._bucket_bytes:
                yield Bucket.of(slices, dtype)
                slices, filled = [], 0
            slices.append((parameter, self._shards.owners(parameter)))
            filled += nbytes
        if slices:
            yield Bucket.of(slices, dtype)

    def _exchange(self, bucket: Bucket, own: Mapping[str, LiveWeight]) -> Iterator[tuple[Parameter, Tensor]]:
        """Send the slices of a bucket; assemble the parameters on the destinations."""
        received: dict[tuple[str, int], Tensor] = {}
        for message in bucket.messages:
            received |= self._deliver(message, own)
        if dist.get_rank() in self._destinations:
            for parameter, slices in bucket.slices:
                yield (
                    parameter,
                    _assemble(parameter, [(piece, received.pop((parameter.name, piece.index))) for piece in slices]),
                )

    def _deliver(self, message: WeightMessage, own: Mapping[str, LiveWeight]) -> dict[tuple[str, int], Tensor]:
        """Bring one owner's slices to the destinations, through the first of them where it is none itself."""
        rank, owner = dist.get_rank(), message.owner
        root = owner if owner in self._destinations else self._destinations[0]
        if rank != owner and rank not in self._destinations:
            return {}
        if self._destinations == [owner]:
            return {
                (parameter.name, piece.index): own[parameter.name].current().to(message.dtype)
                for parameter, piece in message.pieces
            }
        shapes = [torch.Size(self._shards.slice_shape(parameter)) for parameter, _ in message.pieces]
        values = torch.empty(sum(shape.numel() for shape in shapes), dtype=message.dtype, device=device())
        parts = [
            part.view(shape)
            for part, shape in zip(values.split([shape.numel() for shape in shapes]), shapes, strict=True)
        ]
        if rank == owner:
            for part, (parameter, _) in zip(parts, message.pieces, strict=True):
                part.copy_(own[parameter.name].current())
            if root != owner:
                dist.send(values, dst=root)
                return {}
        elif rank == root:
            dist.recv(values, src=owner)
        if len(self._destinations) > 1:
            dist.broadcast(values, src=root, group=self._group)
        return {
            (parameter.name, piece.index): part for part, (parameter, piece) in zip(parts, message.pieces, strict=True)
        }


def _dtype(parameter: Parameter, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if parameter.kind is ParameterKind.ROUTER_BIAS else dtype


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
