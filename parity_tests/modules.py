"""The parameters that Megatron-Core builds on every rank of a layout, without running the other ranks."""

from pathlib import Path

from conversion.layer_specs import LayerSpec
from megatron_ads.architecture import read_model_shape
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.seeds import seed_everything


def names_by_rank(folder: Path, layout: ParallelLayout, pipeline: str | None, spec: LayerSpec) -> list[list[str]]:
    """Take the place of each rank in turn, build its chunks and return their canonical names, rank by rank."""
    return [_names(folder, layout, pipeline, spec, rank) for rank in range(layout.world)]


def _names(folder: Path, layout: ParallelLayout, pipeline: str | None, spec: LayerSpec, rank: int) -> list[str]:
    process_groups.start_rehearsal(layout, rank)
    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.models.weights import named_weights

    try:
        seed_everything(1)
        shape = read_model_shape(folder)
        chunks = build_chunks(shape, layout, place_layers(shape, layout, pipeline=pipeline), ModelSettings(spec=spec))
        return [name for weight in named_weights(chunks, spec) for name in weight.canonical]
    finally:
        process_groups.stop()
