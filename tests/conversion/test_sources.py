"""Slices read straight from any checkpoint are those a tensor-parallel rank owns."""

import json
import pickle
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import convert, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.sources import local_folder, open_source
from conversion.to_torch_dist import TorchDistTarget
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConversionError
from parity_tests.harness.hf_checkpoints import fp8_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    hf = fp8_checkpoint(folder / "hf")
    to_shards(hf, folder / "shards", LayoutConfig(pp=2, tp=2, ep=2, etp=2))
    convert(TorchDistTarget(open_source(hf), folder / "dist"))
    return {name: open_source(folder / name) for name in ("hf", "shards", "dist")}


@pytest.mark.parametrize("kind", ["hf", "shards", "dist"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_are_cut_as_megatron_cuts_them(sources, kind, size):
    source = sources[kind]
    for rank in range(size):
        read, full = partial(source.read, rank=rank, size=size), sources["hf"].read
        embedding = "embedding.word_embeddings.weight"
        assert torch.equal(read(embedding), full(embedding).chunk(size, dim=0)[rank])
        out = "decoder.layers.1.self_attention.linear_proj.weight"
        assert torch.equal(read(out), full(out).chunk(size, dim=1)[rank])
        for fc1 in ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.3.mlp.experts.linear_fc1.weight5"):
            gate, up = full(fc1).chunk(2, dim=0)
            expected = torch.cat((gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]))
            assert torch.equal(read(fc1), expected)
        norm = "decoder.layers.0.self_attention.q_layernorm.weight"
        assert torch.equal(read(norm), full(norm))


def test_starting_from_hf_is_bit_equal_to_converting_first(sources):
    for name in sources["hf"].names():
        for kind in ("shards", "dist"):
            a, b = sources["hf"].read(name), sources[kind].read(name)
            assert a.dtype == b.dtype and torch.equal(a, b), (kind, name)


def test_an_unknown_parameter_is_named(sources):
    with pytest.raises(ConversionError, match=r"without a parameter 'decoder\.layers\.99"):
        sources["hf"].read("decoder.layers.99.input_layernorm.weight")


@pytest.mark.parametrize(
    ("kind", "file", "data", "message"),
    [
        ("shards", "manifest.json", b"[]", "holds a list, not a JSON object"),
        ("shards", "manifest.json", b"{}", "manifest.json is damaged"),
        ("dist", "hf/config.json", b"{", "is not JSON"),
        ("dist", "conversion.json", b"[]", "holds a list, not a JSON object"),
        ("dist", "conversion.json", b'{"aliases": [], "derived": []}', "conversion.json is damaged"),
        ("dist", ".metadata", b"", "is damaged"),
        ("dist", ".metadata", pickle.dumps({}), "holds a dict, not the metadata"),
    ],
    ids=["manifest list", "manifest empty", "config", "carried", "carried field", "metadata empty", "metadata other"],
)
def test_a_description_that_is_damaged_is_refused(sources, tmp_path, kind, file, data, message):
    shutil.copytree(sources[kind].path, tmp_path / kind)
    (tmp_path / kind / file).write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=message):
        open_source(tmp_path / kind)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", 5),
        ("layout", {"tp": 1}),
        ("pipeline", 5),
        ("files", []),
        ("aliases", None),
        ("derived", []),
        ("derived", {"x": {"dtype": "F32", "shape": [1], "base64": "?"}}),
    ],
)
def test_a_manifest_with_a_field_of_another_form_is_refused(sources, tmp_path, field, value):
    folder = tmp_path / "shards"
    shutil.copytree(sources["shards"].path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is damaged"):
        open_source(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="is not a checkpoint"):
        open_source(tmp_path)
    with pytest.raises(ConversionError, match="does not exist"):
        open_source(tmp_path / "absent")


def test_a_folder_of_training_checkpoints_points_to_the_latest(tmp_path):
    for step in ("step-00000010", "step-00000020", ".step-00000030.partial"):
        (tmp_path / step).mkdir()
        (tmp_path / step / ".metadata").touch()
    with pytest.raises(ConversionError, match="such as step-00000020"):
        open_source(tmp_path)


def test_a_source_is_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    assert local_folder(str(tmp_path)) == tmp_path
    for absent in ("/no/such/folder", "./absent", "../absent"):
        with pytest.raises(ConversionError, match="does not exist"):
            local_folder(absent)
    with pytest.raises(ConversionError, match="could not be downloaded from the hub: Cannot have --"):
        local_folder("owner/two--dashes")
    with pytest.raises(ConversionError, match=r"cannot be read or written \(File name too long\)"):
        local_folder("x" * 300)
    import huggingface_hub

    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert local_folder("deepseek-ai/DeepSeek-R1") == tmp_path
    assert asked[0][0] == "deepseek-ai/DeepSeek-R1" and "*.safetensors" in asked[0][1]


def test_a_download_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="could not be downloaded from the hub: no route to host"):
        local_folder("deepseek-ai/DeepSeek-R1")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.uint8, torch.float64], ids=str)
def test_weights_of_a_dtype_without_values_are_refused(sources, tmp_path, dtype):
    folder = tmp_path / "shards"
    shutil.copytree(sources["shards"].path, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layernorm.weight"))
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name]["bytes"] = file.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=rf"{name} in .* is {dtype}"):
        source = open_source(folder)
        source.read(name)
