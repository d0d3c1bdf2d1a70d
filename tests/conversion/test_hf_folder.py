"""A Hugging Face folder that contradicts itself or its config is refused, with the tensor and the numbers named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import convert, to_hf, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.hf_folder import open_hf_folder
from conversion.names import parameters
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from conversion.to_torch_dist import TorchDistTarget
from conversion.verify import verify
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConfigError, ConversionError
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


COUNTS = ("num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers")


@pytest.mark.parametrize("field", COUNTS)
def test_a_config_of_absurd_size_is_refused_at_once(tmp_path, field):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(V3 | {field: 10**9}))
    with pytest.raises(DamagedCheckpointError, match=rf"147 tensors, too few for .*{field} = 1000000000"):
        open_hf_folder(folder)


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("kind", ["shards", "dist"])
def test_an_absurd_size_in_a_converted_checkpoint_is_refused_at_once(tmp_path, kind, field):
    source = open_source(bf16_checkpoint(tmp_path / "hf"))
    if kind == "shards":
        to_shards(source.path, tmp_path / kind, LayoutConfig())
    else:
        convert(TorchDistTarget(source, tmp_path / kind))
    file = tmp_path / kind / ("manifest.json" if kind == "shards" else "hf/config.json")
    content = json.loads(file.read_text())
    (content["config"] if kind == "shards" else content)[field] = 10**9
    file.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=r"too few for its layout|too few for the|make over 1,000,000"):
        open_source(tmp_path / kind)


@pytest.mark.parametrize("field", ["rope_theta", "vocab_size", "rms_norm_eps"])
def test_a_number_of_400_digits_is_refused_in_one_line_that_names_the_file(tmp_path, field):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(V3 | {field: 10**400}))
    with pytest.raises(ConfigError, match=rf"config\.json: {field} is 10{{39}}; it must be") as caught:
        open_hf_folder(folder)
    assert len(str(caught.value)) < 250


FUSED = "model.layers.2.mlp.experts.gate_up_proj"


def renamed(old: str, new: str):
    def change(tensors):
        for name in list(tensors):
            if re.search(old, name):
                tensors[re.sub(old, new, name)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed(r"experts\.\d+\.gate_proj\.weight", "experts.gate_up_proj"),
            r"lacks .* holds .* fused.*original_format",
        ),
        (renamed("^", "base_model.model."), r"first base_model\.model\.lm_head\.weight\. .*PEFT.*merge_and_unload"),
        (renamed(r"o_proj\.weight", "o_proj.base_layer.weight"), "PEFT"),
        (renamed("^", "language_model."), "multimodal"),
        (renamed("^model", "model.language_model"), "multimodal"),
        (renamed("^model\\.", ""), "lacks .* holds .* save the outer one"),
        (renamed("^", "module."), "wrapped"),
        (renamed("o_proj.weight", "o_proj.weight_packed"), "quantized by another tool"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}), "quantized by another tool"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(16)}), "have biases"),
        (lambda t: t.pop("lm_head.weight"), "tied to the embedding"),
        (renamed("e_score_correction_bias", "nothing"), "Its router has no bias"),
    ],
)
def test_other_names_are_told_together_with_their_likely_cause(tmp_path, change, message):
    folder = rewritten(bf16_checkpoint(tmp_path / "hf"), change)
    with pytest.raises(DamagedCheckpointError, match=message):
        open_hf_folder(folder)


def test_fused_experts_are_named_where_there_are_too_few_tensors(tmp_path):
    config = V3 | {"n_routed_experts": 64, "n_group": 1, "topk_group": 1}
    tensors = {name: tensor for name, tensor in random_tensors(V3, torch.bfloat16).items() if ".experts." not in name}
    folder = write_hf(tmp_path / "hf", config, tensors | {FUSED: torch.zeros(64, 16, 16).bfloat16()})
    with pytest.raises(DamagedCheckpointError, match=r"too few for .*fused"):
        open_hf_folder(folder)


@pytest.mark.parametrize("stray", ["model.safetensors", "model-00003-of-00003.safetensors"])
def test_two_hugging_face_checkpoints_in_one_folder(tmp_path, stray):
    folder = bf16_checkpoint(tmp_path / "hf", files=2)
    save_file({"lm_head.weight": torch.zeros(64, 16).bfloat16()}, folder / stray)
    with pytest.raises(DamagedCheckpointError, match=rf"two checkpoints: .* not {stray}"):
        open_source(folder)


def test_a_checkpoint_among_the_files_of_another_format(tmp_path):
    source = bf16_checkpoint(tmp_path / "hf")
    to_shards(source, tmp_path / "shards", LayoutConfig())
    shutil.copy(tmp_path / "shards/manifest.json", source)
    with pytest.raises(DamagedCheckpointError, match="two checkpoints, a shards folder and a Hugging Face folder"):
        open_source(source)
    for foreign in ('{"format": "chrome extension"}', "[]", "{"):
        (source / "manifest.json").write_text(foreign)
        assert open_source(source).kind == "Hugging Face folder"
    (source / "manifest.json").unlink()
    (source / "manifest.json").mkdir()
    to_shards(source, tmp_path / "again", LayoutConfig())
    assert (tmp_path / "again/manifest.json").is_file()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_called_that(tmp_path, file):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n")
    with pytest.raises(DamagedCheckpointError, match="Git LFS pointer: run git lfs pull"):
        open_source(folder)


def test_files_without_their_index_are_told_from_no_checkpoint(tmp_path):
    folder = bf16_checkpoint(tmp_path / "hf", files=2)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConversionError, match=r"holds 2 safetensors files, but neither .* Copy the index too"):
        open_source(folder)


BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [NORM, DOWN, "model.layers.2.mlp.gate.e_score_correction_bias"])
def test_a_value_that_is_not_finite_is_refused_and_named(tmp_path, name, dtype, bad):
    tensors = random_tensors(V3, dtype)
    tensors[name].view(-1)[3] = bad
    folder = write_hf(tmp_path / "hf", V3, tensors)
    with pytest.raises(DamagedCheckpointError, match=rf"{re.escape(name)} in .* NaN or infinite"):
        to_shards(folder, tmp_path / "shards", LayoutConfig())
    (difference,) = verify(folder, folder).differences
    assert difference.kind == "damaged"
    assert name in [part.name for part in parameters(open_source(folder).shape)[difference.name].parts]


def test_a_scale_that_makes_values_infinite_is_refused(tmp_path):
    tensors = to_fp8(random_tensors(EDGE, torch.bfloat16))
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][1, 1] = 2e38
    with pytest.raises(DamagedCheckpointError, match=r"down_proj\.weight in .* NaN or infinite"):
        to_shards(write_hf(tmp_path / "hf", EDGE, tensors), tmp_path / "shards", LayoutConfig())


@pytest.mark.parametrize("dtype", [ExportDtype.BF16, ExportDtype.FP8])
def test_a_finite_value_that_an_export_cannot_hold_is_refused(tmp_path, dtype):
    tensors = random_tensors(V3, torch.float32)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.finfo(torch.float32).max
    source = write_hf(tmp_path / "hf", V3, tensors)
    with pytest.raises(DamagedCheckpointError, match=r"would become infinite|beyond BF16"):
        to_hf(source, tmp_path / "out", dtype=dtype)


def test_rotary_frequencies_of_another_size_are_refused(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = rewritten(bf16_checkpoint(tmp_path / "hf"), lambda tensors: tensors.update({name: torch.ones(1000)}))
    with pytest.raises(DamagedCheckpointError, match=r"shape \(1000,\), but half the rotary channels are 2"):
        open_source(folder)


def test_what_the_system_refuses_to_read_is_named(tmp_path):
    folder = bf16_checkpoint(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read or written \(Is a directory\)"):
        open_source(folder)
