"""Dense models: queries, keys and values joined by query group, and an output layer tied to the embedding."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import convert, lay_out, to_hf, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.layer_specs import LayerSpec, canonical_names, keyed_tensors
from conversion.names import Split, hf_aliases, output_layer_name, parameters, possible_aliases, slice_shape
from conversion.rank_files import ShardsLayout
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from conversion.to_torch_dist import TorchDistTarget
from conversion.verify import check_aliases, verify
from megatron_ads.architecture import shape_from_config
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConfigError, ConversionError
from megatron_ads.layout import ParallelLayout, place_layers
from parity_tests.harness.dense_checkpoints import LLAMA, QWEN2
from parity_tests.harness.hf_checkpoints import bf16_checkpoint, hf_shapes, random_tensors, write_hf

TIED = QWEN2 | {"tie_word_embeddings": True}
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize("config", [QWEN2, TIED, LLAMA, LLAMA | {"attention_bias": True}])
def test_every_hf_tensor_belongs_to_exactly_one_parameter(config: dict) -> None:
    parts = [part for parameter in parameters(shape_from_config(config)).values() for part in parameter.parts]
    assert len({part.name for part in parts}) == len(parts)
    assert {part.name: part.shape for part in parts} == hf_shapes(config)


def _numbered(folder: Path) -> Path:
    """Write a Qwen2 of 4 query heads and 2 key-value heads of width 2 whose rows say where they come from.

    Queries are rows 0 to 7, keys 100 to 103, values 200 to 203; the biases are the same with the opposite sign.
    """
    config = QWEN2 | {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 2}
    tensors = random_tensors(config, torch.float32)
    for layer in range(2):
        for letter, first, rows in (("q", 0, 8), ("k", 100, 4), ("v", 200, 4)):
            numbers = torch.arange(first, first + rows, dtype=torch.float32)
            tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = numbers[:, None].repeat(1, 8)
            tensors[f"model.layers.{layer}.self_attn.{letter}_proj.bias"] = -numbers
    return write_hf(folder, config, tensors)


GROUPS = [[0, 1, 2, 3, 100, 101, 200, 201], [4, 5, 6, 7, 102, 103, 202, 203]]
"""Of each group its two query heads, its key head and its value head, all of two rows."""


def test_queries_keys_and_values_are_joined_group_by_group(tmp_path: Path) -> None:
    source = open_source(_numbered(tmp_path / "hf"))
    name = "decoder.layers.1.self_attention.linear_qkv"
    assert source.read(f"{name}.weight")[:, 5].tolist() == GROUPS[0] + GROUPS[1]
    assert source.read(f"{name}.bias").tolist() == [-row for row in GROUPS[0] + GROUPS[1]]


def test_a_tensor_parallel_rank_has_whole_groups(tmp_path: Path) -> None:
    to_shards(_numbered(tmp_path / "hf"), tmp_path / "shards", LayoutConfig(tp=2))
    for rank, group in enumerate(GROUPS):
        stored = load_file(tmp_path / f"shards/pp00-tp{rank}-ep00.safetensors")
        assert stored["decoder.layers.0.self_attention.linear_qkv.weight"][:, 0].tolist() == group
        assert stored["decoder.layers.0.self_attention.linear_qkv.bias"].tolist() == [-row for row in group]
        assert stored["decoder.layers.0.self_attention.linear_proj.weight"].shape == (8, 4)


@pytest.mark.parametrize("config", [TIED, LLAMA | {"attention_bias": True}], ids=["qwen2-tied", "llama"])
def test_shards_and_torch_dist_come_back_bit_for_bit(config: dict, tmp_path: Path) -> None:
    published = bf16_checkpoint(tmp_path / "hf", config, files=3)
    to_shards(published, tmp_path / "shards", LayoutConfig(tp=2, pp=2))
    convert(TorchDistTarget(open_source(tmp_path / "shards"), tmp_path / "dist"))
    to_hf(tmp_path / "dist", tmp_path / "back")
    before = {name: tensor for file in published.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() == hf_shapes(config).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for folder in ("shards", "dist", "back"):
        assert verify(published, tmp_path / folder).differences == ()


def test_an_export_in_fp8_quantises_the_projections_that_were_joined(tmp_path: Path) -> None:
    config = QWEN2 | {"hidden_size": 256, "intermediate_size": 384}
    to_shards(bf16_checkpoint(tmp_path / "hf", config), tmp_path / "shards", LayoutConfig(tp=2))
    to_hf(tmp_path / "shards", tmp_path / "fp8", dtype=ExportDtype.FP8)
    stored = load_file(tmp_path / "fp8/model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype is torch.float8_e4m3fn
    assert stored["model.layers.0.self_attn.q_proj.bias"].dtype is torch.bfloat16
    assert verify(tmp_path / "hf", tmp_path / "fp8", tolerance=0.05).differences == ()


def test_a_piece_of_a_joined_projection_that_was_changed_is_named(tmp_path: Path) -> None:
    published = bf16_checkpoint(tmp_path / "hf", QWEN2)
    other = shutil.copytree(published, tmp_path / "other")
    tensors = load_file(published / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][5, 7] += 1  # second row of group 1: heads have 4 rows
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (difference,) = verify(published, other).differences
    assert difference.name == "decoder.layers.2.self_attention.linear_qkv.weight"
    # A group is 4 heads of queries, one of keys and one of values: 24 rows. 24 + 16 + 1 = 41.
    assert difference.first_index == (41, 7)


def test_layouts_that_cut_a_group_are_refused_with_the_numbers() -> None:
    qkv = parameters(shape_from_config(QWEN2))["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert (qkv.split, qkv.shape, slice_shape(qkv, 2)) == (Split.ROWS, (48, 32), (24, 32))
    with pytest.raises(ConversionError, match=r"2 query groups cannot be split over layout\.tp = 4 ranks"):
        slice_shape(qkv, 4)
    with pytest.raises(ConfigError, match=r"model's 2 query groups cannot be cut into layout\.tp = 4 equal parts"):
        lay_out(shape_from_config(QWEN2), LayoutConfig(tp=4))
    one = shape_from_config(QWEN2 | {"num_key_value_heads": 1})
    with pytest.raises(ConversionError, match=r"1 query groups cannot be split"):
        slice_shape(parameters(one)["decoder.layers.0.self_attention.linear_qkv.bias"], 2)


@pytest.mark.parametrize("axis", ["ep", "etp"])
def test_a_model_without_experts_has_no_expert_parallelism(axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"layout\.{axis} is 2, but the model has no routed experts\. Set it to 1"):
        lay_out(shape_from_config(QWEN2), LayoutConfig(**{axis: 2}))


def test_a_tied_output_layer_is_the_embedding_on_the_first_and_last_stage() -> None:
    shape = shape_from_config(TIED)
    assert output_layer_name(shape) == EMBEDDING
    assert "output_layer.weight" not in parameters(shape)
    layout = ParallelLayout.smallest(pp=4)
    shards = ShardsLayout(shape=shape, layout=layout, placement=place_layers(shape, layout))
    holders = [
        file.pp for file in shards.rank_files() if EMBEDDING in [parameter.name for parameter in shards.owned(file)]
    ]
    assert holders == [0, 3]
    assert [slice_.owner for slice_ in shards.owners(parameters(shape)[EMBEDDING])] == [0]


def test_a_copy_of_a_tied_embedding_that_differs_is_found(tmp_path: Path) -> None:
    to_shards(bf16_checkpoint(tmp_path / "hf", TIED), tmp_path / "shards", LayoutConfig(pp=2))
    last = tmp_path / "shards/pp01-tp0-ep00.safetensors"
    tensors = load_file(last)
    tensors[EMBEDDING][3, 4] += 1
    save_file(tensors, last, metadata={"format": "pt"})
    found = verify(tmp_path / "hf", tmp_path / "shards").differences
    assert [(one.name, one.first_index) for one in found if one.name == EMBEDDING] == [(EMBEDDING, (3, 4))]


def test_a_tied_head_that_is_stored_all_the_same_is_carried(tmp_path: Path) -> None:
    shape, tensors = shape_from_config(TIED), random_tensors(TIED, torch.bfloat16)
    assert (hf_aliases(shape), possible_aliases(shape)) == ({}, {HEAD: EMBEDDING})
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
    published = write_hf(tmp_path / "hf", TIED, tensors)
    check_aliases(open_source(published))
    to_shards(published, tmp_path / "shards", LayoutConfig(pp=2))
    to_hf(tmp_path / "shards", tmp_path / "back")
    assert load_file(tmp_path / "back/model.safetensors").keys() == tensors.keys()
    assert verify(published, tmp_path / "back").differences == ()
    tensors[HEAD][0, 0] += 1
    with pytest.raises(DamagedCheckpointError, match=rf"{HEAD}.* differs from {EMBEDDING}"):
        check_aliases(open_source(write_hf(tmp_path / "other", TIED, tensors)))


@pytest.mark.parametrize(("config", "name"), [(QWEN2, HEAD), (QWEN2, "model.layers.3.self_attn.v_proj.bias")])
def test_a_tensor_too_few_is_named(config: dict, name: str, tmp_path: Path) -> None:
    tensors = random_tensors(config, torch.bfloat16)
    del tensors[name]
    with pytest.raises(DamagedCheckpointError, match=f"lacks 1 tensors.* first {name}"):
        open_source(write_hf(tmp_path / "hf", config, tensors))


def test_a_tensor_too_many_points_at_the_layers_and_not_at_experts(tmp_path: Path) -> None:
    tensors = random_tensors(QWEN2, torch.bfloat16) | {"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)}
    with pytest.raises(DamagedCheckpointError, match=r"layers\.4.*\. Check num_hidden_layers = 4 in config\.json\."):
        open_source(write_hf(tmp_path / "hf", QWEN2, tensors))


def test_biases_that_the_config_does_not_ask_for_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA | {"attention_bias": True}, torch.bfloat16)
    with pytest.raises(DamagedCheckpointError, match="attention_bias"):
        open_source(write_hf(tmp_path / "hf", LLAMA, tensors))


def test_transformer_engine_fuses_the_norms_into_the_projections() -> None:
    given = {"spec": LayerSpec.TE, "first_layer": 2, "local_experts": range(0)}
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.bias": "self_attention.linear_qkv.bias",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for fused, canonical in names.items():
        assert canonical_names(f"decoder.layers.1.{fused}", **given) == (f"decoder.layers.3.{canonical}",)
    keys = [tensor.key for tensor in keyed_tensors(parameters(shape_from_config(QWEN2)), LayerSpec.TE)]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in keys
