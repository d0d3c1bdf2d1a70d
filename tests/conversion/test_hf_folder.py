"""A Hugging Face folder that contradicts itself or its config is refused, with the tensor and the numbers named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import to_shards
from conversion.errors import DamagedCheckpointError
from conversion.hf_folder import open_hf_folder
from conversion.sources import open_source
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConversionError
from parity_tests.harness.hf_checkpoints import (
    EDGE,
    V3,
    bf16_checkpoint,
    fp8_checkpoint,
    random_tensors,
    to_fp8,
    write_hf,
)


def rewritten(folder: Path, change) -> Path:
    """Apply ``change`` to the tensors of a one-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.3.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"lacks 1 tensors .* first {NORM}"),
        (lambda t: t.update({"model.layers.9.x.weight": torch.ones(1)}), r"no place for, first model\.layers\.9\.x"),
        (lambda t: t.update({NORM: torch.ones(17).bfloat16()}), r"shape \(17,\), but config\.json gives \(16,\)"),
        (lambda t: t.update({NORM: torch.ones(16, dtype=torch.int64)}), r"is torch\.int64"),
        (lambda t: t.update({NORM + "_scale_inv": torch.ones(1, 1)}), r"is torch\.bfloat16 but has block scales"),
        (lambda t: t.update({DOWN: t[DOWN].float().to(torch.float8_e4m3fn)}), r"is FP8 without block scales"),
    ],
    ids=["missing", "extra", "shape", "dtype", "scales without fp8", "fp8 without scales"],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
    folder = rewritten(bf16_checkpoint(tmp_path / "hf"), change)
    with pytest.raises(DamagedCheckpointError, match=message):
        open_hf_folder(folder)


def test_scales_of_another_block_size(tmp_path):
    tensors = to_fp8(random_tensors(EDGE, torch.bfloat16))
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"  # 192 x 320: 2 x 3 blocks
    tensors[name] = torch.ones(3, 2)
    with pytest.raises(DamagedCheckpointError, match=r"shape \(3, 2\); .* need float32 of \(2, 3\)"):
        open_hf_folder(write_hf(tmp_path / "hf", EDGE, tensors))


def test_another_block_size_is_read_when_the_config_names_it(tmp_path):
    folder = fp8_checkpoint(tmp_path / "hf", EDGE, files=1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(config))
    wide = "model.layers.0.mlp.up_proj.weight"  # 320 x 192: 5 x 3 blocks of 64

    def rescale(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            rows, columns = tensors[name.removesuffix("_scale_inv")].shape
            tensors[name] = torch.full((-(-rows // 64), -(-columns // 64)), 0.5)
        tensors[wide + "_scale_inv"] = torch.arange(15.0).view(5, 3)

    source = open_source(rewritten(folder, rescale))
    codes = load_file(folder / "model.safetensors")[wide].float()
    expected = (codes * torch.arange(15.0).view(5, 3).repeat_interleave(64, 0).repeat_interleave(64, 1)).bfloat16()
    assert torch.equal(source.read("decoder.layers.0.mlp.linear_fc1.weight")[320:], expected)


def test_scales_that_are_not_finite(tmp_path):
    tensors = to_fp8(random_tensors(EDGE, torch.bfloat16))
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][1, 1] = float("inf")
    source = write_hf(tmp_path / "hf", EDGE, tensors)
    with pytest.raises(DamagedCheckpointError, match="not all finite"):
        to_shards(source, tmp_path / "shards", LayoutConfig())


def test_a_repeat_that_differs_from_what_it_repeats(tmp_path):
    tensors = random_tensors(V3, torch.bfloat16)
    tensors["model.layers.4.shared_head.head.weight"][0, 0] += 1
    source = write_hf(tmp_path / "hf", V3, tensors)
    with pytest.raises(DamagedCheckpointError, match=r"shared_head\.head\.weight .* differs from output_layer"):
        to_shards(source, tmp_path / "shards", LayoutConfig())
    assert not (tmp_path / "shards").exists()


def test_an_index_that_names_a_file_that_is_not_there(tmp_path):
    folder = bf16_checkpoint(tmp_path / "hf", files=2)
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        open_hf_folder(folder)


def test_a_tensor_in_two_files(tmp_path):
    folder = bf16_checkpoint(tmp_path / "hf", files=2)
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second) | {"lm_head.weight": load_file(first)["lm_head.weight"]}
    save_file(tensors, second, metadata={"format": "pt"})
    with pytest.raises(DamagedCheckpointError, match=r"holds lm_head\.weight, which .* places in"):
        open_hf_folder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_cannot_be_read(tmp_path, text):
    folder = bf16_checkpoint(tmp_path / "hf", files=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"index\.json (is not JSON|holds a list|has no weight_map)"):
        open_hf_folder(folder)


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_config_that_is_no_object(tmp_path, text):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / "config.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"config\.json (is not JSON|holds a list)"):
        open_hf_folder(folder)


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts"])
def test_a_config_of_absurd_size_is_refused_at_once(tmp_path, field):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(V3 | {field: 10**9}))
    with pytest.raises(DamagedCheckpointError, match=rf"147 tensors, too few for .*{field} = 1000000000"):
        open_hf_folder(folder)


def test_what_the_system_refuses_to_read_is_named(tmp_path):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read or written \(Is a directory\)"):
        open_source(folder)
