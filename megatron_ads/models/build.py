"""The model chunks of one rank, as Megatron-Core modules ready to be loaded with weights, and their BF16 wrapping."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ads.architecture import GroupedQueryShape, ModelShape
from megatron_ads.layout import Chunk, ParallelLayout, PipelinePlacement
from megatron_ads.models.attention import set_latent_norm_epsilon
from megatron_ads.models.grouped_query import rotary_frequencies
from megatron_ads.models.settings import ModelSettings
from megatron_ads.models.specs import DecoderModel, decoder_spec, mtp_spec
from megatron_ads.models.transformer_config import megatron_config

_PARTITIONED_DIM = {layers.ColumnParallelLinear: 0, layers.RowParallelLinear: 1, layers.VocabParallelEmbedding: 0}


def build_chunks(
    shape: ModelShape, layout: ParallelLayout, placement: PipelinePlacement, settings: ModelSettings
) -> list[GPTModel]:
    """Build what this rank runs: one model per virtual chunk, in order.

    Megatron's process groups must exist and agree with ``layout``. The weights are allocated, on the GPU where
    there is one, and hold nothing yet: ``models.weights`` fills them.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    config = megatron_config(shape, layout, placement, settings.on_stage(stage))
    return [_build(shape, config, chunk, settings) for chunk in placement.stage_chunks(stage)]


def _build(shape: ModelShape, config: TransformerConfig, chunk: Chunk, settings: ModelSettings) -> GPTModel:
    model = DecoderModel(
        config,
        decoder_spec(shape, chunk, settings.spec),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=chunk.has_embedding,
        post_process=chunk.has_loss,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        mtp_block_spec=mtp_spec(shape, chunk, settings.spec),
        vp_stage=chunk.virtual if config.virtual_pipeline_model_parallel_size else None,
    )
    set_latent_norm_epsilon(model)
    if isinstance(shape.attention, GroupedQueryShape):
        model.rotary_pos_emb.inv_freq = rotary_frequencies(shape)
    _mark_weights(model)
    if chunk.mtp_layers and not settings.mtp_loss_weight:
        model.mtp.requires_grad_(False)
    return model


def _mark_weights(model: GPTModel) -> None:
    """Say how each weight is divided and reduced; Megatron before 0.18 does so only when it initialises them, or never.

    The gradient norm counts a weight without the mark of a part on the first tensor-parallel rank alone.

    ``allreduce = False`` is Megatron's mark for parameters reduced over the expert-data-parallel group. Megatron sets
    it with ep > 1 only; set always, optimizer and checkpoint have the same members under every layout, and etp
    may differ from tp. Each rank of an expert group owns other weights than the rest, so none is a duplicate.
    """
    for module in model.modules():
        dim = _PARTITIONED_DIM.get(type(module))
        if dim is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            layers.set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
    for parameter in routed_experts(model):
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's linears add weight gradients to the FP32 buffers themselves, as they compute them.

    Else each microbatch writes them in BF16, to be read and added. Call it on a model inside Megatron's
    DistributedDataParallel, which makes the buffers; without them such a linear fails.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            weights = [weight for name, weight in module.named_parameters(recurse=False) if name.startswith("weight")]
            fused = bool(weights) and all(hasattr(weight, "main_grad") for weight in weights)
            module.fuse_wgrad_accumulation = fused  # type: ignore[assignment]


def routed_experts(model: torch.nn.Module) -> Sequence[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".mlp.experts." in name]


_ROUTING_BUFFERS = ("expert_bias", "local_tokens_per_expert")


def wrap_precision(chunks: Sequence[GPTModel]) -> list[torch.nn.Module]:
    """Wrap each chunk to compute in BF16 and return FP32 losses; FP32 chunks are returned as they are.

    Megatron's wrapper also rounds the buffers: a router bias of 0.3711 becomes 0.3711 +- 0.001, and a count of
    tokens per expert sticks at 256. Both are kept FP32 here, before and after loading weights.
    """
    wrapped = []
    for chunk in chunks:
        kept = [(module, name, getattr(module, name, None)) for module in chunk.modules() for name in _ROUTING_BUFFERS]
        wrapped.append(Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk)
        for module, name, buffer in kept:
            if buffer is not None:
                setattr(module, name, buffer)
    return wrapped
