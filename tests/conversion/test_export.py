"""Exports: dtypes, config, carried files, and byte-identity with a reference."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import convert, to_hf, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.fp8 import dequantize, quantize
from conversion.hf_folder import open_hf_folder
from conversion.sources import open_source
from conversion.to_hf import ExportDtype, HfTarget
from conversion.to_reference import reference_target
from conversion.to_torch_dist import TorchDistTarget
from conversion.verify import verify
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConversionError
from parity_tests.harness.hf_checkpoints import (
    EDGE,
    V3,
    bf16_checkpoint,
    is_fp8_weight,
    random_tensors,
    to_fp8,
    write_hf,
)

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_deepseek.py")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint whose scales are not amax / 448, as if quantised by someone else, scales in other files."""
    tensors = to_fp8(random_tensors(EDGE, torch.bfloat16))
    generator = torch.Generator().manual_seed(5)
    for name in tensors:
        if name.endswith("_scale_inv"):
            tensors[name] = tensors[name] * (1 + torch.rand(tensors[name].shape, generator=generator))
    return write_hf(tmp_path_factory.mktemp("published") / "hf", EDGE, tensors, files=3)


@pytest.fixture(scope="module")
def shards(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    to_shards(published, folder, LayoutConfig(pp=2, tp=2, ep=2))
    return folder


def assert_same_folder(left: Path, right: Path) -> None:
    names = sorted(file.name for file in left.iterdir())
    assert names == sorted(file.name for file in right.iterdir())
    same, different, unreadable = filecmp.cmpfiles(left, right, names, shallow=False)
    assert (different, unreadable) == ([], [])
    assert len(same) == len(names) > 5


def test_an_untouched_model_comes_back_byte_for_byte(published, shards, tmp_path):
    report = convert(reference_target(open_source(shards), tmp_path / "back", published, ExportDtype.FP8))
    assert_same_folder(published, tmp_path / "back")
    assert report.requantized == {}


def test_without_the_reference_the_codes_differ(published, shards, tmp_path):
    # The negative twin: amax / 448 gives other scales than the publisher's.
    to_hf(shards, tmp_path / "back", dtype=ExportDtype.FP8)
    ours, theirs = stored_tensors(tmp_path / "back"), stored_tensors(published)
    assert ours.keys() == theirs.keys()
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert not torch.equal(ours[name], theirs[name])


def test_only_what_changed_is_quantised_anew_and_its_error_is_reported(published, shards, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(shards, changed)
    file = next(iter(sorted(changed.glob("pp01-*.safetensors"))))
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("decoder.layers.3.mlp.experts.linear_fc2"))
    tensors[name][0, 0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    target = reference_target(open_source(changed), tmp_path / "back", published, ExportDtype.STORED)
    report = convert(target)
    expert = name.rpartition("weight")[2]
    down = f"model.layers.3.mlp.experts.{expert}.down_proj.weight"
    assert list(report.requantized) == [down]
    assert 0 < report.requantized[down] <= 16.5 / 448  # half a step of the top binade of e4m3
    back, reference = stored_tensors(tmp_path / "back"), stored_tensors(published)
    differing = {n for n in back if not torch.equal(back[n].view(torch.uint8), reference[n].view(torch.uint8))}
    assert differing == {down, down + "_scale_inv"}
    value = float(dequantize(back[down], back[down + "_scale_inv"])[0, 0])
    assert value == pytest.approx(float(tensors[name][0, 0]), rel=1 / 16)


def test_a_reference_of_another_model_is_refused(published, tmp_path):
    other = bf16_checkpoint(tmp_path / "other", V3)
    with pytest.raises(ConversionError, match="is another model"):
        convert(reference_target(open_source(other), tmp_path / "out", published, ExportDtype.STORED))


def test_a_dtype_that_contradicts_the_reference_is_refused(published, shards, tmp_path):
    with pytest.raises(ConversionError, match="--dtype fp32 contradicts --reference"):
        reference_target(open_source(shards), tmp_path / "out", published, ExportDtype.FP32)


def test_fp8_exports_store_what_deepseek_stores_in_fp8(shards, tmp_path):
    to_hf(shards, tmp_path / "hf", dtype=ExportDtype.FP8)
    for name, tensor in stored_tensors(tmp_path / "hf").items():
        if name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert tensor.dtype is torch.float32, name
        else:
            assert tensor.dtype is (torch.float8_e4m3fn if is_fp8_weight(name) else torch.bfloat16), name
    open_hf_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("dtype", "quantized", "name"),
    [
        (ExportDtype.FP8, True, "bfloat16"),
        (ExportDtype.BF16, False, "bfloat16"),
        (ExportDtype.FP32, False, "float32"),
    ],
)
def test_config_says_what_the_weights_are(shards, tmp_path, dtype, quantized, name):
    to_hf(shards, tmp_path / "hf", dtype=dtype)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ("quantization_config" in config) == quantized
    assert config["torch_dtype"] == name
    if quantized:
        assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_fp8_config_is_added_to_a_model_that_was_bf16(tmp_path):
    to_hf(bf16_checkpoint(tmp_path / "hf", EDGE), tmp_path / "fp8", dtype=ExportDtype.FP8)
    assert open_hf_folder(tmp_path / "fp8").is_fp8
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"


def test_stored_dtype_of_a_dequantised_model_is_bf16_without_quantization_config(shards, tmp_path):
    to_hf(shards, tmp_path / "hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not open_hf_folder(tmp_path / "hf").is_fp8


def test_tokenizer_template_and_code_travel_with_the_weights(published, shards, tmp_path):
    to_hf(shards, tmp_path / "hf", dtype=ExportDtype.FP8)
    for name in SIDE_FILES:
        assert (tmp_path / "hf" / name).read_bytes() == (published / name).read_bytes(), name


def test_transformers_style_configs_keep_their_style(tmp_path):
    config = {key: value for key, value in V3.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    config |= {
        "rope_parameters": {**V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0},
        "dtype": "bfloat16",
    }
    source = write_hf(tmp_path / "hf", config, random_tensors(config, torch.bfloat16))
    to_shards(source, tmp_path / "shards", LayoutConfig())
    to_hf(tmp_path / "shards", tmp_path / "fp32", dtype=ExportDtype.FP32)
    written = json.loads((tmp_path / "fp32" / "config.json").read_text())
    assert written == config | {"dtype": "float32"}


def test_transformers_loads_an_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = bf16_checkpoint(tmp_path / "hf", V3, files=2)
    to_shards(source, tmp_path / "shards", LayoutConfig(pp=2, ep=4))
    to_hf(tmp_path / "shards", tmp_path / "export", dtype=ExportDtype.FP32, max_shard_bytes=50_000)
    model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert report["missing_keys"] == set() or report["missing_keys"] == []
    up = stored_tensors(source)["model.layers.3.mlp.experts.5.up_proj.weight"]
    fused = model.model.layers[3].mlp.experts.gate_up_proj[5]  # gate over up
    assert torch.equal(fused[8:], up.float())


FORMATS = {
    "64 x 64": {"weight_block_size": [64, 64]},
    "32 x 160": {"weight_block_size": [32, 160]},
    "ue8m0": {"scale_fmt": "ue8m0"},
    "ue8m0 of 64 x 64": {"weight_block_size": [64, 64], "scale_fmt": "ue8m0"},
    "some modules left": {"modules_to_not_convert": ["lm_head", "mlp.gate", "model.layers.0.mlp", "o_proj"]},
}


def fp8_of_format(folder: Path, quantization: dict, *, seed: int = 0) -> Path:
    """Write an FP8 checkpoint in another published form of blocks and scales."""
    block = tuple(quantization.get("weight_block_size", (128, 128)))
    powers, tensors = quantization.get("scale_fmt") == "ue8m0", {}
    for name, tensor in random_tensors(EDGE, torch.bfloat16, seed=seed).items():
        tensors[name] = tensor
        if is_fp8_weight(name):
            tensors[name], tensors[name + "_scale_inv"] = quantize(tensor, block, power_of_two_scales=powers)
    write_hf(folder, EDGE, tensors)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= quantization
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("route", ["shards", "torch_dist", "direct", "reference"])
@pytest.mark.parametrize("quantization", FORMATS.values(), ids=FORMATS)
def test_fp8_is_written_in_the_form_that_its_config_says(tmp_path, quantization, route):
    published = fp8_of_format(tmp_path / "published", quantization)
    source = fp8_of_format(tmp_path / "tuned", quantization, seed=1)
    if route == "shards":
        to_shards(source, tmp_path / "middle", LayoutConfig(tp=2, ep=2))
    elif route == "torch_dist":
        convert(TorchDistTarget(open_source(source), tmp_path / "middle"))
    opened = open_source(tmp_path / "middle" if (tmp_path / "middle").exists() else source)
    target = HfTarget(opened, tmp_path / "out", ExportDtype.FP8)
    if route == "reference":
        target = reference_target(opened, tmp_path / "out", published, ExportDtype.FP8)
    convert(target)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    expected = dict(quantization)
    if "modules_to_not_convert" in quantization:
        expected["modules_to_not_convert"] = ["lm_head", "mlp.gate"]  # the others are FP8
    assert config.items() >= expected.items()
    folder = open_hf_folder(tmp_path / "out")  # checks the number of blocks
    scales = [each.read() for name, each in folder.tensors.items() if name.endswith("_scale_inv")]
    assert all(bool((torch.frexp(scale)[0] == 0.5).all()) for scale in scales) == ("scale_fmt" in quantization)
    if "modules_to_not_convert" not in quantization:  # the source's own list is not true of it
        assert verify(source, tmp_path / "out", tolerance=0.05).equal


def test_a_reference_whose_scales_are_not_what_its_config_says_is_refused(published, shards, tmp_path):
    shutil.copytree(published, tmp_path / "reference")
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "reference/config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedCheckpointError, match="has scales between powers of two"):
        reference_target(open_source(shards), tmp_path / "out", tmp_path / "reference", ExportDtype.FP8)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ["shards", "direct", "reference"])
def test_the_dtype_of_a_config_is_that_of_the_weights(tmp_path, stored, field, route):
    source = write_hf(tmp_path / "hf", V3, random_tensors(V3, stored))
    config = {key: value for key, value in V3.items() if key != "torch_dtype"} | {field: "float64"}
    (source / "config.json").write_text(json.dumps(config))
    (difference,) = verify(source, source).differences[:1]
    assert (difference.kind, difference.name) == ("config", f"A: {field}")
    opened, name = open_source(source), str(stored).removeprefix("torch.")
    if route == "shards":
        to_shards(source, tmp_path / "shards", LayoutConfig())
        opened = open_source(tmp_path / "shards")
    target = HfTarget(opened, tmp_path / "out", ExportDtype.STORED)
    if route == "reference":
        target = reference_target(opened, tmp_path / "out", source, ExportDtype.STORED)
    convert(target)
    assert json.loads((tmp_path / "out/config.json").read_text()) == config | {field: name}
    assert verify(tmp_path / "out", tmp_path / "out").equal


def test_an_export_without_its_side_files_has_a_config_and_names_the_others(shards, published, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards/hf")
    report = to_hf(tmp_path / "shards", tmp_path / "out", dtype=ExportDtype.FP8)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((published / "config.json").read_text())
    gone = [each.partition(" ")[0] for each in report.left_behind]
    assert gone == sorted(set(SIDE_FILES) - {"config.json"})
    assert verify(tmp_path / "shards", tmp_path / "out", tolerance=0.05).equal
    convert(TorchDistTarget(open_source(tmp_path / "shards"), tmp_path / "dist"))
    assert open_source(tmp_path / "dist").config == open_source(shards).config
    # what a reference has is not missing
    assert not convert(
        reference_target(open_source(tmp_path / "shards"), tmp_path / "again", published, ExportDtype.FP8)
    ).left_behind


def test_a_side_file_that_went_missing_from_torch_dist_is_named(shards, tmp_path):
    convert(TorchDistTarget(open_source(shards), tmp_path / "dist"))
    (tmp_path / "dist/hf/tokenizer.json").unlink()
    (left,) = to_hf(tmp_path / "dist", tmp_path / "out").left_behind
    assert left.startswith("tokenizer.json (listed")


def test_a_manifest_of_an_earlier_version_lists_no_side_files(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["side_files"]
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "shards/hf/tokenizer.json").unlink()
    assert to_hf(tmp_path / "shards", tmp_path / "out").left_behind == ()


def test_a_file_of_no_bytes_is_refused(shards, tmp_path):
    with pytest.raises(ConversionError, match="largest file is 0 bytes"):
        to_hf(shards, tmp_path / "out", max_shard_bytes=0)
