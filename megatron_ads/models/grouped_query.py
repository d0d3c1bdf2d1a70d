"""Grouped-query attention (arXiv:2305.13245) for layers built without Transformer Engine, and its rotary frequencies.

Shape suffixes: S = tokens of a row, B = rows (1 where samples are packed), C = hidden width, G = query groups on this
rank, H = query heads on this rank, D = width of a head, P = D / 2 pairs of channels.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ads.architecture import Llama3Shape, ModelShape
from megatron_ads.models.attention import attend, positions_in_samples


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Return the angle, (P,) in FP32, that each pair of channels turns by from one position to the next.

    In transformers' own steps: an angle far into a text holds the rounding of its frequency thousands of times.
    Megatron-Core 0.16 to 0.19 knows Llama 3.1's scaling with the factors and the context of Llama 3.1 only.
    """
    width = shape.attention.rotary_dim
    frequency_P = 1.0 / (
        shape.rope_theta ** (torch.arange(0, width, 2, dtype=torch.int64, device="cpu").float() / width)
    )
    if shape.rope_scaling is None:
        return frequency_P
    scaling = shape.rope_scaling
    assert isinstance(scaling, Llama3Shape)  # what ``model_shape.dense`` reads
    wavelength_P = 2 * math.pi / frequency_P
    low, high, context = scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_max_positions
    # 1 where a pair turns ``high`` times or more over the original context, 0 where it turns ``low`` times or less.
    kept_P = ((context / wavelength_P - low) / (high - low)).clamp(0, 1)
    return (1 - kept_P) * frequency_P / scaling.factor + kept_P * frequency_P


def rotary_angles(shape: ModelShape, positions: int, device: torch.device) -> Tensor:
    """Return the angles of so many positions, (S, 1, 1, D), as Megatron-Core hands them to its layers: pairs twice."""
    angles_SP = torch.outer(torch.arange(positions, device=device).float(), rotary_frequencies(shape).to(device))
    return torch.cat([angles_SP, angles_SP], dim=-1)[:, None, None]


class GroupedQueryAttention(SelfAttention):
    """Megatron-Core's attention: its parameters and parallel linears, with a training pass of our own.

    Packed samples attend within themselves, which the stock torch layers cannot (``attention_mask`` is not needed).
    """

    def forward(
        self,
        hidden_SBC: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output, (S, B, C) like the input, and the bias to add to it, if there is one.

        Args:
            rotary_pos_emb: Angles of the positions of a sample, (S or more, 1, 1, D).
        """
        mixed, _ = self.linear_qkv(hidden_SBC)
        turns_2SP = _turns(rotary_pos_emb[:, 0, 0], mixed.size(0), packed_seq_params)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed_SBGxD = mixed.unflatten(-1, (groups, -1, width))
        # Of each group its query heads, its key head and its value head.
        query, key, value = mixed_SBGxD[..., :-2, :], mixed_SBGxD[..., -2:-1, :], mixed_SBGxD[..., -1:, :]
        heads = self.num_attention_heads_per_partition // groups
        output_BHSD = attend(
            _as_heads(_turn_halves(query, turns_2SP)),
            _as_heads(_turn_halves(key, turns_2SP).expand(-1, -1, -1, heads, -1)),
            _as_heads(value.expand(-1, -1, -1, heads, -1)),
            scale=width**-0.5,
            boundaries=packed_seq_params.cu_seqlens_q if packed_seq_params is not None else None,
            longest=packed_seq_params.max_seqlen_q if packed_seq_params is not None else None,
        )
        output, bias = self.linear_proj(output_BHSD.permute(2, 0, 1, 3).flatten(2))
        return output, bias


def _as_heads(x_SBGhD: Tensor) -> Tensor:
    """Return (B, H, S, D) in memory of its own: the heads of all groups, one after the other."""
    return x_SBGhD.permute(1, 2, 3, 0, 4).flatten(1, 2).contiguous()


def _turn_halves(x_SBGhD: Tensor, turns_2SP: Tensor) -> Tensor:
    """Turn the plane of channel p and channel p + D / 2 by the angle of their position, in FP32.

    In real numbers: torch's complex ones would keep a copy of their parts for the backward pass.
    """
    cosine, sine = turns_2SP[:, :, None, None, None]
    first, second = x_SBGhD.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x_SBGhD.dtype)


def _turns(angles_SD: Tensor, tokens: int, packed: PackedSeqParams | None) -> Tensor:
    """Return cosine and sine of each token's position and pair of channels, (2, S, P)."""
    angles_SP = angles_SD[:, : angles_SD.size(-1) // 2].float()
    turns_2SP = torch.stack([angles_SP.cos(), angles_SP.sin()])
    if packed is None:
        return turns_2SP[:, :tokens]
    return turns_2SP[:, positions_in_samples(packed, tokens)]


class BiasedOutputProjection(RowParallelLinear):
    """The projection of the heads' outputs, with the bias that Megatron-Core gives only to all linears or none."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)
