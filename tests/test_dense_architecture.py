"""Published configs of Qwen2 and Llama are read number by number, and what cannot be carried out is refused by name."""

import json
from typing import Any

import pytest

from conversion.names import parameters
from megatron_ads.architecture import GroupedQueryShape, Llama3Shape, shape_from_config
from megatron_ads.errors import ConfigError
from tests.published import published

QWEN = "deepseek_r1_distill_qwen_7b"
LLAMA = "deepseek_r1_distill_llama_8b"


def test_the_distilled_qwen_has_the_numbers_of_its_model_card() -> None:
    shape = shape_from_config(published(QWEN))
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.dense_ffn_size) == (28, 3584, 28, 18944)
    assert shape.attention == GroupedQueryShape(num_groups=4, head_dim=128, qkv_bias=True, output_bias=False)
    assert (shape.rope_theta, shape.rope_scaling, shape.rms_norm_eps) == (1e4, None, 1e-6)
    assert (shape.num_experts, shape.first_dense_layers, shape.tie_word_embeddings) == (0, 28, False)
    # arXiv:2412.15115, table 1: 28 layers, 28 query heads, 4 key-value heads; the hub counts 7,615,616,512 parameters.
    assert sum(_elements(parameter.shape) for parameter in parameters(shape).values()) == 7_615_616_512


def test_the_distilled_llama_has_the_numbers_of_its_model_card() -> None:
    shape = shape_from_config(published(LLAMA))
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.dense_ffn_size) == (32, 4096, 32, 14336)
    assert shape.attention == GroupedQueryShape(num_groups=8, head_dim=128, qkv_bias=False, output_bias=False)
    assert shape.rope_scaling == Llama3Shape(
        factor=8.0, original_max_positions=8192, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    # arXiv:2407.21783, table 3; the hub counts 8,030,261,248 parameters.
    assert sum(_elements(parameter.shape) for parameter in parameters(shape).values()) == 8_030_261_248


def _elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@pytest.mark.parametrize("name", [QWEN, LLAMA])
def test_what_the_installed_transformers_writes_is_read(name: str) -> None:
    from transformers import LlamaConfig, Qwen2Config

    kind = Qwen2Config if name == QWEN else LlamaConfig
    written = json.loads(kind(**published(name)).to_json_string())
    assert "rope_parameters" in written
    assert shape_from_config(written) == shape_from_config(published(name))


def test_biases_of_llama_are_those_of_all_four_projections() -> None:
    attention = shape_from_config(published(LLAMA, attention_bias=True)).attention
    assert isinstance(attention, GroupedQueryShape)
    assert (attention.qkv_bias, attention.output_bias) == (True, True)


def test_heads_may_have_another_width_than_the_hidden_state_divided_by_them() -> None:
    assert shape_from_config(published(LLAMA, head_dim=64)).attention.qk_head_dim == 64


def test_a_sliding_window_that_no_layer_has_changes_nothing() -> None:
    plain = shape_from_config(published(QWEN))
    assert shape_from_config(published(QWEN, use_sliding_window=True, max_window_layers=28)) == plain
    assert shape_from_config(published(QWEN, sliding_window=None, max_window_layers=...)) == plain


LLAMA3 = published(LLAMA)["rope_scaling"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (QWEN, {"use_sliding_window": True, "max_window_layers": 21}, "from max_window_layers = 21 on .*not supported"),
        (QWEN, {"layer_types": ["sliding_attention"] * 28}, "layer_types has 'sliding_attention', but"),
        (QWEN, {"layer_types": [None]}, "layer_types holds 'None'; it must be a list of texts"),
        (QWEN, {"use_mrope": True}, "use_mrope is True"),
        (QWEN, {"attention_bias": False}, "attention_bias is False, but the projections of Qwen2"),
        (QWEN, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"type is 'yarn'; supported: default, llama3"),
        (QWEN, {"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide num_attention_heads = 28"),
        (QWEN, {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        (QWEN, {"hidden_size": 3585}, "num_attention_heads = 28 does not divide hidden_size = 3585"),
        (QWEN, {"head_dim": 127}, "head_dim is 127; .*must be even"),
        (QWEN, {"qk_norm": True}, "qk_norm = True is not a known field"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True, but the feed-forward layers have no biases"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp is 2"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_type is 'linear'; supported"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor = 1 is not below"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"beta_fast": 32}}, r"rope_scaling\.beta_fast = 32 is not a known field"),
    ],
)
def test_what_is_not_supported_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_config(published(name, **changes))
