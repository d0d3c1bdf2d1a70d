"""DeepSeek-V3 with its MTP layer in plain torch, written from the published description: an independent reference.

transformers drops the MTP layer, so this replaces it. No class, no cache, no fusion: one function per equation,
on the tensors of the checkpoint by their Hugging Face names.

    MTP, depth 1:   h' = M [ RMSNorm(Emb(t_(i+1))) ; RMSNorm(h_i) ]        arXiv:2412.19437, eq. 21
                    h1 = TRM(h'),   p(t_(i+2)) = softmax(Head(Norm(h1)))    eq. 22, 23

[a; b] is written embedding first, as the published ``eh_proj`` weight has it. ``h_i`` is the output of the main model
behind its final norm: there the report is silent, and the published weights are served so.

Shape suffixes: S = tokens of one sample, C = hidden width, H = heads, N / R / V = width of the part of a key without
positions / with rotary positions / of a value, E = experts, K = experts per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

LATENT_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class PlainModel:
    """The config of a checkpoint and its tensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __call__(self, tokens_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the main model, and those of the MTP layer, each (S, vocabulary).

        The last position of the MTP layer has no next token: token 0 takes its place.
        """
        embedding = self.tensors["model.embed_tokens.weight"]
        hidden_SC = embedding[tokens_S]
        for layer in range(self.config["num_hidden_layers"]):
            hidden_SC = self.layer(layer, hidden_SC)
        hidden_SC = self.norm("model.norm", hidden_SC)
        head = self.tensors["lm_head.weight"]
        return linear(hidden_SC, head), linear(self._mtp(tokens_S, hidden_SC), head)

    def _mtp(self, tokens_S: Tensor, hidden_SC: Tensor) -> Tensor:
        number = self.config["num_hidden_layers"]
        p = f"model.layers.{number}"
        next_S = torch.cat([tokens_S[1:], tokens_S.new_zeros(1)])
        embedded_SC = self.norm(f"{p}.enorm", self.tensors["model.embed_tokens.weight"][next_S])
        joined = torch.cat([embedded_SC, self.norm(f"{p}.hnorm", hidden_SC)], dim=-1)
        return self.norm(
            f"{p}.shared_head.norm", self.layer(number, linear(joined, self.tensors[f"{p}.eh_proj.weight"]))
        )

    def norm(self, name: str, x: Tensor, epsilon: float | None = None) -> Tensor:
        """RMSNorm."""
        epsilon = self.config["rms_norm_eps"] if epsilon is None else epsilon
        return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * self.tensors[f"{name}.weight"]

    def layer(self, number: int, hidden_SC: Tensor) -> Tensor:
        """One decoder layer: attention and feed-forward, each behind a norm and added to the residual."""
        p = f"model.layers.{number}"
        hidden_SC = hidden_SC + self.attention(f"{p}.self_attn", self.norm(f"{p}.input_layernorm", hidden_SC))
        x_SC = self.norm(f"{p}.post_attention_layernorm", hidden_SC)
        dense = number < self.config["first_k_dense_replace"]
        return hidden_SC + (self.feed_forward(f"{p}.mlp", x_SC) if dense else self.mixture(f"{p}.mlp", x_SC))

    def attention(self, p: str, x_SC: Tensor) -> Tensor:
        """Multi-head latent attention, arXiv:2405.04434, eq. 9 to 19."""
        config, heads = self.config, self.config["num_attention_heads"]
        nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
        query = self.norm(f"{p}.q_a_layernorm", self._linear(f"{p}.q_a_proj", x_SC), LATENT_EPSILON)
        query_SHD = self._linear(f"{p}.q_b_proj", query).unflatten(-1, (heads, nope + rope))
        latent, key_SR = self._linear(f"{p}.kv_a_proj_with_mqa", x_SC).split([rank, rope], dim=-1)
        latent = self.norm(f"{p}.kv_a_layernorm", latent, LATENT_EPSILON)
        key_SHN, value_SHV = (
            self._linear(f"{p}.kv_b_proj", latent).unflatten(-1, (heads, -1)).split([nope, config["v_head_dim"]], -1)
        )
        query_SHR, key_SHR = self.rotate(query_SHD[..., nope:]), self.rotate(key_SR[:, None]).expand(-1, heads, -1)
        scores_HST = torch.einsum("shd,thd->hst", query_SHD[..., :nope], key_SHN)
        scores_HST = (scores_HST + torch.einsum("shr,thr->hst", query_SHR, key_SHR)) * self.softmax_scale()
        future = torch.ones(len(x_SC), len(x_SC), dtype=torch.bool).triu(1)
        weights_HST = scores_HST.masked_fill(future, -torch.inf).softmax(-1)
        return self._linear(f"{p}.o_proj", torch.einsum("hst,thv->shv", weights_HST, value_SHV).flatten(1))

    def softmax_scale(self) -> float:
        """1 / sqrt(width), times YaRN's mscale squared."""
        yarn = self.config["rope_scaling"]
        mscale = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
        width = self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"]
        return float(mscale**2 / math.sqrt(width))

    def rotate(self, x_SHR: Tensor) -> Tensor:
        """Rotary positions on interleaved pairs, with YaRN's frequencies (arXiv:2309.00071, section 3.2)."""
        angles_SP = torch.arange(len(x_SHR), dtype=torch.float64)[:, None] * self.frequencies()
        turns_SP = torch.polar(torch.ones_like(angles_SP), angles_SP).to(torch.complex64)
        pairs_SHP = torch.view_as_complex(x_SHR.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs_SHP * turns_SP[:, None]).flatten(-2)

    def frequencies(self) -> Tensor:
        """A pair that turns more than ``beta_fast`` times within the original context keeps its frequency; one that
        turns less than ``beta_slow`` times is slowed by ``factor``; a ramp over whole pairs lies between."""
        yarn, base, width = self.config["rope_scaling"], self.config["rope_theta"], self.config["qk_rope_head_dim"]
        pair_P = torch.arange(width // 2, dtype=torch.float64)
        frequency_P = base ** (-2 * pair_P / width)

        def pair_with_turns(turns: float) -> float:
            length = yarn["original_max_position_embeddings"]
            return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_with_turns(yarn["beta_fast"])), 0)
        high = min(math.ceil(pair_with_turns(yarn["beta_slow"])), width - 1)
        slowed_P = ((pair_P - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequency_P * (1 - slowed_P) + frequency_P / yarn["factor"] * slowed_P

    def mixture(self, p: str, x_SC: Tensor) -> Tensor:
        """Shared and routed experts, arXiv:2412.19437, eq. 12 to 16, experts one after the other."""
        weights_SE = self.routing(p, x_SC)
        output = self.feed_forward(f"{p}.shared_experts", x_SC)
        for expert in weights_SE.any(0).nonzero().flatten().tolist():
            mine = weights_SE[:, expert].nonzero().flatten()
            result = self.feed_forward(f"{p}.experts.{expert}", x_SC[mine]) * weights_SE[mine, expert, None]
            output = output.index_add(0, mine, result)
        return output

    def routing(self, p: str, x_SC: Tensor) -> Tensor:
        """Return the weight of every expert for every token: zero but for the best K of the best groups."""
        config, groups = self.config, self.config["n_group"]
        scores_SE = torch.sigmoid(self._linear(f"{p}.gate", x_SC))
        biased_SGE = (scores_SE + self.tensors[f"{p}.gate.e_score_correction_bias"]).unflatten(-1, (groups, -1))
        best_SG = biased_SGE.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        in_group = best_SG >= best_SG.sort(dim=-1, descending=True).values[:, config["topk_group"] - 1, None]
        open_SE = biased_SGE.masked_fill(~in_group[..., None], -torch.inf).flatten(1)
        chosen_SE = open_SE >= open_SE.sort(-1, descending=True).values[:, config["num_experts_per_tok"] - 1, None]
        kept_SE = scores_SE * chosen_SE
        return kept_SE / kept_SE.sum(-1, keepdim=True) * config["routed_scaling_factor"]

    def feed_forward(self, p: str, x: Tensor) -> Tensor:
        """SwiGLU."""
        return self._linear(f"{p}.down_proj", silu(self._linear(f"{p}.gate_proj", x)) * self._linear(f"{p}.up_proj", x))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.tensors[f"{name}.weight"])
