"""Megatron-Core's GPT model, and which module is used at each place of a decoder layer, a block and an MTP layer.

local    torch modules, experts one after the other: the readable reference
grouped  the same, experts in one grouped matrix product
te       Transformer Engine's modules, imported only when asked for

Multi-token prediction (MTP): DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_token_prediction as mtp
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import rms_norm
from torch.utils.checkpoint import checkpoint

from conversion.layer_specs import LayerSpec
from megatron_ads.architecture import GroupedQueryShape, LatentAttentionShape, ModelShape
from megatron_ads.layout import Chunk
from megatron_ads.models.attention import LatentAttention, StatedProjections
from megatron_ads.models.experts import GroupedExperts
from megatron_ads.models.grouped_query import BiasedOutputProjection, GroupedQueryAttention
from megatron_ads.models.lora import named_adapters
from megatron_ads.models.mtp_loss import add_mtp_losses
from megatron_ads.models.spec_arguments import experts_of, feed_forward_of, mtp_submodules
from megatron_ads.runtime.megatron_version import megatron_core_since

LOSS_TOKENS = 1024
"""Tokens whose probabilities are held at a time in FP32: 0.5 GB of them with DeepSeek's vocabulary."""
_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def decoder_spec(shape: ModelShape, chunk: Chunk, spec: LayerSpec) -> TransformerBlockSubmodules:
    """Return the decoder layers of one chunk, and the norm behind the last layer of the model."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer(shape, spec, has_experts=shape.is_moe_layer(layer)) for layer in chunk.layers],
        layer_norm=_norm(spec),
    )


def mtp_spec(shape: ModelShape, chunk: Chunk, spec: LayerSpec) -> mtp.MultiTokenPredictionBlockSubmodules | None:
    """Return the MTP layers of one chunk, or None where there are none."""
    if not chunk.mtp_layers:
        return None
    layers = [
        ModuleSpec(
            module=mtp.MultiTokenPredictionLayer if megatron_core_since("0.18") else MultiTokenLayer,
            submodules=mtp_submodules(
                norm=_norm(spec),
                projection=_te("TEColumnParallelLinear") if spec is LayerSpec.TE else ColumnParallelLinear,
                layer=_layer(shape, spec, has_experts=shape.is_moe_layer(shape.num_layers + layer)),
            ),
        )
        for layer in chunk.mtp_layers
    ]
    return mtp.MultiTokenPredictionBlockSubmodules(layer_specs=layers)


def _layer(shape: ModelShape, spec: LayerSpec, *, has_experts: bool) -> ModuleSpec:
    if spec is LayerSpec.TE:
        latent = isinstance(shape.attention, LatentAttentionShape)
        # Megatron reads only whether num_experts is None; how many there are is in the configuration.
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=1 if has_experts else None,
            moe_grouped_gemm=True,
            qk_layernorm=latent,
            multi_latent_attention=latent,
        )
        if latent:
            layer.submodules.self_attention.module = StatedProjections
        return layer
    mixture = MoESubmodules(
        experts=GroupedExperts if spec is LayerSpec.GROUPED else experts_of(SequentialMLP, _LINEARS),
        shared_experts=experts_of(SharedExpertMLP, _LINEARS),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention(shape.attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=feed_forward_of(MoELayer, mixture) if has_experts else feed_forward_of(MLP, _LINEARS),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention(attention: LatentAttentionShape | GroupedQueryShape) -> ModuleSpec:
    causal = {"attn_mask_type": AttnMaskType.causal}
    if isinstance(attention, GroupedQueryShape):
        projections = SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=IdentityOp,
            linear_proj=BiasedOutputProjection if attention.output_bias else RowParallelLinear,
        )
        return ModuleSpec(module=GroupedQueryAttention, params=causal, submodules=projections)
    latent = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=IdentityOp,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm,
        kv_layernorm=RMSNorm,
    )
    return ModuleSpec(module=LatentAttention, params=causal, submodules=latent)


def _norm(spec: LayerSpec) -> Any:
    return _te("TENorm") if spec is LayerSpec.TE else RMSNorm


def _te(name: str) -> Any:
    return getattr(importlib.import_module("megatron.core.extensions.transformer_engine"), name)


class RMSNorm(torch.nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in FP32 whatever the dtype of ``x``.

    Built as Megatron-Core builds a norm. Under sequence parallelism each tensor-parallel rank sees a part of the
    tokens, so the weight is marked for Megatron to sum its gradient over those ranks; its own torch norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, in its shape and dtype; on a GPU by torch's own kernel."""
        if x.is_cuda:
            return rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _Normalise.apply(x, self.weight, self.eps)


class _Normalise(torch.autograd.Function):
    """The norm in two passes over ``x``, and its gradient in four.

    With n = x r, r = 1 / sqrt(mean(x^2) + eps) and g = weight * dy: dx = r (g - n mean(g n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean_square = vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1))
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        inner = grad.float() * weight
        mean = vecdot(inner, normal).div_(x.size(-1)).unsqueeze(-1)
        return torch.addcmul(inner, normal, mean, value=-1).mul_(scale).to(x.dtype), weight_grad, None


class DecoderModel(GPTModel):
    """A ``GPTModel`` that runs its MTP layers only where they are trained.

    Megatron-Core runs them in every pass, and until 0.16 could not return logits without labels. Here they run in
    training passes with labels and a loss weight above 0; else they are only carried along.
    """

    trains_adapters = False
    """Low-rank adapters are trained and nothing else; some chunks may have none."""
    on_logits: Callable[[Tensor], None] | None = None
    """Called with this rank's logits (S, B, V / tp) of each pass with labels, before the loss is computed: that may
    overwrite them."""

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        """Return the loss of each label ``(B, S)``, or the logits ``(B, S, vocabulary)`` without labels."""
        trains_mtp = self.training and self.config.mtp_num_layers and self.config.mtp_loss_scaling_factor
        packed = others["packed_seq_params"]
        if trains_mtp and labels is not None and self.mtp_process:
            inputs = {name: others[name] for name in ("input_ids", "position_ids", "attention_mask")}
            hidden_states = self.mtp(
                **inputs, hidden_states=hidden_states, packed_seq_params=packed, embedding=self.embedding
            )
        if not self.post_process:
            return hidden_states
        if trains_mtp and labels is not None:
            hidden_states = add_mtp_losses(self, hidden_states, labels, others["loss_mask"], packed)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV, _ = self.output_layer(
            hidden_states, weight=weight, runtime_gather_output=others["runtime_gather_output"]
        )
        if labels is None:
            return logits_SBV.transpose(0, 1).contiguous()
        if self.on_logits is not None:
            self.on_logits(logits_SBV)
        return self.compute_language_model_loss(labels, logits_SBV)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of each label (B, S); on a GPU in pieces, on a CPU memory matters less than time."""
        whole = super().compute_language_model_loss
        return loss_in_pieces(whole, labels, logits) if logits.is_cuda else whole(labels, logits)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe what a training checkpoint holds of the chunk: all of it, or the adapters if they alone are trained.

        Frozen weights are read again from where they were loaded: a checkpoint of DeepSeek-R1's adapters is
        less than a hundredth of the model's.
        """
        if not self.trains_adapters:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        adapters = [adapter.sharded_factors(prefix + name) for name, adapter in named_adapters(self)]
        return {name: factor for factors in adapters for name, factor in factors.items()}


def loss_in_pieces(compute: Callable[[Tensor, Tensor], Tensor], labels_BS: Tensor, logits_SBV: Tensor) -> Tensor:
    """Return what ``compute`` returns of all tokens, (B, S), without keeping FP32 probabilities of all logits.

    At 4096 tokens of DeepSeek's vocabulary they are 2.1 GB, once for each output layer. Here the backward pass computes
    them again, piece by piece. Megatron-Core writes those of FP32 logits over the logits: such are taken whole.
    """
    if logits_SBV.dtype is torch.float32:
        return compute(labels_BS, logits_SBV)
    pieces = zip(labels_BS.split(LOSS_TOKENS, 1), logits_SBV.split(LOSS_TOKENS, 0), strict=True)
    losses = [checkpoint(compute, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(losses, dim=1)


class MultiTokenLayer(mtp.MultiTokenPredictionLayer):
    """Megatron-Core's layer, able to recompute its activations on packed rows.

    Megatron-core 0.16 and 0.17 pass the sample boundaries through autograd's ``save_for_backward``, which takes only
    tensors, and die with a TypeError.
    """

    def _checkpointed_forward(
        self, forward_func: Callable[..., Tensor], *, hidden_states: Tensor, decoder_input: Tensor, **others: Any
    ) -> Tensor:
        def run(hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
            return forward_func(hidden_states=hidden_states, decoder_input=decoder_input, **others)

        return tensor_parallel.checkpoint(run, False, hidden_states, decoder_input)
