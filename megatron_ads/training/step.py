"""One optimizer step: all microbatches forward and backward, then the update.

Shape suffixes: T = tokens of one microbatch, all its rows laid end to end (Megatron's "thd" form).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.optim.chain import OptimizerChain, UpdateReport
from megatron_ads.runtime.device import device

LossReport = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, over the whole job; the same on every rank."""

    loss: float
    """Nats per unit of normalisation: per target token, or per sample."""
    target_tokens: int
    tokens: int
    """Tokens that are not padding."""
    samples: int
    sample_losses: list[float]
    """Nats over the target tokens of each sample of the step, in the step's order, whatever the sample weighs."""
    stop_requested: bool
    """Some rank was asked to save and stop."""
    update: UpdateReport | None
    """None after an evaluation."""


def run_step(
    batches: Sequence[PackedBatch],
    chunks: Sequence[Any],
    optimizer: OptimizerChain,
    *,
    learning_rate: float,
    stop_requested: bool = False,
    before_microbatch: Callable[[], None] = lambda: None,
) -> StepReport:
    """Accumulate the gradients of this rank's ``batches``, then update the weights once.

    The loss of the global batch is divided by its global count of target tokens (or samples), so the result does not
    depend on how the batch is cut into microbatches or spread over replicas. ``before_microbatch`` is called before
    each forward pass.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = _run_microbatches(batches, chunks, forward_only=False, before_each=before_microbatch)
    update = optimizer.step(learning_rate)
    return _global_report(reports, batches, stop_requested=stop_requested, update=update)


@torch.no_grad()
def run_evaluation(batches: Sequence[PackedBatch], chunks: Sequence[Any]) -> StepReport:
    """Compute the loss of ``batches`` over the whole job; nothing is updated."""
    for chunk in chunks:
        chunk.eval()
    reports = _run_microbatches(batches, chunks, forward_only=True, before_each=lambda: None)
    for chunk in chunks:
        chunk.train()
    return _global_report(reports, batches, stop_requested=False, update=None)


def run_pass(portions: Iterable[Sequence[PackedBatch]], chunks: Sequence[Any]) -> list[float]:
    """Return the summed loss of every sample of several portions of batches, in order; nothing is updated."""
    return [loss for batches in portions for loss in run_evaluation(batches, chunks).sample_losses]


def _run_microbatches(
    batches: Sequence[PackedBatch], chunks: Sequence[Any], *, forward_only: bool, before_each: Callable[[], None]
) -> list[LossReport]:
    """Run the pipeline schedule; only the last stage returns reports."""
    iterators = [_announced(batches, before_each) for _ in chunks]  # each virtual chunk reads every microbatch once
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        micro_batch_size=1,
        seq_length=batches[0].tokens_BS.numel(),
        forward_only=forward_only,
    )


def _announced(batches: Sequence[PackedBatch], before_each: Callable[[], None]) -> Iterator[PackedBatch]:
    for batch in batches:
        before_each()
        yield batch


def forward_step(batches: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Run one microbatch through one chunk; return its output and how the last stage reduces it to a loss."""
    batch = next(batches)
    mask_T = batch.mask_BS.view(1, -1).to(device())
    output = chunk(
        input_ids=batch.tokens_BS.view(1, -1).to(device()),
        position_ids=batch.positions_BS.view(1, -1).to(device()),
        attention_mask=None,
        labels=batch.labels_BS.view(1, -1).to(device()),
        loss_mask=mask_T,
        packed_seq_params=packed_sequences(batch),
    )
    return output, partial(
        sum_over_targets,
        mask_T=mask_T,
        sample_T=batch.sample_BS.view(-1).to(device()),
        step_samples=batch.step_samples,
        count=batch.normalizer,
    )


def packed_sequences(batch: PackedBatch) -> PackedSeqParams:
    """Say where each sample begins and ends, so that attention and positions stay inside it."""
    boundaries = batch.cu_seqlens.to(device())
    longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def sum_over_targets(
    loss_T: Tensor, *, mask_T: Tensor, sample_T: Tensor, step_samples: int, count: int
) -> tuple[Tensor, Tensor, LossReport]:
    """Return (weighted sum of losses, count, report), as Megatron-Core expects with ``calculate_per_token_loss``.

    A sum and not a mean: Megatron divides the gradient by the count of the global batch, so a target token weighs the
    same whichever microbatch it is in.
    """
    loss_sum = (loss_T.float() * mask_T).sum()
    counted_T = torch.where(mask_T != 0, loss_T.detach().double(), 0.0).view(-1)
    sample_losses = torch.zeros(step_samples, dtype=torch.float64, device=loss_T.device)
    sample_losses.index_add_(0, sample_T, counted_T)
    report = {"loss_sum": loss_sum.detach(), "sample_losses": sample_losses}
    return loss_sum, torch.tensor(count, dtype=torch.int, device=loss_T.device), report


def _global_report(
    reports: Sequence[LossReport],
    batches: Sequence[PackedBatch],
    *,
    stop_requested: bool,
    update: UpdateReport | None,
) -> StepReport:
    """Sum the counts over the replicas and spread them to all ranks, in one all-reduce."""
    counts = torch.zeros(6 + batches[0].step_samples, dtype=torch.float64, device=device())
    if (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    ):
        counts[0] = sum(report["loss_sum"].double() for report in reports)
        counts[1] = sum(batch.normalizer for batch in batches)
        counts[2] = sum(batch.target_count for batch in batches)
        counts[3] = sum(batch.token_count for batch in batches)
        counts[4] = sum(batch.sample_count for batch in batches)
        counts[6:] = sum(report["sample_losses"] for report in reports)
    counts[5] = stop_requested
    dist.all_reduce(counts)
    loss_sum, normalizer, targets, tokens, samples, stops, *sample_losses = counts.tolist()
    return StepReport(
        loss=loss_sum / max(normalizer, 1.0),
        target_tokens=int(targets),
        tokens=int(tokens),
        samples=int(samples),
        sample_losses=sample_losses,
        stop_requested=stops > 0,
        update=update,
    )
