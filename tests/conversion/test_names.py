"""The name table against the tensors that the published checkpoints have."""

import pytest

from conversion.names import ParameterKind, Split, dimensions, hf_aliases, parameters, slice_shape
from megatron_ads.architecture import shape_from_config
from megatron_ads.errors import ConversionError
from parity_tests.harness.hf_checkpoints import EDGE, V2_LITE, V3, hf_shapes, is_fp8_weight
from tests.published import published


@pytest.mark.parametrize("config", [V3, V2_LITE, EDGE], ids=["v3", "v2-lite", "edge"])
def test_every_hf_tensor_belongs_to_exactly_one_parameter(config):
    shape = shape_from_config(config)
    parts = [part for parameter in parameters(shape).values() for part in parameter.parts]
    repeats = {name: parameters(shape)[canonical].shape for name, canonical in hf_aliases(shape).items()}
    assert len({part.name for part in parts}) == len(parts)
    assert {part.name: part.shape for part in parts} | repeats == hf_shapes(config)


def test_what_is_quantised_is_what_deepseek_publishes_in_fp8():
    for parameter in parameters(shape_from_config(V3)).values():
        for part in parameter.parts:
            assert (parameter.kind is ParameterKind.LINEAR) == is_fp8_weight(part.name)


@pytest.mark.parametrize(
    ("config", "weights", "values"),
    [
        # The index of the public repository: 46,183 weight tensors, 684,489,845,504 values, repeats included.
        ("deepseek_r1", 46_183, 684_489_845_504),
        ("deepseek_r1_transformers5", 46_183, 684_489_845_504),
        # Half the total_size of the public index, which is BF16: 31,412,968,448 bytes.
        ("deepseek_v2_lite", 5_291, 15_706_484_224),
    ],
)
def test_a_published_repository_is_covered_to_the_last_value(config, weights, values):
    shape = shape_from_config(published(config))
    model = parameters(shape)
    shapes = [part.shape for parameter in model.values() for part in parameter.parts]
    shapes += [model[canonical].shape for canonical in hf_aliases(shape).values()]
    assert len(shapes) == weights
    assert sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes) == values


def test_the_mtp_layer_follows_the_decoder_layers_in_hf_and_stands_apart_in_megatron():
    model = parameters(shape_from_config(V3))  # 4 decoder layers, so HF layer 4 is MTP layer 0
    down = model["mtp.layers.0.transformer_layer.self_attention.linear_kv_down_proj.weight"]
    assert [part.name for part in down.parts] == ["model.layers.4.self_attn.kv_a_proj_with_mqa.weight"]
    assert model["mtp.layers.0.final_layernorm.weight"].parts[0].name == "model.layers.4.shared_head.norm.weight"
    assert hf_aliases(shape_from_config(V3)) == {
        "model.layers.4.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.layers.4.shared_head.head.weight": "output_layer.weight",
    }


def test_gate_comes_before_up():
    fc1 = parameters(shape_from_config(V3))["decoder.layers.2.mlp.experts.linear_fc1.weight7"]
    assert [part.name.split(".")[-2] for part in fc1.parts] == ["gate_proj", "up_proj"]
    assert fc1.split is Split.GATE_UP
    assert fc1.shape == (16, 16)  # gate and up of 8 rows each, hidden 16
    assert fc1.expert == 7


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("embedding.word_embeddings.weight", 2, (32, 16)),
        ("decoder.layers.0.self_attention.linear_proj.weight", 4, (16, 8)),
        ("decoder.layers.0.self_attention.linear_q_down_proj.weight", 4, (12, 16)),
        ("decoder.layers.0.mlp.linear_fc1.weight", 4, (16, 16)),
        ("decoder.final_layernorm.weight", 4, (16,)),
    ],
)
def test_slices_have_the_shapes_of_tensor_parallel_ranks(name, size, expected):
    assert slice_shape(parameters(shape_from_config(V3))[name], size) == expected


def test_a_split_that_leaves_a_remainder_is_refused_with_the_numbers():
    fc1 = parameters(shape_from_config(V3))["decoder.layers.2.mlp.experts.linear_fc1.weight0"]
    with pytest.raises(ConversionError, match=r"layout\.etp = 3 ranks: 8 is not a multiple of 3"):
        slice_shape(fc1, 3)


def test_tied_embeddings_are_refused():
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        parameters(shape_from_config(V3 | {"tie_word_embeddings": True}))


def test_dimensions_of_r1():
    sizes = dimensions(shape_from_config(published("deepseek_r1")))
    assert sizes["kv_down"] == 576  # 512 + 64: four and a half blocks of 128
    assert sizes["heads_qk"] == 24_576  # 128 heads of 128 + 64
