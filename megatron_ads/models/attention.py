"""The core of latent attention on torch's ``scaled_dot_product_attention``.

Shape suffixes: S = tokens of a row, B = rows, T = tokens of a packed row, H = heads on this rank,
D = width of a query or key head, V = width of a value head.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


class CausalAttention(MegatronModule):
    """Causal attention whose values may be narrower than its queries and keys, as in latent attention.

    Megatron-Core's own torch implementation cannot serve that. Packed rows (``thd``) attend within each sample
    only, and cost what the samples cost, not the square of the row.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *, softmax_scale: float, **_: Any) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend. ``attention_mask`` is ignored: rows are causal from their first token to their last.

        Args:
            query: SBHD, or THD with ``packed_seq_params``; key likewise, value with V instead of D.

        Returns:
            (S, B, H * V), or (T, 1, H * V).
        """
        if packed_seq_params is None:
            return self._attend(query, key, value).flatten(2)
        return self._attend_packed(query, key, value, packed_seq_params).flatten(1).unsqueeze(1)

    def _attend(self, query_SBHD: Tensor, key_SBHD: Tensor, value_SBHV: Tensor) -> Tensor:
        width = value_SBHV.size(-1)
        # The fused kernels take heads of one width only; zeros appended to the values add nothing to the result.
        value_SBHD = pad(value_SBHV, (0, query_SBHD.size(-1) - width))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBHD, value_SBHD))
        output_BHSD = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return output_BHSD[..., :width].permute(2, 0, 1, 3)

    def _attend_packed(self, query_THD: Tensor, key_THD: Tensor, value_THV: Tensor, packed: PackedSeqParams) -> Tensor:
        if query_THD.is_cuda and query_THD.dtype is not torch.float32:
            return self._attend_varlen(query_THD, key_THD, value_THV, packed)
        lengths = packed.cu_seqlens_q.diff().tolist()
        samples = zip(*(x.unsqueeze(1).split(lengths) for x in (query_THD, key_THD, value_THV)), strict=True)
        return torch.cat([self._attend(*sample) for sample in samples]).squeeze(1)

    def _attend_varlen(self, query_THD: Tensor, key_THD: Tensor, value_THV: Tensor, packed: PackedSeqParams) -> Tensor:
        """All samples in one launch of the flash kernel, which takes 16-bit types only."""
        from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

        width = value_THV.size(-1)
        value_THD = pad(value_THV, (0, query_THD.size(-1) - width))
        longest = packed.max_seqlen_q
        output_THD = varlen_attn(
            query_THD,
            key_THD,
            value_THD,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1, 0),
        )
        return output_THD[..., :width]
