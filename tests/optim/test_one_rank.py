"""Without its one-rank collectives a step gives the same weights, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ads.config.model import Precision
from megatron_ads.config.training import OptimConfig
from megatron_ads.layout import ParallelLayout
from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job
from parity_tests.harness.ranks import run_ranks
from tests.collective_trace import Trace
from tests.models.checkpoints import V3, write_checkpoint


def _one_step(job: Job, skipping: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return this rank's weights after one update, and the replica collectives that it took."""
    chunks, shape, _ = model_jobs.build(job)
    from megatron.core.distributed import finalize_model_grads

    from megatron_ads.optim import build
    from tests.collective_trace import trace_collectives

    original = build.skip_collectives_of_one
    if not skipping:
        build.skip_collectives_of_one = lambda chunks: None
    try:
        wrapped = build.wrap_for_training(chunks, overlap=False)
    finally:
        build.skip_collectives_of_one = original
    optimizer = build.build_optimizer(wrapped, OptimConfig(), Precision.fp32, has_expert_member=True)
    row = model_jobs.rows(shape.vocab_size)[torch.distributed.get_rank()]
    loss = wrapped[0](
        row["tokens"], row["positions"], None, labels=row["labels"], packed_seq_params=model_jobs.packed(row)
    )
    loss.sum().backward()
    with trace_collectives() as trace:
        finalize_model_grads(wrapped, num_tokens=torch.tensor(model_jobs.ROW_TOKENS))
        optimizer.step(1e-3)
    return {name: value.detach().clone() for name, value in chunks[0].named_parameters()}, _replica_operations(trace)


def _replica_operations(trace: Trace) -> list[str]:
    """Reduce-scatters of gradients and all-gathers of parameters; the step has no others."""
    calls = [call.operation for calls in trace.collectives.values() for call in calls]
    return [operation for operation in calls if "reduce_scatter" in operation or "gather" in operation]


@pytest.mark.parametrize("world", [1, 2])
def test_weights_after_a_step_are_the_same_bits(tmp_path: Path, world: int) -> None:
    job = Job(folder=write_checkpoint(tmp_path / "hf", V3), layout=ParallelLayout(world=world))
    with_skips, plain = (run_ranks(world, _one_step, job, skipping) for skipping in (True, False))
    for (ours, _), (theirs, _) in zip(with_skips, plain, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 50
        for name, weight in theirs.items():
            assert torch.equal(ours[name], weight), name
    per_rank = 2 * 2  # both of dense and of expert buffers
    assert [len(operations) for _, operations in plain] == [per_rank] * world
    assert [len(operations) for _, operations in with_skips] == [0 if world == 1 else per_rank] * world
