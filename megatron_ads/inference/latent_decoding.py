"""Latent attention (MLA) of a transformers model, made fast for generation; the numbers are the same but for rounding.

transformers caches latents and, for every new token, expands all of them to keys and values: behind a prompt of 200
tokens that is most of the arithmetic of a token. A new token can attend to the latents themselves instead:

    score(s) = q_nope . (K c_s) + q_rot . r_s = (K^T q_nope) . c_s + q_rot . r_s        out = V sum_s p_s c_s

with c_s the latent and r_s the rotated key of position s, K and V the two halves of ``kv_b_proj`` of a head. Source:
DeepSeek-V2 (arXiv:2405.04434), section 2.1.2. Prompts are expanded as before; their values are padded to the width of
the keys, because torch has no fused attention on a CPU for two widths.

Shape suffixes: B = rows, H = heads, Q = new tokens, S = all tokens, D = width of a key, N and R = its parts without and
with rotation, V = width of a value, L = width of a latent.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_NAME = "megatron_ads_latent"


def attend_to_latents(model: Any) -> None:
    """Let ``model`` generate so; one without latent attention in the known form is left as it is."""
    attentions = [module for module in model.modules() if hasattr(module, "expand_kv")]
    if not attentions or not all(type(attention.kv_b_proj) is nn.Linear for attention in attentions):
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    for attention in attentions:
        # Its only purpose is to make the arguments of the attention function, which here are the latents.
        attention.expand_kv = lambda latents_B1SL, rotated_B1SR: (latents_B1SL, rotated_B1SR)


def _attention(
    module: Any,
    query_BHQD: Tensor,
    latents_B1SL: Tensor,
    rotated_B1SR: Tensor,
    mask_B1QS: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the outputs of all heads, (B, Q, H, V), and no weights; the mask is True where a token is seen."""
    if query_BHQD.size(2) == 1:
        output_BHQV = _absorbed(module, query_BHQD, latents_B1SL[:, 0], rotated_B1SR[:, 0], mask_B1QS, scaling)
    else:
        key_BHSD, value_BHSV = type(module).expand_kv(module, latents_B1SL, rotated_B1SR)
        width = value_BHSV.size(-1)
        value_BHSD = pad(value_BHSV, (0, key_BHSD.size(-1) - width))
        output_BHQV = scaled_dot_product_attention(
            query_BHQD, key_BHSD, value_BHSD, attn_mask=mask_B1QS, is_causal=mask_B1QS is None, scale=scaling
        )[..., :width]
    return output_BHQV.transpose(1, 2).contiguous(), None


def _absorbed(
    module: Any, query_BH1D: Tensor, latents_BSL: Tensor, rotated_BSR: Tensor, mask_B11S: Tensor | None, scaling: float
) -> Tensor:
    query_BHN, query_BHR = torch.split(query_BH1D[:, :, 0], [module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    weight_HEL = module.kv_b_proj.weight.unflatten(0, (query_BHN.size(1), -1))
    keys_HNL, values_HVL = torch.split(weight_HEL, [module.qk_nope_head_dim, module.v_head_dim], 1)
    query_BHL = (query_BHN.transpose(0, 1) @ keys_HNL).transpose(0, 1)
    scores_BHS = query_BHL @ latents_BSL.mT
    scores_BHS = torch.baddbmm(scores_BHS, query_BHR, rotated_BSR.mT) * scaling
    if mask_B11S is not None:
        scores_BHS = scores_BHS.masked_fill(~mask_B11S[:, 0], float("-inf"))
    seen_BHL = scores_BHS.softmax(-1, dtype=torch.float32).to(latents_BSL.dtype) @ latents_BSL
    output_HBV: Tensor = seen_BHL.transpose(0, 1) @ values_HVL.mT
    return output_HBV.transpose(0, 1)[:, :, None]
