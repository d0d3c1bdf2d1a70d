"""Cut parameters as the tensor-parallel ranks hold them, join them again, and compare with the stored bits."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from conversion.hf_folder import HfFolder, stored_values
from conversion.names import Parameter, Split, layer_parameters, outside_parameters
from conversion.sources import WeightSource
from megatron_ads.layout import ParallelLayout


def changed_in_layer(source: WeightSource, folder: HfFolder, layer: int, layout: ParallelLayout) -> tuple[str, ...]:
    """Return the parameters of one layer of ``source`` that are not those of the Hugging Face ``folder``."""
    return tuple(_changed(layer_parameters(source.shape, layer), source, folder, layout))


def changed_outside(source: WeightSource, folder: HfFolder, layout: ParallelLayout) -> tuple[str, ...]:
    """As :func:`changed_in_layer`, of the embedding, the final norm and the output layer."""
    return tuple(_changed(outside_parameters(source.shape), source, folder, layout))


def _changed(
    parameters: Iterable[Parameter], source: WeightSource, folder: HfFolder, layout: ParallelLayout
) -> Iterator[str]:
    for parameter in parameters:
        size = layout.tp if parameter.expert is None else layout.etp
        slices = [source.read(parameter.name, rank=rank, size=size) for rank in range(size)]
        stored = torch.cat([stored_values(folder, part.name) for part in parameter.parts])
        ours = _joined(slices, parameter.split)
        if ours.dtype != stored.dtype:  # a router bias that is stored narrower than FP32 is compared by value
            same = torch.equal(ours.float(), stored.float())
        else:
            same = torch.equal(ours.contiguous().view(torch.uint8), stored.contiguous().view(torch.uint8))
        if not same:
            yield parameter.name


def _joined(slices: list[Tensor], split: Split) -> Tensor:
    if split is Split.REPLICATED:
        return slices[0]
    if split is Split.GATE_UP:
        halves = zip(*(one.chunk(2) for one in slices), strict=True)
        return torch.cat([part for half in halves for part in half])
    return torch.cat(slices, dim=1 if split is Split.COLUMNS else 0)
