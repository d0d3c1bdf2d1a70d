"""What the ranks of the model tests run: a small training pass on packed rows, under any layout."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.sources import open_source
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import device, seed_everything

ROW_TOKENS = 32
SEGMENTS = ((10, 15, 7), (32,), (1, 20, 11), (16, 16))
"""Lengths of the samples in each of the four rows of a step."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pass over four packed rows."""

    folder: Path
    layout: ParallelLayout = field(default_factory=lambda: ParallelLayout(world=1))
    pipeline: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's configuration to set against the product's choice."""


@dataclass(frozen=True)
class PassResult:
    """What one rank saw: gradients by canonical name, as divided among ranks; a loss only where it is computed."""

    loss_sum: float
    grads: dict[str, Tensor]
    load: float
    expert_bias: dict[str, Tensor]


def rows(vocabulary: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Return the four packed rows of a step: tokens, labels, positions, loss weights and sample boundaries."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for lengths in SEGMENTS:
        tokens_S = torch.randint(0, vocabulary, (ROW_TOKENS,), generator=generator)
        samples = tokens_S.split(lengths)
        mask_S = torch.cat([torch.tensor([1.0] * (n - 1) + [0.0]) for n in lengths])
        mask_S[:3] = 0  # a prompt
        result.append(
            {
                "tokens": tokens_S[None],
                "labels": torch.cat([sample.roll(-1) for sample in samples])[None],
                "positions": torch.cat([torch.arange(n) for n in lengths])[None],
                "mask": mask_S[None],
                "boundaries": torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32),
            }
        )
    return result


def build(job: Job) -> tuple[list[Any], Any, LayerSpec]:
    """Start the groups of the job and return loaded chunks, the model's shape and its layer spec."""
    source = open_source(job.folder)
    placement = place_layers(source.shape, job.layout, pipeline=job.pipeline)
    process_groups.start(job.layout, timeout_seconds=60, embedding_ranks=placement.embedding_ranks)
    from megatron_ads.models.build import build_chunks
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.models.weights import load_weights

    seed_everything(1)
    settings = ModelSettings(**{"spec": LayerSpec.GROUPED} | job.settings)
    chunks = build_chunks(source.shape, job.layout, placement, settings)
    load_weights(chunks, source, settings.spec)
    for name, value in job.config_changes.items():
        setattr(chunks[0].config, name, value)
    return chunks, source.shape, settings.spec


def logits(job: Job, tokens_BS: Tensor) -> Tensor:
    """Return (B, S, vocabulary) of an evaluation pass on one rank."""
    (model,), _, _ = build(job)
    positions_BS = torch.arange(tokens_BS.size(1)).expand(tokens_BS.shape)
    with torch.no_grad():
        return model.eval()(tokens_BS, positions_BS, None)


def train_pass(job: Job) -> PassResult:
    """Run forward and backward over the rows of a step through Megatron's schedule and gradient reduction."""
    chunks, shape, spec = build(job)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ads.models.build import wrap_precision
    from megatron_ads.models.experts import ExpertLoad
    from megatron_ads.models.weights import named_weights

    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    load = ExpertLoad(chunks)
    reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(config, reduction, chunk) for chunk in wrap_precision(chunks)]
    mine = rows(shape.vocab_size)[parallel_state.get_data_parallel_rank() :: job.layout.dp]
    reports = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(mine) for _ in wrapped] if len(wrapped) > 1 else iter(mine),
        model=wrapped,
        num_microbatches=len(mine),
        seq_length=ROW_TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )
    weights = list(named_weights(chunks, spec))
    return PassResult(
        loss_sum=sum(float(report["loss_sum"]) for report in reports),
        grads={name: grad.float().cpu().clone() for weight in weights for name, grad in _grads(weight)},
        load=load.measure(),
        expert_bias={w.name: w.tensor.cpu().clone() for w in weights if w.name.endswith("expert_bias")},
    )


def _grads(weight: Any) -> Iterator[tuple[str, Tensor]]:
    if not getattr(weight.tensor, "requires_grad", False):
        return
    for index, name in enumerate(weight.canonical):
        yield name, weight.tensor.main_grad[index] if len(weight.canonical) > 1 else weight.tensor.main_grad


def on_device(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row on this rank's device."""
    return {name: value.to(device()) for name, value in row.items()}


def packed(row: dict[str, Any]) -> Any:
    """Return the sample boundaries of a row as Megatron takes them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    longest = int(row["boundaries"].diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=row["boundaries"],
        cu_seqlens_kv=row["boundaries"],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _forward(data: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
    row = on_device(next(data))
    output = model(
        row["tokens"],
        row["positions"],
        None,
        labels=row["labels"],
        loss_mask=row["mask"],
        packed_seq_params=packed(row),
    )
    return output, partial(_loss, row["mask"])


def _loss(mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss_sum = (loss_BS.float() * mask_BS).sum()
    return loss_sum, mask_BS.sum().to(torch.int), {"loss_sum": loss_sum.detach()}


def own_slice(name: str, full: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """Return the slice of ``full`` that tensor-parallel rank ``rank`` holds, given the shape it has there."""
    if full.shape == shape:
        return full
    dim = next(dim for dim in range(full.dim()) if full.size(dim) != shape[dim])
    size = full.size(dim) // shape[dim]
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim)[rank]
