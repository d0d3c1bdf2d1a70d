"""What the plan says tensor-parallel ranks send is what they do send."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ads.architecture import read_model_shape
from megatron_ads.config.model import ModelConfig, Precision, Recompute
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.planning.costs import tensor_bytes
from megatron_ads.planning.job import PlannedJob
from parity_tests.harness.dense_checkpoints import QWEN2
from parity_tests.harness.model_jobs import ROW_TOKENS, SEGMENTS, Job, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint

TP2 = ParallelLayout(world=2, tp=2, ep=2)
TP2_DENSE = ParallelLayout(world=2, tp=2)


def _gathered_and_scattered(job: Job) -> int:
    """Run a training pass; return the bytes of all whole tensors that the tensor-parallel group gathers or scatters."""
    from megatron_ads.runtime.health.activity import Activity, observed
    from megatron_ads.runtime.health.calls import Group

    found = 0

    class Recorder(Activity):
        def begin(self, group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
            nonlocal found
            super().begin(group, operation, arguments)
            if Group.of(group).name == "tensor_model_parallel" and operation.startswith(("all_gather", "reduce_scat")):
                tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
                found += max(tensor.nbytes for tensor in tensors)

    with observed(Recorder()):
        train_pass(job)
    return found


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize(("config", "layout"), [(V3, TP2), (QWEN2, TP2_DENSE)], ids=["v3", "qwen2"])
def test_tensor_parallel_ranks_send_what_is_planned(
    config: dict[str, Any], layout: ParallelLayout, recompute: Recompute, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", config)
    settings = {"recompute": recompute, "mtp_loss_weight": 0.0}
    seen = run_ranks(2, _gathered_and_scattered, Job(folder=folder, layout=layout, settings=settings))
    shape = read_model_shape(folder)
    planned = PlannedJob(
        shape=shape,
        layout=layout,
        placement=place_layers(shape, layout),
        model=ModelConfig(precision=Precision.fp32, **settings),
        seq_length=ROW_TOKENS,
        micro_batch_size=1,
        microbatches=len(SEGMENTS),
    )
    (chunk,) = planned.placement.chunks
    # A ring of two ranks sends half of what is gathered or scattered.
    assert [whole // 2 for whole in seen] == [len(SEGMENTS) * tensor_bytes(planned, chunk)] * 2
