"""Build one rank's part of a fine-tuning job: the model, the optimizer over it and the learning rate schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel

from conversion.grow_vocabulary import added_token_ids
from conversion.layer_specs import LayerSpec
from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart, ModelConfig, TrainOnly
from megatron_ads.config.training import OptimConfig, TrainConfig
from megatron_ads.models.build import build_chunks, fuse_weight_gradients, wrap_precision
from megatron_ads.models.lora import add_adapters, begin_gradients_at_embedding, initialise_adapters
from megatron_ads.models.parts import Lora, is_trained, trained_parameters
from megatron_ads.models.settings import ModelSettings
from megatron_ads.models.weights import load_weights, named_weights
from megatron_ads.observability.log import get_logger
from megatron_ads.optim.adam import LearningRateSchedule
from megatron_ads.optim.build import build_optimizer, trains_experts_anywhere, wrap_for_training
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.runtime.device import device
from megatron_ads.runtime.process_groups import wait_for_all
from megatron_ads.training.adapter_record import AdapterRecord
from megatron_ads.training.new_tokens import train_rows_alone

logger = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class TrainedModel:
    """One rank's chunks and the optimizer over them."""

    spec: LayerSpec
    models: list[GPTModel]
    """The bare chunks, in the order a microbatch visits them."""
    chunks: list[Any]
    """The same inside Megatron's DistributedDataParallel."""
    optimizer: OptimizerChain
    schedule: LearningRateSchedule
    adapters: AdapterRecord | None
    """The adapters that are trained; None: the weights are."""


def build_model(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    source: WeightSource,
    shards: ShardsLayout,
    *,
    stub_experts: bool = True,
    load_timeout_seconds: float = 3600,
) -> TrainedModel:
    """Build this rank's chunks, fill them from ``source`` and put gradient buffers and the optimizer around them.

    A collective: every rank must call it. ``stub_experts`` is as in ``optim.build.build_optimizer``; whoever is first
    waits ``load_timeout_seconds`` for the slowest reader.

    Raises:
        TopologyError: Naming the ranks that took longer than that.
        ConfigError: If Megatron-Core cannot express the model or the layout, or there are no new tokens to train.
        ConversionError: If the weights do not fit the model.
    """
    settings = ModelSettings.of(model, deterministic=train.deterministic)
    models = build_chunks(shards.shape, shards.layout, shards.placement, settings)
    load_weights(models, source, settings.spec)
    wait_for_all("load the weights", load_timeout_seconds)
    lora = Lora.of(model)
    new_tokens = added_token_ids(source) if model.train_only is TrainOnly.new_tokens else range(0)
    if lora is None:
        freeze(models, model, shards.shape, settings.spec)
    else:
        add_adapters(models, lora, shards.shape, settings.spec)
        initialise_adapters(models, train.seed)
    trained, weights = trained_parameters(model, shards.shape, len(new_tokens))
    logger.info("trains %s parameters; the model has %s", f"{trained:,}", f"{weights:,}")
    chunks = wrap_chunks(models, overlap=device().type == "cuda")
    if new_tokens:
        train_rows_alone(models, new_tokens, settings.spec)
    has_experts = trains_experts_anywhere(chunks)
    optimizer = build_optimizer(
        chunks, optim, settings.precision, has_expert_member=has_experts, stub_experts=stub_experts
    )
    return TrainedModel(
        spec=settings.spec,
        models=models,
        chunks=chunks,
        optimizer=optimizer,
        schedule=LearningRateSchedule(optim, train.max_steps),
        adapters=None if lora is None else AdapterRecord.of(lora, source, models[0].config.params_dtype),
    )


def wrap_chunks(models: Sequence[GPTModel], *, overlap: bool) -> list[DistributedDataParallel]:
    """Put the precision wrapper and gradient buffers around each chunk, and have a step reduce its gradients once.

    ``overlap`` is as in ``optim.build.wrap_for_training``.
    """
    chunks = wrap_for_training(wrap_precision(models), overlap=overlap)
    suspend_reduction = [chunk.no_sync for chunk in chunks]  # until the last microbatch of a step
    for model in models:
        fuse_weight_gradients(model)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.no_sync_func = suspend_reduction if len(chunks) > 1 else suspend_reduction[0]
    return chunks


def freeze(chunks: Sequence[GPTModel], model: ModelConfig, shape: ModelShape, spec: LayerSpec) -> None:
    """Stop training the parameters that a job keeps as loaded. Call it before the gradient buffers are made."""
    for weight in named_weights(chunks, spec):
        if isinstance(weight.tensor, torch.nn.Parameter) and not is_trained(weight.canonical[0], model, shape):
            weight.tensor.requires_grad_(False)
    if FrozenPart.embedding in model.frozen:
        for chunk in chunks:
            begin_gradients_at_embedding(chunk)
