"""One optimizer step: all microbatches forward and backward, then the update.

Shape suffixes: T = tokens of one microbatch, all its rows laid end to end (Megatron's "thd" form).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.data.packed_batch import PLACE, PackedBatch, places
from megatron_ads.errors import ConfigError
from megatron_ads.losses.entropy import token_entropy
from megatron_ads.losses.loss import CROSS_ENTROPY, SAMPLE_LOSSES, STEP_TOTALS, Loss, LossValues, TokenValues
from megatron_ads.models.specs import DecoderModel
from megatron_ads.optim.chain import OptimizerChain, UpdateReport
from megatron_ads.rows import TokenizedRow
from megatron_ads.runtime.device import device, on_device

LossReport = dict[str, Tensor]

Routing = Callable[[Sequence[PackedBatch]], AbstractContextManager[Any]]
"""Given the microbatches of a pass, the context it runs in; ``training.router_replay`` has some."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, over the whole job; the same on every rank."""

    loss: float
    """Nats per unit of normalisation: per target token, or per sample."""
    loss_tokens: int
    """Tokens that counted in the loss."""
    tokens: int
    """Tokens that are not padding."""
    samples: int
    stop_requested: bool
    """Some rank was asked to save and stop."""
    update: UpdateReport | None
    """None after an evaluation."""
    totals: dict[str, float] = field(default_factory=dict)
    """What the loss reports of the step, by name."""
    per_sample: dict[str, list[float]] = field(default_factory=dict)
    """What it reports of each sample, in the step's order, by name."""

    @property
    def sample_losses(self) -> list[float]:
        """Nats over the target tokens of each sample, whatever the sample weighs; of cross-entropy only."""
        return self.per_sample[SAMPLE_LOSSES]


def run_step(
    batches: Sequence[PackedBatch],
    chunks: Sequence[Any],
    optimizer: OptimizerChain,
    *,
    learning_rate: float,
    loss: Loss = CROSS_ENTROPY,
    stop_requested: bool = False,
    before_microbatch: Callable[[], None] = lambda: None,
    routing: Routing = nullcontext,
) -> StepReport:
    """Accumulate the gradients of this rank's ``batches``, then update the weights once.

    The loss of the global batch is divided by its global count of target tokens (or samples), so the result does not
    depend on how the batch is cut into microbatches or spread over replicas. ``before_microbatch`` is called before
    each forward pass.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    with routing(batches):
        reports = _run_microbatches(batches, chunks, loss, forward_only=False, before_each=before_microbatch)
    update = optimizer.step(learning_rate)
    return _global_report(reports, batches, loss, stop_requested=stop_requested, update=update)


def run_gradients(
    batches: Sequence[PackedBatch],
    chunks: Sequence[Any],
    optimizer: OptimizerChain,
    *,
    loss: Loss,
    before_microbatch: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Return this rank's part of the gradients of ``batches``, as ``OptimizerChain.gradients`` does.

    Nothing is updated, router biases neither. Arguments are as in ``run_step``.
    """
    with _router_biases_kept(chunks):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        _run_microbatches(batches, chunks, loss, forward_only=False, before_each=before_microbatch)
    return optimizer.gradients()


@contextmanager
def _router_biases_kept(chunks: Sequence[Any]) -> Iterator[None]:
    """Have ``finalize_model_grads``, which updates them as well, move them by 0."""
    rates = [chunk.config.moe_router_bias_update_rate for chunk in chunks]
    for chunk in chunks:
        chunk.config.moe_router_bias_update_rate = 0.0
    try:
        yield
    finally:
        for chunk, rate in zip(chunks, rates, strict=True):
            chunk.config.moe_router_bias_update_rate = rate


def run_evaluation(batches: Sequence[PackedBatch], chunks: Sequence[Any], *, loss: Loss = CROSS_ENTROPY) -> StepReport:
    """Compute the loss of ``batches`` over the whole job; nothing is updated."""
    with _evaluating(chunks):
        reports = _run_microbatches(batches, chunks, loss, forward_only=True)
    return _global_report(reports, batches, loss, stop_requested=False, update=None)


def run_pass(portions: Iterable[Sequence[PackedBatch]], chunks: Sequence[Any]) -> list[float]:
    """Return the summed loss of every sample of several portions of batches, in order; nothing is updated."""
    return [loss for batches in portions for loss in run_evaluation(batches, chunks).sample_losses]


def run_log_probabilities(
    rows: Sequence[TokenizedRow],
    share: ReplicaShare,
    chunks: Sequence[Any],
    *,
    seq_length: int,
    packing: bool = True,
    before_microbatch: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Return log p of every label of every row, prompts included, under the current weights; nothing is updated.

    One FP32 tensor (N - 1,) a row of N tokens, in order, on the CPU, the same on every rank. What the vocabulary-
    parallel cross-entropy returns is -log p already: no rank ever holds the logits of its microbatch twice. Pass the
    rows in portions that fit in memory: each rank holds one number for every label. ``before_microbatch`` is as in
    ``run_step``.

    Raises:
        DataError: If a row is longer than ``seq_length``.
    """
    return _values_of_labels(
        rows, share, chunks, seq_length=seq_length, packing=packing, before_microbatch=before_microbatch
    )[0]


def run_log_probabilities_and_entropies(
    rows: Sequence[TokenizedRow],
    share: ReplicaShare,
    chunks: Sequence[Any],
    *,
    seq_length: int,
    packing: bool = True,
    before_microbatch: Callable[[], None] = lambda: None,
    routing: Routing = nullcontext,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what ``run_log_probabilities`` does, and the entropy in nats of what was predicted for each label."""
    with _observed_entropies(chunks) as of_batches:
        log_p, entropies = _values_of_labels(
            rows,
            share,
            chunks,
            seq_length=seq_length,
            packing=packing,
            before_microbatch=before_microbatch,
            routing=routing,
            entropies=of_batches,
        )
    return log_p, entropies


def _values_of_labels(
    rows: Sequence[TokenizedRow],
    share: ReplicaShare,
    chunks: Sequence[Any],
    *,
    seq_length: int,
    packing: bool,
    before_microbatch: Callable[[], None],
    routing: Routing = nullcontext,
    entropies: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """Return log p of every label of every row; with ``entropies``, which the pass fills, those behind it."""
    batches = batches_of_all(rows, share, seq_length=seq_length, packing=packing, extra={PLACE: places(rows)})
    with _evaluating(chunks), routing(batches):
        reports = _run_microbatches(
            batches, chunks, Loss(compute=_log_probabilities), forward_only=True, before_each=before_microbatch
        )
    lengths = [row.predictions for row in rows]
    values = torch.zeros(1 if entropies is None else 2, 1 + sum(lengths), device=device())
    if _reports_loss():
        for number, report in enumerate(reports):
            values[0, report[PLACE]] = report["log_p"]
            if entropies is not None:
                values[1, report[PLACE]] = entropies[number]
    dist.all_reduce(values)
    return [list(each[1:].split(lengths)) for each in values.cpu()]


@contextmanager
def _observed_entropies(chunks: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Yield a list that gets the entropies (T,) of each microbatch, on the ranks of the last stage."""
    found: list[Tensor] = []
    group = parallel_state.get_tensor_model_parallel_group()
    models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, DecoderModel)]
    for model in models:
        model.on_logits = lambda logits_SBV: found.append(token_entropy(logits_SBV.flatten(0, 1), group))
    yield found
    for model in models:
        model.on_logits = None


def _log_probabilities(values: TokenValues) -> LossValues:
    """Return log p of each label, and where it belongs."""
    log_p_T = -values.negative_log_p_T.detach().float().view(-1)
    place_T = values.extra[PLACE].view(-1)
    return LossValues(sum=log_p_T.new_zeros(()), count=1, report={"log_p": log_p_T, PLACE: place_T})


@contextmanager
def _evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in chunks:
        chunk.train()


def _run_microbatches(
    batches: Sequence[PackedBatch],
    chunks: Sequence[Any],
    loss: Loss,
    *,
    forward_only: bool,
    before_each: Callable[[], None] = lambda: None,
) -> list[LossReport]:
    """Run the pipeline schedule; only the last stage returns reports."""
    iterators = [_announced(batches, before_each) for _ in chunks]  # each virtual chunk reads every microbatch once
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, loss=loss),
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


def forward_step(
    batches: Iterator[PackedBatch], chunk: Any, *, loss: Loss = CROSS_ENTROPY
) -> tuple[Tensor, Callable[..., Any]]:
    """Run one microbatch through one chunk; return its output and how the last stage reduces it to a loss."""
    batch = next(batches)
    mask_T = on_device(batch.mask_BS.view(1, -1))
    boundaries = on_device(batch.cu_seqlens)  # of the samples: attention and positions stay inside each
    longest = int(batch.cu_seqlens.diff().max())
    output = chunk(
        input_ids=on_device(batch.tokens_BS.view(1, -1)),
        position_ids=on_device(batch.positions_BS.view(1, -1)),
        attention_mask=None,
        labels=on_device(batch.labels_BS.view(1, -1)),
        loss_mask=mask_T,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    )
    return output, partial(_reduce, loss=loss, batch=batch, mask_T=mask_T)


def _reduce(
    negative_log_p_T: Tensor, *, loss: Loss, batch: PackedBatch, mask_T: Tensor
) -> tuple[Tensor, Tensor, LossReport]:
    """Return (sum, count, report) of a microbatch, as Megatron-Core expects with ``calculate_per_token_loss``."""
    found = loss.compute(
        TokenValues(
            negative_log_p_T=negative_log_p_T,
            mask_T=mask_T,
            sample_T=on_device(batch.sample_BS.view(-1)),
            step_samples=batch.step_samples,
            normalizer=batch.normalizer,
            extra={name: on_device(values_BS.view(1, -1)) for name, values_BS in batch.extra.items()},
        )
    )
    count = torch.tensor(found.count, dtype=torch.int, device=device())
    return found.sum, count, {"loss_sum": found.sum.detach(), **found.report}


def _reports_loss() -> bool:
    """Whether this rank is the one of its replica whose reports count."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def _global_report(
    reports: Sequence[LossReport],
    batches: Sequence[PackedBatch],
    loss: Loss,
    *,
    stop_requested: bool,
    update: UpdateReport | None,
) -> StepReport:
    """Sum the named values over the replicas and spread them to all ranks, in one all-reduce.

    Raises:
        ConfigError: On every rank, if the loss does not report what it announces.
    """
    here: dict[str, Any] = {"stops": stop_requested}
    if _reports_loss():
        here |= {
            "normalizer": sum(batch.normalizer for batch in batches),
            "loss_tokens": sum(batch.target_count for batch in batches),
            "tokens": sum(batch.token_count for batch in batches),
            "samples": sum(batch.sample_count for batch in batches),
        }
    announced = dict.fromkeys(("loss_sum", *loss.totals), 1) | dict.fromkeys(loss.per_sample, batches[0].step_samples)
    absent = []
    for name, size in announced.items() if _reports_loss() else ():
        parts = [report[name].double() for report in reports if name in report and report[name].numel() == size]
        absent += [name] * (len(parts) < len(reports))
        here[name] = sum(parts)
    here["absent"] = len(absent)
    summed = _sum_over_ranks(here, dict.fromkeys((*STEP_TOTALS, "absent"), 1) | announced)
    if summed["absent"][0]:  # only the last stage knows which
        named = _sum_over_ranks(dict.fromkeys(absent, 1), dict.fromkeys(announced, 1))
        raise ConfigError(
            f"the loss announces {', '.join(name for name in announced if named[name][0])}, but its microbatches "
            "report none of that size (1 in Loss.totals, one for each sample of the step in Loss.per_sample). Report "
            "it from Loss.compute, or announce it no more."
        )
    return StepReport(
        loss=summed["loss_sum"][0] / max(summed["normalizer"][0], 1.0),
        loss_tokens=int(summed["loss_tokens"][0]),
        tokens=int(summed["tokens"][0]),
        samples=int(summed["samples"][0]),
        stop_requested=summed["stops"][0] > 0,
        update=update,
        totals={name: summed[name][0] for name in loss.totals},
        per_sample={name: summed[name] for name in loss.per_sample},
    )


def _sum_over_ranks(values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, list[float]]:
    """Return the sum of each named value, of so many numbers, over all ranks; a rank without it adds nothing."""
    vector = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device())
    for name, part in zip(sizes, vector.split(list(sizes.values())), strict=True):
        if name in values:
            part.copy_(torch.as_tensor(values[name]))
    dist.all_reduce(vector)
    parts = vector.cpu().split(list(sizes.values()))
    return {name: part.tolist() for name, part in zip(sizes, parts, strict=True)}
