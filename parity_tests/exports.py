"""What ranks run to write the weights of a built model as a checkpoint."""

from pathlib import Path

from conversion.rank_files import ShardsLayout
from conversion.sources import open_source
from megatron_ads.layout import place_layers
from parity_tests.harness.model_jobs import build
from parity_tests.jobs import Job


def load_and_export(job: Job, folder: Path) -> None:
    """Build the model of ``job``, fill it from the checkpoint and write its weights as shards."""
    chunks, shape, spec = build(job)
    from megatron_ads.training.export import export_shards

    layout = ShardsLayout(
        shape=shape, layout=job.layout, placement=place_layers(shape, job.layout, pipeline=job.pipeline)
    )
    export_shards(folder, chunks, spec, open_source(job.folder), layout)
