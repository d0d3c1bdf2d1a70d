"""Multi-head latent attention (arXiv:2405.04434, section 2.1) for layers built without Transformer Engine.

Shape suffixes: S = tokens of a row, B = rows (1 where samples are packed), C = hidden width.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_ads.models.attention import attend
from megatron_ads.models.heads import MakeHeads
from megatron_ads.models.replicated_linear import ReplicatedLinear

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


class LatentAttention(MLASelfAttention):
    """Megatron-Core's latent attention: its parameters and parallel linears, with a training pass of our own.

    Differences from the stock torch layers of megatron-core 0.16.1:

    - Values may be narrower than keys; the stock core attention cannot serve that.
    - The two down-projections are replicated over the tensor-parallel ranks. Stock, they are divided, and part of the
      gradient is lost: the position part of the key is one for all heads, so its gradient is a sum over the heads of
      all ranks, but the stock gather passes back each rank's own part only.
    - Packed samples attend within themselves (``attention_mask`` is not needed), and tensors are not copied between
      projections and attention more than once.
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
        if self.recompute_up_proj and self.training:
            output = tensor_parallel.checkpoint(self._attend_from, False, *latents, turns, boundaries)
        else:
            output = self._attend_from(*latents, turns, boundaries)
        return self.linear_proj(output)

    def _attend_from(
        self, query: Tensor, latent: Tensor, key_position: Tensor, turns: Tensor, boundaries: Tensor | None
    ) -> Tensor:
        """Project the latents up to heads and attend; (S, B, heads * value width)."""
        query, _ = self.linear_q_proj(query) if self.config.q_lora_rank is None else self.linear_q_up_proj(query)
        key_value, _ = self.linear_kv_up_proj(latent)
        shape = (self.num_attention_heads_per_partition, -1)
        heads = MakeHeads.apply(query.unflatten(-1, shape), key_value.unflatten(-1, shape), key_position, turns)
        output = attend(*heads, scale=self.softmax_scale, boundaries=boundaries)
        return output.permute(2, 0, 1, 3).flatten(2)

    def _turns_of(self, tokens: int, packed: PackedSeqParams | None, device: torch.device) -> Tensor:
        """Return the complex factor of each token's position and pair of channels, (S, 1, R / 2)."""
        if packed is None:
            return self._table(tokens, device)[:tokens]
        lengths = packed.cu_seqlens_q.diff()
        starts = packed.cu_seqlens_q[:-1].repeat_interleave(lengths, output_size=tokens)
        positions = torch.arange(tokens, device=device) - starts
        return self._table(packed.max_seqlen_q, device)[positions]

    def _table(self, positions: int, device: torch.device) -> Tensor:
        if positions > self._turns.size(0):
            angles = self.rotary_pos_emb(max(positions, 2 * self._turns.size(0)))
            angles, magnitude = angles if isinstance(angles, tuple) else (angles, 1.0)
            angles = angles[:, 0, :, : self._turns.size(-1)].float()
            self._turns = torch.polar(torch.full_like(angles, magnitude), angles).to(device)
        return self._turns
