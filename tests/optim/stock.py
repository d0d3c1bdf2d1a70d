"""A small model trained and saved by Megatron-Core alone, to reproduce what its optimizer does wrong.

Layers 0 and 1 are dense, 2 and 3 have experts: under pp 2, the first stage owns none.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_ads.layout import ParallelLayout
from megatron_ads.optim.adam import GroupStepAdamW

SEQUENCE, ROWS, MICROBATCHES, VOCABULARY = 16, 2, 2, 64
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


class FusedAdam(GroupStepAdamW):
    """As Transformer Engine's before 2.18 and apex's: one step count a group, and none for an empty group."""

    def __init__(self, params: Any, *, lr: float, adam_w_mode: bool, capturable: bool = False, **settings: Any) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, **settings)
        for group in self.param_groups:
            group["lr"] = lr

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the groups that are not empty."""
        for group in self.param_groups:
            if group["params"]:
                done = group.get("step", 0)
                self._update(group, done)
                group["step"] = done + 1


@contextlib.contextmanager
def fused_adam_installed(installed: bool = True) -> Iterator[None]:
    """Let Megatron-Core find ``FusedAdam`` as it would with apex; else it has torch's Adam."""
    with contextlib.ExitStack() as stack:
        if installed:
            optimizer, sharded = "megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"
            stack.enter_context(patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False))
            stack.enter_context(
                patch.multiple(sharded, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)
            )
        yield


@dataclass(frozen=True, kw_only=True)
class StockJob:
    """What a test varies."""

    layout: ParallelLayout
    fused_adam: bool = True
    bucket_size: int | None = None
    """Gradients are reduced during the backward pass in buckets of so many elements; None: one bucket."""
    experts_marked: bool = True
    """Whether experts have Megatron's mark of a divided weight; Transformer Engine's have not where etp is 1."""
    folder: Path | None = None
    """Where to save, or what to load."""
    metadata: dict[str, Any] = field(default_factory=lambda: dict(FORMAT))


class StockTrainer:
    """One rank of a job whose model, optimizer and checkpoint code are Megatron-Core's."""

    def __init__(self, job: StockJob) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_ads.runtime import process_groups
        from megatron_ads.runtime.device import seed_everything

        process_groups.start(job.layout, timeout_seconds=100)
        seed_everything(1)
        self.job = job
        self.model = _model(job.layout)
        for name, parameter in self.model.named_parameters():
            if ".experts." in name:
                parameter.tensor_model_parallel = job.experts_marked
        reduction = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=job.bucket_size is not None,
            bucket_size=job.bucket_size,
            grad_reduce_in_fp32=True,
        )
        self.chunk = DistributedDataParallel(self.model.config, reduction, self.model)
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.no_sync_func = self.chunk.no_sync if job.bucket_size is not None else None
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-3, weight_decay=0.01, clip_grad=0.0, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(settings, [self.chunk])

    @property
    def members(self) -> list[Any]:
        """The dense optimizer and, with ep > 1, the experts'."""
        return self.optimizer.chained_optimizers

    def backward(self, step: int) -> float:
        """Accumulate the gradients of a step; return the loss on the last stage, else 0."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        seed = 1000 * step + parallel_state.get_data_parallel_rank()
        reports = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=_batches(seed),
            model=[self.chunk],
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        return sum(float(report["loss"]) for report in reports)

    def step(self, number: int) -> float:
        """Take one step; return the loss on the last stage, else 0."""
        loss = self.backward(number)
        self.optimizer.step()
        return loss

    def describe_state(self, *, loading: bool) -> dict[str, Any]:
        """Return the sharded state dict of model and optimizer; a collective."""
        model = self.model.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=self.job.metadata)
        return {"model": model, "optimizer": optimizer}

    def save(self) -> None:
        """Write ``job.folder``; a collective."""
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self.describe_state(loading=False), str(self.job.folder))

    def load(self) -> None:
        """Load ``job.folder``; a collective."""
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self.describe_state(loading=True), str(self.job.folder))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _model(layout: ParallelLayout) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ads.models.specs import RMSNorm

    config = TransformerConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48,
        num_moe_experts=4, moe_ffn_hidden_size=16, moe_router_topk=2, moe_layer_freq=[0, 0, 1, 1],
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, masked_softmax_fusion=False,
        bias_activation_fusion=False, moe_permute_fusion=False, gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32, tensor_model_parallel_size=layout.tp, sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )  # fmt: skip
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec.layer_norm = RMSNorm  # Megatron's torch norm refuses sequence parallelism; the norm is not at issue
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)


def _forward(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE).expand(ROWS, -1)
    hidden = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]
    output = model(tokens[:, :-1], positions, hidden, labels=tokens[:, 1:].contiguous())
    return output, partial(_mean, output.size(0))


def _mean(_: int, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return loss.mean(), {"loss": loss.mean().detach()}
