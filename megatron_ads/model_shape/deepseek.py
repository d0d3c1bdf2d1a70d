"""The ``config.json`` of the DeepSeek family: latent attention and mixtures of experts."""

from typing import Any

from megatron_ads.json_fields import JsonFields
from megatron_ads.model_shape.records import LatentAttentionShape, ModelShape
from megatron_ads.model_shape.rope import read_rope, read_yarn

DEEPSEEK_TYPES = ("deepseek_v3", "kimi_k2", "deepseek_v2")


def read_deepseek(fields: JsonFields) -> ModelShape:
    model_type = fields.choice("model_type", DEEPSEEK_TYPES)
    fields.require_present("q_lora_rank", "Set it to null for a full-rank query projection.")
    rope_theta, yarn = read_rope(fields, {"yarn": read_yarn})
    attention = LatentAttentionShape(
        q_lora_rank=fields.integer("q_lora_rank") if "q_lora_rank" in fields else None,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    shape = ModelShape(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        dense_ffn_size=fields.integer("intermediate_size"),
        first_dense_layers=fields.integer("first_k_dense_replace", minimum=0),
        attention=attention,
        num_experts=fields.integer("n_routed_experts"),
        num_shared_experts=fields.integer("n_shared_experts", 0, minimum=0),
        expert_ffn_size=fields.integer("moe_intermediate_size"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        **_read_routing(fields, v2=model_type == "deepseek_v2"),
        rope_theta=rope_theta,
        rope_scaling=yarn,
        max_positions=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        initializer_range=fields.positive("initializer_range", 0.02),
        mtp_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )
    _expect_the_rest(fields, shape, attention)
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


def _expect_the_rest(fields: JsonFields, shape: ModelShape, attention: LatentAttentionShape) -> None:
    """Refuse what the implementation here does not do, and repetitions that contradict the shape."""
    fields.expect("attention_bias", False, "the attention projections have no biases")
    fields.expect("mlp_bias", False, "the feed-forward layers have no biases")
    fields.expect("attention_dropout", 0.0, "fine-tuning runs without dropout")
    fields.expect("hidden_act", "silu", "the feed-forward layers are SwiGLU")
    fields.expect("moe_layer_freq", 1, "every layer after the dense ones has experts")
    fields.expect("rope_interleave", True, "rotary pairs are stored interleaved")
    fields.expect("num_key_value_heads", shape.num_heads, "latent attention has as many key heads as query heads")
    fields.expect("qk_head_dim", attention.qk_head_dim, "it is qk_nope_head_dim + qk_rope_head_dim")
    fields.expect("head_dim", attention.qk_rope_head_dim, "it repeats qk_rope_head_dim")
