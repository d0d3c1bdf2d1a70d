"""Multi-head latent attention (arXiv:2405.04434, section 2.1) for layers built without Transformer Engine.

Shape suffixes: S = tokens of a row, L = of one sample, B = rows (1 where samples are packed), C = hidden width,
H = heads on this rank, D = width of a query or key: N channels without positions, then R with; V = width of a value.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

BLOCK = 128
"""Queries taken at a time by ``BlockedAttention``."""
LONGEST_BLOCKED = 1024
"""Longest sample whose attention probabilities are kept for the backward pass; beyond, memory would grow with L^2."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    boundaries: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Return (B, H, S, V): each token's attention over itself and the tokens before it in its sample.

    Samples that share a row do not see each other, and cost what they cost, not the square of the row.

    Args:
        query: (B, H, S, D); key likewise, value with V, which may be less than D.
        scale: Factor on the scores before the softmax.
        boundaries: Where the samples of the one row begin, and its length last (int32); None: each row is one sample.
        longest: Tokens of the longest of those samples; None: counted, for which a GPU's work is waited for.
    """
    if boundaries is None:
        return _attend_sample(query, key, value, scale)
    if query.is_cuda and query.dtype is not torch.float32:
        return _attend_varlen(query, key, value, scale, boundaries, longest or int(boundaries.diff().max()))
    lengths = boundaries.diff().tolist()
    samples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_attend_sample(q, k, v, scale) for q, k, v in samples], dim=2)


def _attend_sample(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if query.device.type == "cpu" and query.dtype is torch.float32 and query.size(2) <= LONGEST_BLOCKED:
        return BlockedAttention.apply(query, key, value, scale)
    # The fused kernels take heads of one width only; zeros appended to the values add nothing to the result.
    wide = pad(value, (0, query.size(-1) - value.size(-1)))
    return scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scale)[..., : value.size(-1)]


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, boundaries: Tensor, longest: int) -> Tensor:
    """All samples in one launch of the flash kernel, which takes 16-bit types only."""
    from torch.nn.attention.varlen import varlen_attn

    wide = pad(value, (0, query.size(-1) - value.size(-1)))
    query_SHD, key_SHD, value_SHD = (x.squeeze(0).transpose(0, 1) for x in (query, key, wide))
    output_SHD: Any = varlen_attn(
        query_SHD, key_SHD, value_SHD, boundaries, boundaries, longest, longest, scale=scale, window_size=(-1, 0)
    )
    return output_SHD[..., : value.size(-1)].transpose(0, 1).unsqueeze(0)


def positions_in_samples(packed: PackedSeqParams, tokens: int) -> Tensor:
    """Return the position of each token of a packed row in its own sample, (S,)."""
    boundaries = packed.cu_seqlens_q
    starts = boundaries[:-1].repeat_interleave(boundaries.diff(), output_size=tokens)
    return torch.arange(tokens, device=boundaries.device) - starts


class BlockedAttention(torch.autograd.Function):
    """Causal attention in matrix products over blocks of queries, each against the keys that it may see.

    A whole training step on a CPU is 1.1 times as fast as with torch's kernels where samples have 512 tokens or more,
    as fast where they have 150: those want values as wide as keys, or compute what the causal mask then removes.
    P = softmax(scale Q K^T), O = P V; with dP = dO V^T the gradient of the scores is
    P (dP - rowsum(dO O)) (arXiv:2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the output (B, H, L, V) for FP32 arguments."""
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        output = v.new_empty(q.size(0), q.size(1), v.size(2))
        probabilities = []
        for begin in range(0, q.size(1), BLOCK):
            end = min(begin + BLOCK, q.size(1))
            scores = torch.bmm(q[:, begin:end], k[:, :end].transpose(1, 2)).mul_(scale)
            future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu_(1)
            scores[:, :, begin:].masked_fill_(future, -torch.inf)
            probabilities.append(torch.softmax(scores, dim=-1))
            torch.bmm(probabilities[-1], v[:, :end], out=output[:, begin:end])
        ctx.save_for_backward(q, k, v, output, *probabilities)
        ctx.scale, ctx.shape = scale, query.shape
        return output.unflatten(0, query.shape[:2])

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, output, *probabilities = ctx.saved_tensors
        grad = output_grad.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad * output).sum(-1, keepdim=True)
        for index, p in enumerate(probabilities):
            begin, end = index * BLOCK, p.size(2)
            block_grad = grad[:, begin:end]
            dv[:, :end].baddbmm_(p.transpose(1, 2), block_grad)
            ds = torch.bmm(block_grad, v[:, :end].transpose(1, 2)).sub_(mean[:, begin:end]).mul_(p)
            dq[:, begin:end] = torch.bmm(ds, k[:, :end]).mul_(ctx.scale)
            dk[:, :end].baddbmm_(ds.transpose(1, 2), q[:, begin:end], alpha=ctx.scale)
        rows = ctx.shape[:2]
        return dq.unflatten(0, rows), dk.unflatten(0, rows), dv.unflatten(0, rows), None


def make_heads(
    query_SBHx: Tensor, key_value_SBHx: Tensor, key_SBR: Tensor, turns_SR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return projections as heads: query and key (B, H, S, N + R) and value (B, H, S, V), their positions rotated in.

    Each pair of neighbouring channels of the position part is one complex number, turned by the angle of its
    position. (transformers and Megatron-Core gather the even channels before the odd ones first; scores of queries
    against keys do not depend on an order that both share.) The key's position part is one for all heads.

    Args:
        query_SBHx: N, then R channels.
        key_value_SBHx: N channels of the key, then V of the value.
        key_SBR: The key's position part.
        turns_SR: Complex factor of each position and pair of channels, (S, 1, R / 2).
    """
    rotated, plain = key_SBR.size(-1), query_SBHx.size(-1) - key_SBR.size(-1)
    turned = _turn(query_SBHx[..., plain:], turns_SR.unsqueeze(1))
    shared = _turn(key_SBR, turns_SR).unsqueeze(2).expand(*query_SBHx.shape[:3], rotated)
    query = torch.cat([query_SBHx[..., :plain], turned], dim=-1)
    key = torch.cat([key_value_SBHx[..., :plain], shared], dim=-1)
    # A copy of the values, so that what autograd keeps for attention does not hold the whole projection.
    value = key_value_SBHx[..., plain:].permute(1, 2, 0, 3).contiguous()
    return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply pairs of neighbouring channels, as complex numbers in FP32, by ``turns``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class ReplicatedLinear(torch.nn.Module):
    """A bias-free linear that a tensor-parallel rank applies to its own tokens, as sequence parallelism gives it."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        # Megatron sums the gradients of marked parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state", None)
        )

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def get_extra_state(self) -> None:
        """Keep the empty entry that every linear of Megatron-Core has in a checkpoint."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore it."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe the weight to a distributed checkpoint: the same on every tensor-parallel rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


LATENT_NORM_EPSILON = 1e-6
"""Of the norms inside latent attention, whatever the model's ``rms_norm_eps``.

DeepSeek's published code and transformers build these two with the default of their norm class. It matters for
Moonlight, whose other norms have 1e-5.
"""
_NORMALISING = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")
"""Submodules that may hold those norms; Transformer Engine fuses them into the up-projections."""


def set_latent_norm_epsilon(model: torch.nn.Module) -> None:
    """Give the latent norms of every attention in ``model`` their epsilon; Megatron-Core builds all norms with one."""
    for attention in model.modules():
        if isinstance(attention, MLASelfAttention):
            for name in _NORMALISING:
                module = getattr(attention, name, None)
                if module is not None and hasattr(module, "eps"):
                    module.eps = LATENT_NORM_EPSILON


class StatedProjections(MLASelfAttention):
    """Megatron-Core's latent attention with the norms and projections of its spec, as until 0.18.

    From 0.19 on, queries without a latent (V2-Lite, Moonlight) cannot be built with a norm for keys and values alone:
    they get a norm of their own, which these models do not have, or are refused.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {name: getattr(submodules, name) for name in ("linear_q_proj", *_NORMALISING)}


class LatentAttention(StatedProjections):
    """Megatron-Core's latent attention: its parameters and parallel linears, with a training pass of our own.

    Differences from the stock torch layers of megatron-core 0.16 to 0.19:

    - Values may be narrower than keys; the stock core attention cannot serve that.
    - The two down-projections are replicated over the tensor-parallel ranks. Stock, they are divided, and part of the
      gradient is lost: the position part of the key is one for all heads, so its gradient is a sum over the heads of
      all ranks, but the stock gather passes back each rank's own part only.
    - Packed samples attend within themselves (``attention_mask`` is not needed).
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, config.q_lora_rank, config)
        down = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config.hidden_size, down, config)
        self._turns = torch.empty(0, 1, config.qk_pos_emb_head_dim // 2, dtype=torch.complex64)

    def forward(
        self,
        hidden_SBC: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """Return the attention's output, (S, B, C) like the input, and no bias."""
        if self.config.q_lora_rank is None:
            query = hidden_SBC
        else:
            query = self.q_layernorm(self.linear_q_down_proj(hidden_SBC))
        latent, key_position = self.linear_kv_down_proj(hidden_SBC).split(
            [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
        )
        if self.config.sequence_parallel:
            key_position = gather_from_sequence_parallel_region(key_position, group=self.tp_group)
        latents = (query, self.kv_layernorm(latent), key_position)
        turns = self._turns_of(key_position.size(0), packed_seq_params, hidden_SBC.device)
        boundaries = packed_seq_params.cu_seqlens_q if packed_seq_params is not None else None
        longest = packed_seq_params.max_seqlen_q if packed_seq_params is not None else None
        attend_from = partial(self._attend_from, longest=longest)  # recomputation takes tensors only
        if self.recompute_up_proj and self.training:
            output = tensor_parallel.checkpoint(attend_from, False, *latents, turns, boundaries)
        else:
            output = attend_from(*latents, turns, boundaries)
        return self.linear_proj(output)

    def _attend_from(
        self,
        query: Tensor,
        latent: Tensor,
        key_position: Tensor,
        turns: Tensor,
        boundaries: Tensor | None,
        *,
        longest: int | None,
    ) -> Tensor:
        """Project the latents up to heads and attend; (S, B, heads * value width)."""
        query, _ = self.linear_q_proj(query) if self.config.q_lora_rank is None else self.linear_q_up_proj(query)
        key_value, _ = self.linear_kv_up_proj(latent)
        shape = (self.num_attention_heads_per_partition, -1)
        heads = make_heads(query.unflatten(-1, shape), key_value.unflatten(-1, shape), key_position, turns)
        output = attend(*heads, scale=self.softmax_scale, boundaries=boundaries, longest=longest)
        return output.permute(2, 0, 1, 3).flatten(2)

    def _turns_of(self, tokens: int, packed: PackedSeqParams | None, device: torch.device) -> Tensor:
        """Return the complex factor of each token's position and pair of channels, (S, 1, R / 2)."""
        longest = tokens if packed is None else packed.max_seqlen_q
        if longest > self._turns.size(0):
            angles = self.rotary_pos_emb(max(longest, 2 * self._turns.size(0)))
            angles, magnitude = angles if isinstance(angles, tuple) else (angles, 1.0)
            angles = angles[:, 0, :, : self._turns.size(-1)].float()
            self._turns = torch.polar(torch.full_like(angles, magnitude), angles).to(device)
        if packed is None:
            return self._turns[:tokens]
        return self._turns[positions_in_samples(packed, tokens)]
