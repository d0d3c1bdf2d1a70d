"""What a DeepSeek-style model looks like: every number that decides its tensors and its arithmetic.

Read from a Hugging Face ``config.json``, as published or as transformers 5 writes it. Only what is understood is
accepted: a field that is unknown, unsupported or contradicts another one is an error that names it. Standard
library only.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError, require
from megatron_ads.json_fields import JsonFields

MODEL_TYPES = ("deepseek_v3", "kimi_k2", "deepseek_v2")


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnShape:
    """YaRN position scaling (arXiv:2309.00071)."""

    factor: float
    """How many times longer than ``original_max_positions`` the context became."""
    original_max_positions: int
    """Positions of the model before scaling."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a dimension keeps its frequency."""
    beta_slow: float = 1.0
    """Rotations below which a dimension is interpolated by ``factor``."""
    mscale: float = 1.0
    """Scales the attention temperature of the rotated part."""
    mscale_all_dim: float = 0.0
    """Scales the attention temperature of all of it; 0 is off."""


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
    """Rank of the joint low-rank projection of keys and values."""
    qk_nope_head_dim: int
    """Width of the part of a query or key head without positions."""
    qk_rope_head_dim: int
    """Width of the part with rotary positions."""
    v_head_dim: int
    """Width of a value head."""

    num_experts: int
    """Routed experts per MoE layer."""
    num_shared_experts: int
    """Shared experts per MoE layer, stored fused as one feed-forward of this many widths."""
    expert_ffn_size: int
    """Inner width of one routed expert."""
    experts_per_token: int
    """Routed experts a token is sent to."""
    num_expert_groups: int
    """Group-limited routing: groups the experts are divided into; 1 is no limit."""
    groups_per_token: int
    """Groups a token may choose from."""
    score_function: str
    """``sigmoid`` or ``softmax``."""
    has_expert_bias: bool
    """An FP32 ``e_score_correction_bias`` takes part in the selection (not in the weights)."""
    normalize_expert_weights: bool
    """Divide the weights of the chosen experts by their sum."""
    routed_scaling_factor: float
    """Multiplies the weights of the chosen experts."""

    rope_theta: float
    """Base of the rotary frequencies."""
    yarn: YarnShape | None
    """Position scaling; None is none."""
    max_positions: int
    """Longest sequence, in tokens."""
    rms_norm_eps: float
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights."""
    mtp_layers: int = 0
    """Multi-token-prediction layers stored behind the decoder layers; they are MoE layers."""
    tie_word_embeddings: bool = False
    """Embedding and output layer are one tensor; no model of this family does that."""

    def __post_init__(self) -> None:
        experts, groups, in_group = self.num_experts, self.num_expert_groups, self.num_experts // self.num_expert_groups
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary positions turn pairs: it must be even.",
        )
        require(
            self.first_dense_layers < self.num_layers,
            f"first_k_dense_replace = {self.first_dense_layers} leaves none of num_hidden_layers = {self.num_layers} "
            "with experts; a mixture-of-experts model is expected.",
        )
        require(experts % groups == 0, f"n_group = {groups} does not divide n_routed_experts = {experts}.")
        require(
            self.groups_per_token <= groups, f"topk_group = {self.groups_per_token} is more than n_group = {groups}."
        )
        reachable = self.groups_per_token * in_group
        require(
            self.experts_per_token <= reachable,
            f"num_experts_per_tok = {self.experts_per_token}, but a token reaches topk_group * n_routed_experts / "
            f"n_group = {self.groups_per_token} * {experts} / {groups} = {reachable} experts.",
        )
        require(
            groups == 1 or in_group >= self.experts_scored_per_group,
            f"n_routed_experts / n_group = {experts} / {groups} = {in_group} experts a group, but the best "
            f"{self.experts_scored_per_group} of a group decide its rank.",
        )

    @property
    def shared_ffn_size(self) -> int:
        """Inner width of the fused shared experts."""
        return self.num_shared_experts * self.expert_ffn_size

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def experts_scored_per_group(self) -> int:
        """Best experts whose scores are added to rank a group: 2 with a selection bias (V3), else 1 (V2).

        Source: DeepSeek-V3 (arXiv:2412.19437) section 2.1.2; DeepSeek-V2 (arXiv:2405.04434) section 2.2.2.
        """
        return 2 if self.has_expert_bias else 1

    def require_megatron_routing(self) -> None:
        """Refuse routing that Megatron-Core 0.16's ``topk_routing_with_score_function`` computes differently.

        Raises:
            ConfigError: Naming the fields of ``config.json``.
        """
        if not self.num_experts:
            return
        best, normalizes = self.experts_per_token // self.groups_per_token, self.score_function == "sigmoid"
        wanted = 2 if normalizes else 1
        require(
            self.num_expert_groups == 1 or best == wanted,
            f"num_experts_per_tok / topk_group is {self.experts_per_token} / {self.groups_per_token}: Megatron-Core "
            f"ranks expert groups by the sum of their best {best} scores, but this model does so by its best {wanted}. "
            "This routing is not supported.",
        )
        require(
            self.normalize_expert_weights == normalizes,
            f"norm_topk_prob is {self.normalize_expert_weights} with {self.score_function} scores; Megatron-Core "
            f"{'always' if normalizes else 'never'} normalises those. This routing is not supported.",
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (global, MTP layers counted on from ``num_layers``) has routed experts."""
        return layer >= self.first_dense_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Blocks:
    """How an FP8 checkpoint stores its matrices: e4m3 codes, one FP32 scale per block."""

    rows: int
    """Rows of a block; the last block of a matrix may have fewer."""
    columns: int
    """Columns of a block; the last may have fewer."""
    power_of_two_scales: bool
    """Scales are rounded up to powers of two (``scale_fmt: ue8m0``, DeepSeek-V3.1)."""


def read_model_shape(path: Path) -> ModelShape:
    """Read ``config.json``, given the file or the folder that holds it.

    Raises:
        ConfigError: If there is no such file, or it does not describe a supported model.
    """
    file = path / "config.json" if path.is_dir() else path
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ConfigError(f"{file} is not a file. Give a Hugging Face checkpoint folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: {path} is not a Hugging Face checkpoint folder.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error}); copy it again from the checkpoint's repository.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, not an object with the model's settings.")
    return shape_from_config(config, file=file)


def shape_from_config(config: Mapping[str, Any], *, file: Path | None = None) -> ModelShape:
    """Build a ModelShape from a parsed ``config.json``, of the published or the transformers-5 style.

    Raises:
        ConfigError: If a field is missing, unknown, unsupported or contradicts another one; it names ``file``.
    """
    try:
        return _shape_from_config(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}" if file else str(error)) from None


def _shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    fields = JsonFields(config)
    model_type = fields.choice("model_type", MODEL_TYPES)
    fields.require_present("q_lora_rank", "Set it to null for a full-rank query projection.")
    rope_theta, yarn = _read_rope(fields)
    shape = ModelShape(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        dense_ffn_size=fields.integer("intermediate_size"),
        first_dense_layers=fields.integer("first_k_dense_replace", minimum=0),
        q_lora_rank=fields.integer("q_lora_rank") if "q_lora_rank" in fields else None,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        num_experts=fields.integer("n_routed_experts"),
        num_shared_experts=fields.integer("n_shared_experts", 0, minimum=0),
        expert_ffn_size=fields.integer("moe_intermediate_size"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        **_read_routing(fields, v2=model_type == "deepseek_v2"),
        rope_theta=rope_theta,
        yarn=yarn,
        max_positions=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        initializer_range=fields.positive("initializer_range", 0.02),
        mtp_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )
    _expect_the_rest(fields, shape)
    fp8_blocks(config)
    if indexer := sorted(name for name in config if name.startswith("index_") and name in fields):
        raise ConfigError(
            f"{indexer[0]} = {config[indexer[0]]!r} is not a known field: it belongs to the sparse attention of "
            "DeepSeek-V3.2, which is not supported."
        )
    fields.refuse_unread(harmless=_HARMLESS)
    return shape


def _read_routing(fields: JsonFields, *, v2: bool) -> dict[str, Any]:
    """Return the routing fields of ModelShape. Greedy routing ignores the groups, so they are 1."""
    for name in () if v2 else ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"):
        fields.require_present(name, "It decides which experts a token reaches and how they are weighed.")
    method = fields.choice(
        "topk_method", ("greedy", "group_limited_greedy") if v2 else ("noaux_tc",), "greedy" if v2 else "noaux_tc"
    )
    score_function = "softmax" if v2 else "sigmoid"
    fields.expect("scoring_func", score_function, f"the routing of this model type is by {score_function}")
    if v2:
        # DeepSeek's code then skips the scaling factor, transformers skips the division.
        fields.expect("norm_topk_prob", False, "implementations of DeepSeek-V2 disagree about its meaning")
    groups, chosen = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    if method == "greedy":
        groups = chosen = 1
    return {
        "num_expert_groups": groups,
        "groups_per_token": chosen,
        "score_function": score_function,
        "has_expert_bias": method == "noaux_tc",
        "normalize_expert_weights": False if v2 else fields.flag("norm_topk_prob"),
        "routed_scaling_factor": fields.positive("routed_scaling_factor", 1.0),
    }


def _read_rope(fields: JsonFields) -> tuple[float, YarnShape | None]:
    """Return the rotary base and YaRN, of ``rope_parameters`` (transformers 5) or ``rope_scaling`` (published)."""
    theta = fields.positive("rope_theta", 10000.0)
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    require(not (new and old), "rope_parameters and rope_scaling are both there; keep the one that holds.")
    rope = new or old
    if rope is None:
        return theta, None
    inner = rope.positive("rope_theta", theta)
    require(
        inner == theta or "rope_theta" not in fields,
        f"rope_theta is {theta:g}, but {inner:g} inside the rope section. Keep one of them.",
    )
    yarn = _read_yarn(rope)
    rope.refuse_unread()
    return inner, yarn


def _read_yarn(rope: JsonFields) -> YarnShape | None:
    kinds = [rope.choice(name, ("default", "yarn")) for name in ("rope_type", "type") if name in rope]
    require(bool(kinds), "The rope section names no rope_type (or type); supported: default, yarn.")
    require(
        kinds[0] == kinds[-1],
        f"rope_type is {kinds[0]}, but type is {kinds[-1]}; they mean the same. Keep one of them.",
    )
    rope.expect("partial_rotary_factor", 1.0, "the rotary part has its own width, qk_rope_head_dim")
    if kinds[0] == "default":
        return None
    rope.expect("truncate", True, "the frequency ramp starts and ends at whole dimensions")
    _check_attention_factor(rope)
    return YarnShape(
        factor=rope.positive("factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        mscale=rope.number("mscale", 1.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
    )


def _check_attention_factor(rope: JsonFields) -> None:
    """Refuse the mscale settings that DeepSeek's code and transformers understand differently.

    Theirs is ``scale(mscale or 1) / scale(mscale_all_dim or 0)``; transformers does so only where both are given and
    not 0, and else takes ``scale(1)``.
    """
    factor, mscale, all_dim = rope.positive("factor"), rope.number("mscale", 1.0), rope.number("mscale_all_dim", 0.0)

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = "mscale" in rope and mscale and all_dim
    if not both and scale(mscale) != scale(1.0) * scale(all_dim):
        raise ConfigError(
            f"mscale = {mscale:g} with mscale_all_dim = {all_dim:g}: DeepSeek's code and transformers "
            "compute other attention factors from it. Give both, as in the published config.json."
        )


def _expect_the_rest(fields: JsonFields, shape: ModelShape) -> None:
    """Refuse what the implementation here does not do, and repetitions that contradict the shape."""
    fields.expect("attention_bias", False, "the attention projections have no biases")
    fields.expect("mlp_bias", False, "the feed-forward layers have no biases")
    fields.expect("attention_dropout", 0.0, "fine-tuning runs without dropout")
    fields.expect("hidden_act", "silu", "the feed-forward layers are SwiGLU")
    fields.expect("moe_layer_freq", 1, "every layer after the dense ones has experts")
    fields.expect("rope_interleave", True, "rotary pairs are stored interleaved")
    fields.expect("num_key_value_heads", shape.num_heads, "latent attention has as many key heads as query heads")
    fields.expect("qk_head_dim", shape.qk_head_dim, "it is qk_nope_head_dim + qk_rope_head_dim")
    fields.expect("head_dim", shape.qk_rope_head_dim, "it repeats qk_rope_head_dim")


def fp8_blocks(config: Mapping[str, Any]) -> Fp8Blocks | None:
    """Return how a checkpoint's FP8 matrices are stored; None if it is not quantized.

    Raises:
        ConfigError: If it is quantized in another way.
    """
    quantization = JsonFields(config).section("quantization_config")
    if quantization is None:
        return None
    quantization.choice("quant_method", ("fp8",))
    quantization.choice("fmt", ("e4m3",), "e4m3")
    quantization.choice("activation_scheme", ("dynamic",), "dynamic")
    scale_format = quantization.choice("scale_fmt", ("float", "ue8m0"), "float")
    blocks = config["quantization_config"].get("weight_block_size")
    require(
        isinstance(blocks, list)
        and len(blocks) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in blocks),
        f"quantization_config.weight_block_size is {blocks!r}; it must be two whole numbers, [128, 128] in DeepSeek's "
        "checkpoints.",
    )
    return Fp8Blocks(rows=blocks[0], columns=blocks[1], power_of_two_scales=scale_format == "ue8m0")


# Fields that say nothing about tensors or arithmetic of a forward pass: bookkeeping of transformers and of training.
_HARMLESS = frozenset((
    "_attn_implementation", "_name_or_path", "added_token_ids", "architectures", "auto_map", "aux_loss_alpha",
    "bos_token_id", "dtype", "eos_token_id", "ep_size", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "quantization_config", "return_dict", "router_aux_loss_coef", "seq_aux", "tokenizer_class",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
))  # fmt: skip
