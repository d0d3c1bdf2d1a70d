"""Published config.json files are read number by number, and anything not understood is refused by name.

The published values of the models that the project ships are in ``conversion/published``; ``fixtures/configs`` holds
those of Kimi K2, and R1's as transformers 5 writes them.
"""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from conversion.published_models import published_file, published_models
from megatron_ads.architecture import (
    Fp8Blocks,
    LatentAttentionShape,
    YarnShape,
    fp8_blocks,
    read_model_shape,
    shape_from_config,
)
from megatron_ads.errors import ConfigError
from tests.published import CONFIGS, published

# ---- what is read ----


def test_every_published_config_is_read() -> None:
    files = [*CONFIGS.glob("*.json"), *map(published_file, published_models())]
    assert len(files) == 7
    for file in files:
        assert read_model_shape(file).num_layers in (27, 28, 32, 61)


def test_r1_has_the_numbers_of_its_paper() -> None:
    # DeepSeek-V3 (arXiv:2412.19437), section 4.2: 61 layers, 7168 wide, 128 heads, ranks 512 and 1536, 3 dense layers,
    # 1 shared and 256 routed experts of width 2048, 8 per token from at most 4 of 8 nodes, one MTP layer.
    shape = shape_from_config(published("deepseek_r1"))
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.first_dense_layers) == (61, 7168, 128, 3)
    attention = shape.attention
    assert isinstance(attention, LatentAttentionShape)
    assert (attention.kv_lora_rank, attention.q_lora_rank) == (512, 1536)
    assert (attention.qk_head_dim, attention.v_head_dim) == (192, 128)
    assert (shape.num_shared_experts, shape.num_experts, shape.expert_ffn_size) == (1, 256, 2048)
    assert (shape.experts_per_token, shape.groups_per_token, shape.num_expert_groups) == (8, 4, 8)
    assert (shape.score_function, shape.has_expert_bias, shape.experts_scored_per_group) == ("sigmoid", True, 2)
    assert (shape.routed_scaling_factor, shape.normalize_expert_weights, shape.mtp_layers) == (2.5, True, 1)
    assert shape.rope_scaling == YarnShape(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
    assert [layer for layer in range(62) if not shape.is_moe_layer(layer)] == [0, 1, 2]


def test_the_transformers_5_style_means_the_same() -> None:
    assert read_model_shape(CONFIGS / "deepseek_r1_transformers5.json") == read_model_shape(
        published_file("deepseek_r1")
    )


@pytest.mark.parametrize("name", ["deepseek_r1", "deepseek_v2_lite", "moonlight_16b_a3b"])
def test_what_the_installed_transformers_writes_is_read(name: str) -> None:
    from transformers import DeepseekV2Config, DeepseekV3Config

    kind = DeepseekV2Config if name == "deepseek_v2_lite" else DeepseekV3Config
    # Quantization and remote code aside: those two need more than the config to be written.
    written = json.loads(kind(**published(name, quantization_config=..., auto_map=...)).to_json_string())
    assert "rope_scaling" not in written
    assert shape_from_config(written) == shape_from_config(published(name))


def test_v2_lite_routes_by_softmax_without_groups_and_has_no_query_rank() -> None:
    shape = shape_from_config(published("deepseek_v2_lite"))
    assert isinstance(shape.attention, LatentAttentionShape)
    assert (shape.attention.q_lora_rank, shape.score_function, shape.has_expert_bias) == (None, "softmax", False)
    assert (shape.num_expert_groups, shape.groups_per_token, shape.shared_ffn_size) == (1, 1, 2816)
    assert (shape.normalize_expert_weights, shape.mtp_layers) == (False, 0)
    assert isinstance(shape.rope_scaling, YarnShape)
    assert shape.rope_scaling.mscale == 0.707


def test_greedy_routing_ignores_groups_and_group_limited_routing_keeps_them() -> None:
    grouped = {"n_group": 8, "topk_group": 3}
    greedy = shape_from_config(published("deepseek_v2_lite", **grouped))
    limited = shape_from_config(published("deepseek_v2_lite", **grouped, topk_method="group_limited_greedy"))
    assert (greedy.num_expert_groups, greedy.groups_per_token) == (1, 1)
    assert (limited.num_expert_groups, limited.groups_per_token, limited.experts_scored_per_group) == (8, 3, 1)


def test_moonlight_has_no_position_scaling() -> None:
    shape = shape_from_config(published("moonlight_16b_a3b"))
    assert (shape.rope_scaling, shape.rope_theta, shape.rms_norm_eps, shape.max_positions) == (
        None,
        50000.0,
        1e-5,
        8192,
    )
    assert isinstance(shape.attention, LatentAttentionShape)
    assert (shape.attention.q_lora_rank, shape.has_expert_bias, shape.routed_scaling_factor) == (None, True, 2.446)


def test_kimi_k2_turns_every_dimension_at_one_rotation() -> None:
    shape = shape_from_config(published("kimi_k2_instruct"))
    assert isinstance(shape.rope_scaling, YarnShape)
    assert (shape.rope_scaling.beta_fast, shape.rope_scaling.beta_slow, shape.rope_scaling.factor) == (1.0, 1.0, 32.0)
    assert (shape.num_heads, shape.num_experts, shape.first_dense_layers, shape.mtp_layers) == (64, 384, 1, 0)


def test_a_default_rope_section_is_no_scaling() -> None:
    config = published(
        "deepseek_r1", rope_scaling=..., rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    assert (shape_from_config(config).rope_theta, shape_from_config(config).rope_scaling) == (5e5, None)


def test_a_folder_is_read_by_the_config_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published("moonlight_16b_a3b")))
    assert read_model_shape(tmp_path) == read_model_shape(published_file("moonlight_16b_a3b"))


# ---- what is refused ----

UNSUPPORTED = [
    ({"attention_bias": True}, r"attention_bias is True, but .*only False"),
    ({"mlp_bias": True}, r"mlp_bias is True"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', but .*only 'silu'"),
    ({"moe_layer_freq": 2}, r"moe_layer_freq is 2, but .*only 1"),
    ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
    ({"rope_interleave": False}, r"rope_interleave is False"),
    ({"model_type": "qwen3"}, r"model_type is 'qwen3'; supported: deepseek_v3, kimi_k2, deepseek_v2, qwen2, llama"),
    ({"model_type": "deepseek_v32"}, r"model_type is 'deepseek_v32'; supported"),
    ({"scoring_func": "softmax"}, r"scoring_func is 'softmax', but .*only 'sigmoid'"),
    ({"topk_method": "greedy"}, r"topk_method is 'greedy'; supported: noaux_tc"),
    ({"index_topk": 2048}, r"index_topk = 2048 is not a known field"),
    ({"n_routed_expert": 256}, r"n_routed_expert = 256 is not a known field\. Did you mean n_routed_experts\?"),
]

CONTRADICTORY = [
    ({"num_key_value_heads": 8}, r"num_key_value_heads is 8, but .*only 128"),
    ({"qk_head_dim": 128}, r"qk_head_dim is 128, but .*only 192"),
    ({"head_dim": 128}, r"head_dim is 128, but it repeats qk_rope_head_dim: only 64"),
    ({"n_group": 7}, r"n_group = 7 does not divide n_routed_experts = 256"),
    ({"topk_group": 9}, r"topk_group = 9 is more than n_group = 8"),
    ({"num_experts_per_tok": 129}, r"num_experts_per_tok = 129, but .* 4 \* 256 / 8 = 128 experts"),
    ({"n_group": 256, "topk_group": 8}, r"256 / 256 = 1 experts a group, but the best 2"),
    ({"first_k_dense_replace": 61}, r"first_k_dense_replace = 61 leaves none of num_hidden_layers = 61"),
    ({"qk_rope_head_dim": 63}, r"qk_rope_head_dim is 63; .*must be even"),
    ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters and rope_scaling are both there"),
]

MALFORMED = [
    ({"hidden_size": ...}, r"hidden_size is missing; it must be a whole number"),
    ({"q_lora_rank": ...}, r"q_lora_rank is missing\. Set it to null"),
    ({"n_group": ...}, r"n_group is missing\. It decides"),
    ({"model_type": ...}, r"model_type is missing; it must be one of deepseek_v3"),
    ({"hidden_size": "7168"}, r"hidden_size is '7168'; it must be a whole number"),
    ({"hidden_size": 7168.0}, r"hidden_size is 7168\.0; it must be a whole number"),
    ({"hidden_size": True}, r"hidden_size is True; it must be a whole number"),
    ({"num_hidden_layers": 0}, r"num_hidden_layers is 0; it must be at least 1"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps is 0; it must be above 0"),
    ({"routed_scaling_factor": float("nan")}, r"routed_scaling_factor is nan; it must be finite"),
    ({"norm_topk_prob": 1}, r"norm_topk_prob is 1; it must be true or false"),
    ({"rope_scaling": "yarn"}, r"rope_scaling is 'yarn'; it must be an object"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED + CONTRADICTORY + MALFORMED)
def test_a_config_that_is_not_understood_is_refused_by_field_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_config(published("deepseek_r1", **changes))


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def test_mscales_that_all_implementations_understand_alike_are_read() -> None:
    for mscales in ({}, {"mscale": 1.0}, {"mscale": 0.707, "mscale_all_dim": 0.9}):
        assert shape_from_config(published("deepseek_r1", rope_scaling=YARN | mscales)).rope_scaling is not None


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({**YARN, "type": "dynamic"}, r"rope_scaling\.type is 'dynamic'; supported: default, yarn"),
        ({**YARN, "rope_type": "default"}, r"rope_type is default, but type is yarn"),
        ({**YARN, "type": ...}, r"names no rope_type"),
        ({**YARN, "factor": ...}, r"rope_scaling\.factor is missing"),
        ({**YARN, "mscale": 0.707}, r"mscale = 0\.707 with mscale_all_dim = 0: DeepSeek's code and transformers"),
        ({**YARN, "mscale_all_dim": 1.0}, r"mscale = 1 with mscale_all_dim = 1: DeepSeek's code and transformers"),
        ({**YARN, "mscale": 0, "mscale_all_dim": 1.0}, r"mscale = 0 with mscale_all_dim = 1: DeepSeek's code"),
        ({**YARN, "mscale": 0.707, "mscale_all_dim": 0}, r"mscale = 0\.707 with mscale_all_dim = 0: DeepSeek's code"),
        ({**YARN, "factor": -1}, r"rope_scaling\.factor is -1; it must be above 0"),
        ({**YARN, "short_factor": [1.0]}, r"rope_scaling\.short_factor = \[1\.0\] is not a known field"),
        ({**YARN, "beta_fas": 32}, r"Did you mean rope_scaling\.beta_fast\?"),
        ({**YARN, "truncate": False}, r"rope_scaling\.truncate is False"),
        ({**YARN, "rope_theta": 20000}, r"rope_theta is 10000, but 20000 inside the rope section"),
    ],
)
def test_a_rope_section_that_is_not_understood_is_refused(rope: dict[str, Any], message: str) -> None:
    section = {key: value for key, value in rope.items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        shape_from_config(published("deepseek_r1", rope_scaling=section))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, r"scoring_func is 'sigmoid', but .*only 'softmax'"),
        ({"norm_topk_prob": True}, r"norm_topk_prob is True, but .*disagree"),
        ({"topk_method": "noaux_tc"}, r"topk_method is 'noaux_tc'; supported: greedy, group_limited_greedy"),
        ({"topk_method": "group_limited_greedy", "n_group": 5}, r"n_group = 5 does not divide n_routed_experts = 64"),
    ],
)
def test_v2_routing_that_is_not_understood_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_config(published("deepseek_v2_lite", **changes))


def test_a_shape_made_by_hand_is_checked_too() -> None:
    shape = shape_from_config(published("deepseek_r1"))
    with pytest.raises(ConfigError, match="n_group = 3 does not divide"):
        replace(shape, num_expert_groups=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "holds a list"), ("{}", "model_type is missing")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.json.*{message}"):
        read_model_shape(tmp_path)


def test_bookkeeping_fields_and_nulls_change_nothing() -> None:
    plain = shape_from_config(published("deepseek_r1"))
    assert plain == shape_from_config(
        published("deepseek_r1", eos_token_id=[1, 2], torch_dtype="float32", use_cache=False, index_topk=None)
    )


def test_every_field_of_the_shape_follows_the_config() -> None:
    # A changed number in config.json must arrive: no field of ModelShape is a constant in disguise.
    changes = {
        "model_type": "kimi_k2", "vocab_size": 1, "hidden_size": 2, "num_hidden_layers": 30, "num_attention_heads": 5,
        "num_key_value_heads": 5, "intermediate_size": 6, "first_k_dense_replace": 7, "q_lora_rank": 8,
        "kv_lora_rank": 9, "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 13, "n_routed_experts": 15,
        "n_shared_experts": 2, "moe_intermediate_size": 14, "num_experts_per_tok": 3, "n_group": 5, "topk_group": 2,
        "norm_topk_prob": False, "routed_scaling_factor": 1.5, "rope_theta": 16, "rope_scaling": None,
        "max_position_embeddings": 17, "rms_norm_eps": 1e-3, "initializer_range": 0.5, "num_nextn_predict_layers": 2,
        "tie_word_embeddings": True,
    }  # fmt: skip
    before, after = shape_from_config(published("deepseek_r1")), shape_from_config(published("deepseek_r1", **changes))
    unchanged = [
        field.name
        for a, b in ((before, after), (before.attention, after.attention))
        for field in fields(a)
        if getattr(a, field.name) == getattr(b, field.name)
    ]
    assert unchanged == ["score_function", "has_expert_bias"]  # decided by the model type; V2 has the other values


# ---- FP8 ----


def test_deepseeks_fp8_blocks_are_recognised() -> None:
    expected = Fp8Blocks(rows=128, columns=128, power_of_two_scales=False)
    assert fp8_blocks(published("deepseek_r1")) == expected
    assert fp8_blocks(published("deepseek_v2_lite")) is None
    ue8m0 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    assert fp8_blocks(published("deepseek_r1", quantization_config=ue8m0)) == replace(
        expected, power_of_two_scales=True
    )


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "compressed-tensors"}, r"quant_method is 'compressed-tensors'; supported: fp8"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, r"fmt is 'e5m2'; supported: e4m3"),
        ({"quant_method": "fp8"}, r"weight_block_size is None; it must be two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 10**30]}, r"weight_block_size is \[128, 1000"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
            "activation_scheme is 'static'",
        ),
    ],
)
def test_another_quantization_is_refused(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_config\.{message}"):
        shape_from_config(published("deepseek_r1", quantization_config=quantization))
