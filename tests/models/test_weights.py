"""Loading fills every weight once, or says which one it could not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.sources import open_source
from megatron_ads.layout import ParallelLayout
from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job
from parity_tests.harness.ranks import RanksFailed, run_ranks
from tests.models.checkpoints import V3, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("load") / "hf", V3)


class _Changed:
    """A source that lacks a weight, or has one of another shape."""

    def __init__(self, source: Any, *, missing: str = "", narrow: str = "") -> None:
        self._source, self._missing, self._narrow = source, missing, narrow

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._source.names() if name != self._missing)

    def read(self, name: str, *, rank: int = 0, size: int = 1) -> torch.Tensor:
        values = self._source.read(name, rank=rank, size=size)
        return values[:-1] if name == self._narrow else values


def _fill(job: Job, changes: dict[str, str]) -> tuple[int, int, bool]:
    """Load into weights of NaN; return how many values were filled, how many there are, and whether all are numbers."""
    chunks, _, spec = model_jobs.build(job)
    from megatron_ads.models.weights import load_weights, named_weights

    tensors = [weight.tensor for weight in named_weights(chunks, spec)]
    for tensor in tensors:
        tensor.detach().fill_(float("nan"))
    filled = load_weights(chunks, _Changed(open_source(job.folder), **changes), spec)
    return filled, sum(tensor.numel() for tensor in tensors), all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(world=1), ParallelLayout(world=4, pp=2, ep=2), ParallelLayout(world=2, tp=2, etp=2)],
    ids=["alone", "pp2 ep2", "tp2"],
)
def test_every_value_is_filled(folder: Path, layout: ParallelLayout) -> None:
    for filled, size, all_numbers in run_ranks(layout.world, _fill, Job(folder=folder, layout=layout), {}):
        assert filled == size and all_numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing": "decoder.layers.2.mlp.experts.linear_fc2.weight7"}, "has no weight decoder.layers.2.mlp.experts"),
        ({"missing": "mtp.layers.0.eh_proj.weight"}, "has no weight mtp.layers.0.eh_proj.weight"),
        ({"narrow": "output_layer.weight"}, r"output_layer.weight is \(127, 64\) in the checkpoint and \(128, 64\)"),
    ],
    ids=["missing expert", "missing MTP", "another shape"],
)
def test_a_weight_that_is_missing_or_of_another_shape_is_named(
    folder: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(RanksFailed, match=message):
        run_ranks(1, _fill, Job(folder=folder), changes)
