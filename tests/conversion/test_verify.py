"""Every fault that conversions are known to commit is seen, and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import convert, to_hf, to_shards
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from conversion.to_torch_dist import TorchDistTarget
from conversion.verify import DifferenceKind, verify
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConfigError, ConversionError
from parity_tests.harness.hf_checkpoints import V3, fp8_checkpoint, random_tensors, write_hf

SQUARE = V3 | {"hidden_size": 32, "v_head_dim": 8}
"""o_proj is 32 x 32, so that its transpose has the right shape."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as FP8 HF, shards, torch_dist and BF16 HF."""
    folder = tmp_path_factory.mktemp("made")
    fp8_checkpoint(folder / "fp8", SQUARE)
    to_shards(folder / "fp8", folder / "shards", LayoutConfig(pp=2, ep=4, tp=2))
    convert(TorchDistTarget(open_source(folder / "fp8"), folder / "dist"))
    to_hf(folder / "shards", folder / "bf16", dtype=ExportDtype.BF16, max_shard_bytes=60_000)
    return folder


@pytest.fixture
def broken(made, tmp_path) -> Path:
    """A copy of the BF16 checkpoint to damage."""
    shutil.copytree(made / "bf16", tmp_path / "broken")
    return tmp_path / "broken"


class Editor:
    """Change tensors of an HF folder in place, whichever files they are in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(self, name: str) -> torch.Tensor:
        return load_file(self.folder / self.file_of[name])[name]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        file = self.folder / self.file_of[name]
        save_file(load_file(file) | {name: tensor.contiguous()}, file, metadata={"format": "pt"})

    def swap(self, one: str, other: str) -> None:
        first, second = self.read(one), self.read(other)
        self.write(one, second)
        self.write(other, first)


EXPERT = "model.layers.3.mlp.experts.{}.{}_proj.weight"


@pytest.mark.parametrize("a", ["fp8", "shards", "dist", "bf16"])
@pytest.mark.parametrize("b", ["fp8", "shards", "dist", "bf16"])
def test_the_same_model_is_equal_in_every_format(made, a, b):
    result = verify(made / a, made / b)
    assert result.differences == ()
    assert result.compared >= 4 * 9 + 3 * 8 * 2  # layers, experts


def test_one_worker_or_two_give_the_same_table(made, broken):
    Editor(broken).swap(EXPERT.format(1, "up"), EXPERT.format(2, "up"))
    one, two = (verify(made / "fp8", broken, workers=workers) for workers in (1, 2))
    assert one.differences == two.differences
    assert len(one.differences) == 2


def test_two_experts_swapped(made, broken):
    for matrix in ("gate", "up", "down"):
        Editor(broken).swap(EXPERT.format(1, matrix), EXPERT.format(2, matrix))
    differences = verify(made / "shards", broken).differences
    assert {difference.name for difference in differences} == {
        f"decoder.layers.3.mlp.experts.linear_fc{fc}.weight{expert}" for fc in (1, 2) for expert in (1, 2)
    }
    assert {difference.kind for difference in differences} == {DifferenceKind.VALUES}


def test_an_expert_range_shifted_by_one_rank(made, broken):
    editor = Editor(broken)
    values = [editor.read(EXPERT.format(expert, "down")) for expert in range(8)]
    for expert in range(8):
        editor.write(EXPERT.format(expert, "down"), values[(expert + 4) % 8])
    assert len(verify(made / "shards", broken).differences) == 8


def test_gate_and_up_exchanged(made, broken):
    Editor(broken).swap("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    (difference,) = verify(made / "dist", broken).differences
    assert difference.name == "decoder.layers.0.mlp.linear_fc1.weight"


def test_a_transposed_matrix(made, broken):
    editor = Editor(broken)
    name = "model.layers.1.self_attn.o_proj.weight"
    editor.write(name, editor.read(name).T)
    (difference,) = verify(made / "shards", broken).differences
    assert difference.name == "decoder.layers.1.self_attention.linear_proj.weight"
    assert difference.first_index == (0, 1)  # the diagonal is its own transpose


def test_a_layer_duplicated(made, broken):
    editor = Editor(broken)
    for name in [name for name in editor.file_of if name.startswith("model.layers.0.")]:
        editor.write(name.replace("layers.0.", "layers.1."), editor.read(name))
    differences = verify(made / "shards", broken).differences
    assert len(differences) == 11  # 9 tensors of attention and norms, 2 of the dense feed-forward
    assert all(difference.name.startswith("decoder.layers.1.") for difference in differences)


@pytest.mark.parametrize("config_too", [False, True], ids=["tensors", "tensors and config"])
def test_a_dropped_mtp_layer(made, broken, config_too):
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    for file in broken.glob("*.safetensors"):
        kept = {name: t for name, t in load_file(file).items() if not name.startswith("model.layers.4.")}
        save_file(kept, file, metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith("model.layers.4.")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    if config_too:
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    differences = verify(made / "fp8", broken).differences
    if config_too:
        missing = [difference for difference in differences if difference.kind is DifferenceKind.MISSING]
        # 9 of attention and norms, 2 of the router, 2 shared, 16 of experts, 4 of the MTP module, 2 repeats
        assert len(missing) == 35
        assert {difference.kind for difference in differences} == {DifferenceKind.MISSING, DifferenceKind.CONFIG}
    else:
        assert [difference.kind for difference in differences] == [DifferenceKind.DAMAGED]
        assert "num_nextn_predict_layers" in differences[0].detail


def test_a_router_bias_cast_to_bf16(made, broken):
    editor = Editor(broken)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    editor.write(name, editor.read(name).bfloat16())
    (difference,) = verify(made / "shards", broken).differences
    assert difference.name == "decoder.layers.2.mlp.router.expert_bias"
    assert difference.largest is not None and 0 < difference.largest < 1e-2


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.4.shared_head.head.weight"], ids=["head", "repeat"])
def test_one_flipped_bit(made, broken, name):
    editor = Editor(broken)
    tensor = editor.read(name)
    bits = tensor.view(torch.int16)
    bits[17, 3] ^= 1
    editor.write(name, tensor)
    (difference,) = verify(made / "shards", broken).differences
    assert difference.first_index == (17, 3)
    assert difference.detail.startswith("1 elements differ")


def test_one_flipped_bit_in_any_copy_of_a_shards_folder(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "shards")
    file = tmp_path / "shards" / "pp00-tp1-ep03.safetensors"  # the second copy of tp 1
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = verify(made / "fp8", tmp_path / "shards").differences
    assert [each.kind for each in found] == [DifferenceKind.DAMAGED, DifferenceKind.VALUES]
    assert "SHA-256" in found[0].detail
    assert len(verify(tmp_path / "shards", made / "fp8").differences) == 2


def test_negative_zero_is_not_zero(made, broken):
    editor = Editor(broken)
    norm = "model.norm.weight"
    zeros = torch.zeros_like(editor.read(norm))
    editor.write(norm, zeros)
    shutil.copytree(broken, broken.parent / "other")
    Editor(broken.parent / "other").write(norm, -zeros)
    (difference,) = verify(broken, broken.parent / "other").differences
    assert difference.largest == 0.0


def test_a_truncated_file(made, broken):
    file = sorted(broken.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    (difference,) = verify(made / "shards", broken).differences
    assert difference.kind is DifferenceKind.DAMAGED
    assert file.name in difference.detail and "truncated" in difference.detail


def test_a_stale_index(made, broken):
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    files = set(index["weight_map"].values())
    path.write_text(json.dumps(index))
    assert len(files) > 1
    (difference,) = verify(made / "shards", broken).differences
    assert difference.kind is DifferenceKind.DAMAGED and "stale" in difference.detail


def test_another_dtype(made, tmp_path):
    to_hf(made / "shards", tmp_path / "fp32", dtype=ExportDtype.FP32)
    differences = verify(made / "bf16", tmp_path / "fp32").differences
    assert {difference.kind for difference in differences} == {DifferenceKind.DTYPE}
    assert verify(made / "bf16", tmp_path / "fp32", tolerance=1e-9).equal


def test_nan_codes_in_fp8(made, tmp_path):
    shutil.copytree(made / "fp8", tmp_path / "fp8")
    editor = Editor(tmp_path / "fp8")
    name = "model.layers.0.mlp.down_proj.weight"
    codes = editor.read(name)
    codes.view(torch.uint8)[3, 3] = 0x7F
    editor.write(name, codes)
    (difference,) = verify(made / "bf16", tmp_path / "fp8").differences
    assert difference.kind is DifferenceKind.DAMAGED and "NaN" in difference.detail


def test_a_tolerance_lets_only_what_is_within_it_pass(made, broken):
    editor = Editor(broken)
    tensor = editor.read("model.norm.weight")
    tensor[5] = tensor[5] + 0.25
    editor.write("model.norm.weight", tensor)
    assert not verify(made / "bf16", broken).equal
    assert not verify(made / "bf16", broken, tolerance=0.2).equal
    assert verify(made / "bf16", broken, tolerance=0.3).equal


def test_nan_is_outside_every_tolerance(made, broken):
    editor = Editor(broken)
    tensor = editor.read("model.norm.weight")
    tensor[5] = float("nan")
    editor.write("model.norm.weight", tensor)
    assert not verify(made / "bf16", broken, tolerance=1e9).equal


def test_a_path_that_is_no_checkpoint_is_an_error_and_not_a_difference(made, tmp_path):
    with pytest.raises(ConversionError, match="is not a checkpoint"):
        verify(made / "fp8", tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"torch_dtype": "float32"}, "torch_dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"quantization_config": None}, "quantization_config"),
        ({"quantization_config": {"scale_fmt": "ue8m0"}}, "quantization_config.scale_fmt"),
        ({"quantization_config": {"modules_to_not_convert": ["self_attn.o_proj"]}}, "quantization_config"),
    ],
)
def test_a_config_that_contradicts_its_weights(made, tmp_path, change, field):
    shutil.copytree(made / "fp8", tmp_path / "fp8")
    config = json.loads((made / "fp8/config.json").read_text())
    if change.get("quantization_config"):
        change = {"quantization_config": config["quantization_config"] | change["quantization_config"]}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config | change))
    (difference,) = verify(made / "shards", tmp_path / "fp8").differences
    assert (difference.kind, difference.name) == (DifferenceKind.CONFIG, f"B: {field}")
    assert verify(tmp_path / "fp8", made / "shards").differences[0].name == f"A: {field}"


def test_a_quantization_config_on_bf16_weights(made, broken):
    config = json.loads((broken / "config.json").read_text())
    fp8 = json.loads((made / "fp8/config.json").read_text())["quantization_config"]
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    (difference,) = verify(made / "shards", broken).differences
    assert difference.name == "B: quantization_config"


def test_a_repeat_stored_wider_than_what_it_repeats_survives_the_round_trip(tmp_path):
    tensors = random_tensors(V3, torch.bfloat16)
    for name in tensors:
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors[name].float()
    source = write_hf(tmp_path / "hf", V3, tensors)
    to_shards(source, tmp_path / "shards", LayoutConfig())
    to_hf(tmp_path / "shards", tmp_path / "out")
    assert verify(source, tmp_path / "shards").equal
    assert verify(source, tmp_path / "out").equal


def test_a_config_that_is_not_understood_is_named_with_its_folder(made, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"index_topk": 2048}))
    with pytest.raises(ConfigError, match=r"broken/config\.json: index_topk = 2048 .* DeepSeek-V3\.2"):
        verify(made / "fp8", broken)
