"""What a DeepSeek-style model looks like, read from its Hugging Face ``config.json``. Standard library only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnShape:
    """YaRN position scaling (arXiv:2309.00071)."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Every number that decides the tensors and the arithmetic of one model. Layers count from 0."""

    model_type: str
    """``deepseek_v3`` (V3, R1, Moonlight), ``kimi_k2`` or ``deepseek_v2``, as in config.json."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    """Decoder layers, without the MTP layers."""
    num_heads: int
    dense_ffn_size: int
    """Inner width of the dense feed-forward layers."""
    first_dense_layers: int
    """Layers 0 to this one, exclusive, are dense; every later one is a mixture of experts."""

    q_lora_rank: int | None
    """Rank of the query's low-rank projection; None: one full-rank query projection."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    num_experts: int
    """Routed experts per MoE layer."""
    num_shared_experts: int
    """Shared experts per MoE layer, stored fused as one feed-forward of this many widths."""
    expert_ffn_size: int
    """Inner width of one routed expert."""
    experts_per_token: int
    num_expert_groups: int
    """Group-limited routing: groups the experts are divided into; 1 is no limit."""
    groups_per_token: int
    """Groups a token may choose from."""
    score_function: str
    """``sigmoid`` or ``softmax``."""
    has_expert_bias: bool
    """An FP32 ``e_score_correction_bias`` takes part in the selection (not in the weights)."""
    normalize_expert_weights: bool
    routed_scaling_factor: float

    rope_theta: float
    yarn: YarnShape | None
    max_positions: int
    rms_norm_eps: float
    initializer_range: float = 0.02
    mtp_layers: int = 0
    """Multi-token-prediction layers stored behind the decoder layers; they are MoE layers."""
    tie_word_embeddings: bool = False

    @property
    def shared_ffn_size(self) -> int:
        """Inner width of the fused shared experts."""
        return self.num_shared_experts * self.expert_ffn_size

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (global, MTP layers counted on from ``num_layers``) has routed experts."""
        return self.num_experts > 0 and layer >= self.first_dense_layers


def read_model_shape(path: Path) -> ModelShape:
    """Read ``config.json``, given the file or the folder that holds it."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: {path} is not a Hugging Face checkpoint folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON ({error}); copy it again from the checkpoint's repository.") from None
    return shape_from_config(config)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Build a ModelShape from a parsed ``config.json``, of the published or the transformers-5 style."""
    v3 = config["model_type"] != "deepseek_v2"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    yarn = None
    if rope.get("rope_type", rope.get("type")) == "yarn":
        yarn = YarnShape(
            factor=rope["factor"],
            original_max_positions=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast", 32),
            beta_slow=rope.get("beta_slow", 1),
            mscale=rope.get("mscale", 1.0),
            mscale_all_dim=rope.get("mscale_all_dim", 0.0),
        )
    return ModelShape(
        model_type=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        dense_ffn_size=config["intermediate_size"],
        first_dense_layers=config["first_k_dense_replace"],
        q_lora_rank=config.get("q_lora_rank"),
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        num_experts=config.get("n_routed_experts") or 0,
        num_shared_experts=config.get("n_shared_experts") or 0,
        expert_ffn_size=config["moe_intermediate_size"],
        experts_per_token=config["num_experts_per_tok"],
        num_expert_groups=config.get("n_group") or 1,
        groups_per_token=config.get("topk_group") or 1,
        score_function=config.get("scoring_func", "sigmoid" if v3 else "softmax"),
        has_expert_bias=config.get("topk_method", "noaux_tc" if v3 else "greedy") == "noaux_tc",
        normalize_expert_weights=bool(config.get("norm_topk_prob", v3)),
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        yarn=yarn,
        max_positions=config["max_position_embeddings"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        initializer_range=config.get("initializer_range", 0.02),
        mtp_layers=config.get("num_nextn_predict_layers") or 0,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
