"""Write the weights of a live job as a shards folder: each distinct rank its own file, no rank more than its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.rank_files import ShardsLayout
from conversion.shards import write_manifest, write_rank_file
from conversion.sources import WeightSource
from megatron_ads.models.lora import Adapter, named_adapters
from megatron_ads.models.weights import named_weights


def export_shards(
    folder: Path, chunks: Sequence[GPTModel], spec: LayerSpec, source: WeightSource, layout: ShardsLayout
) -> None:
    """Write ``folder`` from all ranks; a collective. Without its manifest, written last, it is unfinished.

    ``source`` is what the job was loaded from: it lends the side files and says which repeated tensors belong.

    Raises:
        ConversionError: If a parameter is missing or has another shape than its rank should own.
    """
    rank, record = dist.get_rank(), None
    if layout.writes_file(rank):
        record = write_rank_file(folder, layout.file_of(rank), canonical_weights(chunks, spec), layout)
    records: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(records, record)
    if rank == 0:
        write_manifest(
            folder,
            layout=layout,
            config=source.config,
            records=[entry for entry in records if entry is not None],
            side_files_from=source.side_folder,
            aliases=tuple(source.aliases),
            derived=source.derived,
            source=f"training from {source.path.name}",
        )
    dist.barrier()


def canonical_weights(chunks: Sequence[GPTModel], spec: LayerSpec) -> dict[str, Tensor]:
    """Return this rank's slices under canonical names, on the CPU; stacked experts one by one, adapters merged."""
    return {name: weight.current().cpu() for name, weight in live_weights(chunks, spec).items()}


@dataclass(frozen=True, slots=True)
class LiveWeight:
    """One canonical parameter as this rank holds it, where it is; nothing is copied until it is asked for."""

    name: str
    tensor: Tensor
    """A view of the model's own."""
    adapter: Adapter | None

    def current(self) -> Tensor:
        """Return this rank's slice with the adapter merged, on the device; without one, a view of the model's own."""
        return self.tensor.detach() if self.adapter is None else self.adapter.merged(self.name, self.tensor)


def live_weights(chunks: Sequence[GPTModel], spec: LayerSpec) -> dict[str, LiveWeight]:
    """Return what this rank holds by canonical name; stacked experts one by one."""
    adapters = {
        weight.name: adapter for chunk in chunks for _, adapter in named_adapters(chunk) for weight in adapter.weights
    }
    return {
        name: LiveWeight(name, tensor, adapters.get(name))
        for weight in named_weights(chunks, spec)
        for name, tensor in weight.pieces()
    }
