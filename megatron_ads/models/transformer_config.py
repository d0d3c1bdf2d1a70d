"""The Megatron-Core configuration of a model under a parallel layout."""

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from conversion.layer_specs import LayerSpec
from megatron_ads.architecture import GroupedQueryShape, LatentAttentionShape, ModelShape, YarnShape
from megatron_ads.config.model import Precision, Recompute
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, PipelinePlacement
from megatron_ads.models.settings import ModelSettings
from megatron_ads.runtime.megatron_version import megatron_core_since

SELECTIVE_MODULES = {LatentAttentionShape: ("mla_up_proj", "mlp", "moe"), GroupedQueryShape: ("mlp",)}
"""What selective recomputation drops: the inside of every feed-forward, and with latent attention everything between
its latents and its output projection (with Transformer Engine: the up-projected queries, keys and values)."""


def megatron_config(
    shape: ModelShape, layout: ParallelLayout, placement: PipelinePlacement, settings: ModelSettings
) -> TransformerConfig:
    """Describe the model to Megatron-Core.

    Weights are allocated and not initialised: they are always loaded (``models.weights``). The loss is a sum over
    tokens and is divided by their global count (``calculate_per_token_loss``).

    Raises:
        ConfigError: If Megatron-Core cannot express the model or the layout; the message names the field.
    """
    _require_expressible(shape, layout, placement, settings)
    dtype = torch.bfloat16 if settings.precision is Precision.bf16 else torch.float32
    interleaved = layout.vpp > 1
    kind = MLATransformerConfig if isinstance(shape.attention, LatentAttentionShape) else TransformerConfig
    return kind(
        **_attention(shape),
        **_feed_forward(shape, layout, settings),
        **_kernels(shape, settings),
        **_recomputation(shape, settings.recompute),
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if interleaved else None,
        pipeline_model_parallel_layout=placement.string,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # Batched messages pair up wrongly where the next stage is also the previous one (pp 2 with virtual
        # chunks): the job computes wrong numbers without an error, in megatron-core 0.16 to 0.19.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # After every batched message megatron-core 0.16.1 would wait for the device, for the sake of old versions of
        # torch, and the host could never run ahead of it.
        batch_p2p_sync=False,
        # What was sent on is needed by the backward pass for its graph only. Interleaved, megatron-core 0.16.1 frees it
        # while the message may still be under way: the next stage gets other numbers over gloo.
        deallocate_pipeline_outputs=not interleaved,
        num_layers=shape.num_layers,
        mtp_num_layers=shape.mtp_layers or None,
        mtp_loss_scaling_factor=settings.mtp_loss_weight,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=settings.precision is Precision.bf16,
        calculate_per_token_loss=True,
        perform_initialization=False,
        deterministic_mode=settings.deterministic,
        init_method_std=shape.initializer_range,
        # Layers of one kind would be stacked in checkpoints; those of mixtures are numbered, and so are all here.
        hetereogenous_dist_checkpoint=True,
    )


def _attention(shape: ModelShape) -> dict[str, Any]:
    attention = shape.attention
    of_kind = _latent(shape, attention) if isinstance(attention, LatentAttentionShape) else _grouped_query(attention)
    return of_kind | {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.rms_norm_eps,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _latent(shape: ModelShape, attention: LatentAttentionShape) -> dict[str, Any]:
    yarn = shape.rope_scaling
    positions: dict[str, Any] = {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    if isinstance(yarn, YarnShape):
        positions = {
            "rope_type": "yarn",
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_positions,
            **{name: getattr(yarn, name) for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
        }
    return positions | {
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.qk_nope_head_dim,
        "qk_pos_emb_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rotary_base": shape.rope_theta,
        "qk_layernorm": True,
    }


def _grouped_query(attention: GroupedQueryShape) -> dict[str, Any]:
    return {
        "num_query_groups": attention.num_groups,
        "kv_channels": attention.head_dim,
        "add_qkv_bias": attention.qkv_bias,
    }


def _recomputation(shape: ModelShape, recompute: Recompute) -> dict[str, Any]:
    if recompute is Recompute.none:
        return {}
    if recompute is Recompute.selective:
        modules = SELECTIVE_MODULES[type(shape.attention)]
        return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _feed_forward(shape: ModelShape, layout: ParallelLayout, settings: ModelSettings) -> dict[str, Any]:
    dense = {
        "ffn_hidden_size": shape.dense_ffn_size,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    }
    if not shape.num_experts:
        return dense
    grouped = shape.num_expert_groups > 1
    return dense | {
        "num_moe_experts": shape.num_experts,
        "moe_layer_freq": [int(shape.is_moe_layer(layer)) for layer in range(shape.num_layers)],
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_shared_expert_intermediate_size": shape.shared_ffn_size or None,
        "moe_router_topk": shape.experts_per_token,
        "moe_router_score_function": shape.score_function,
        # Scores are taken over all experts, then the best are selected; the reverse is Megatron's default.
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": shape.routed_scaling_factor,
        "moe_router_num_groups": shape.num_expert_groups if grouped else None,
        "moe_router_group_topk": shape.groups_per_token if grouped else None,
        "moe_router_enable_expert_bias": shape.has_expert_bias,
        "moe_router_bias_update_rate": settings.expert_bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if settings.aux_loss_coefficient else "none",
        # Under calculate_per_token_loss, megatron-core before 0.19 multiplies the balancing loss by the tokens of this
        # rank, but the gradient is divided by those of the whole row: 1 / (tp * cp) of the loss would be left.
        "moe_aux_loss_coeff": settings.aux_loss_coefficient
        * (1 if megatron_core_since("0.19") else layout.tp * layout.cp),
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": settings.spec is not LayerSpec.LOCAL,
    }


def _kernels(shape: ModelShape, settings: ModelSettings) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    with_te = settings.spec is LayerSpec.TE
    return {
        # Else weights would be allocated on the GPU in spite of torch.device("meta").
        "use_cpu_initialization": not on_gpu or torch.empty(0).is_meta,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": on_gpu
        and with_te
        and isinstance(shape.rope_scaling, YarnShape)
        and find_spec("triton") is not None,
        "moe_permute_fusion": on_gpu and with_te,
        # Megatron-Core's own linears, the output layer among them, need a CUDA extension for it that only apex builds;
        # ``models.build.fuse_weight_gradients`` sets it on Transformer Engine's.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        # Transformer Engine rounds its gradients to BF16 before scaling them (up to 2.17, TransformerEngine #3193), and
        # Megatron-LM refuses it from 0.18 on. ``models.specs`` computes the loss in pieces instead.
        "cross_entropy_loss_fusion": False,
    }


def _require_expressible(
    shape: ModelShape, layout: ParallelLayout, placement: PipelinePlacement, settings: ModelSettings
) -> None:
    if layout.cp > 1 and settings.spec is not LayerSpec.TE:
        raise ConfigError(
            f"layout.cp is {layout.cp}, but only Transformer Engine's attention spans several ranks. "
            "Set layout.cp to 1, or install transformer-engine and set model.layer_spec to te."
        )
    if any(chunk.mtp_layers for chunk in placement.chunks[:-2]):
        raise ConfigError(
            f"layout.pipeline {placement.string!r} puts the MTP layers (m) more than one chunk before the loss (L). "
            "Write mL together, or m|L."
        )
    if settings.spec is LayerSpec.TE and isinstance(shape.attention, GroupedQueryShape) and shape.attention.output_bias:
        raise ConfigError(
            "attention_bias is true in config.json: with Transformer Engine's layers the projection of the attention's "
            "outputs has no bias. Set model.layer_spec to grouped."
        )
    shape.require_megatron_routing()
