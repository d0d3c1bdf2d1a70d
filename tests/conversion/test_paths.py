"""A name from a checkpoint is never a way out of its folder, for reading or for writing."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from conversion.convert import convert, to_hf, to_shards
from conversion.errors import DamagedCheckpointError
from conversion.paths import inside
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from conversion.to_reference import reference_target
from conversion.to_torch_dist import TorchDistTarget
from conversion.torch_dist_pickle import read_metadata
from megatron_ads.config.model import LayoutConfig
from parity_tests.harness.hf_checkpoints import V3, bf16_checkpoint, random_tensors, write_hf

INDEX = "model.safetensors.index.json"
NAMES = (
    *(
        "../victim.safetensors",
        "x/../../victim.safetensors",
        "/tmp/victim.safetensors",
        "..",
        ".",
        "",
        "./a.safetensors",
    ),
    *("a//b.safetensors", ".hidden.safetensors", "a/.git/b.safetensors", "..\\victim.safetensors", "a\0.safetensors"),
    *("a\n.safetensors", "\ud800.safetensors"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_plain_is_refused(tmp_path, name):
    with pytest.raises(DamagedCheckpointError, match="not a plain name inside"):
        inside(tmp_path, name, "The index")


@pytest.mark.parametrize("name", ["model.safetensors", "part/model-1.safetensors", "mit Leerzeichen ü.safetensors"])
def test_a_plain_name_is_a_path_in_the_folder(tmp_path, name):
    assert inside(tmp_path, name, "The index") == tmp_path / name


def with_file_named(folder: Path, name: str) -> Path:
    """Have the index give another name to the first file, which is put there if that is possible."""
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / first).rename(folder / name)
    return folder / name


@pytest.mark.parametrize("form", ["absolute", "parent", "link", "weights.bin"])
def test_weights_outside_are_neither_read_nor_written(tmp_path, form):
    tuned = write_hf(tmp_path / "tuned", V3, random_tensors(V3, torch.bfloat16, seed=1))
    reference = bf16_checkpoint(tmp_path / "reference", files=2)
    name = {"absolute": str(tmp_path / "victim.safetensors"), "parent": "../victim.safetensors"}.get(form, form)
    if form == "link":
        name = "linked.safetensors"
    victim = with_file_named(reference, name)
    if form == "link":
        victim = victim.rename(tmp_path / "victim.safetensors")
        (reference / name).symlink_to(victim)
    before = hashlib.sha256(victim.read_bytes()).hexdigest()
    with pytest.raises(DamagedCheckpointError, match=r"not a plain name|is a link to|must be \.safetensors"):
        convert(reference_target(open_source(tuned), tmp_path / "out", reference, ExportDtype.STORED))
    with pytest.raises(DamagedCheckpointError):
        open_source(reference)
    assert hashlib.sha256(victim.read_bytes()).hexdigest() == before
    assert not (tmp_path / "out").exists()


def test_weights_in_subfolders_and_in_a_hub_cache_are_read_and_written(tmp_path):
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    reference = bf16_checkpoint(cache / "snapshots" / "0123", files=2)
    part = with_file_named(reference, "part/first.safetensors")
    part.rename(cache / "blobs" / "beef")
    part.symlink_to("../../../blobs/beef")
    (reference / "tokenizer.json").rename(cache / "blobs" / "cafe")
    (reference / "tokenizer.json").symlink_to("../../blobs/cafe")
    report = convert(reference_target(open_source(reference), tmp_path / "out", reference, ExportDtype.STORED))
    assert report.left_behind == ()
    for name in ("part/first.safetensors", "tokenizer.json", "config.json", INDEX):
        assert (tmp_path / "out" / name).read_bytes() == (reference / name).read_bytes()
    assert not (tmp_path / "out/tokenizer.json").is_symlink()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return bf16_checkpoint(tmp_path_factory.mktemp("source") / "hf")


@pytest.mark.parametrize("name", ["../victim.safetensors", "/tmp/victim.safetensors", "extra.safetensors"])
def test_a_manifest_names_the_files_of_its_layout_only(source, tmp_path, name):
    to_shards(source, tmp_path / "shards", LayoutConfig())
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    manifest["files"][name] = next(iter(manifest["files"].values()))
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json has 1 too many"):
        open_source(tmp_path / "shards")


def test_a_derived_tensor_of_a_manifest_is_a_known_one(source, tmp_path):
    to_shards(source, tmp_path / "shards", LayoutConfig())
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    manifest["derived"]["lm_head.weight"] = {"dtype": "U8", "shape": [1], "base64": "AA=="}
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"lm_head\.weight is not determined by the config"):
        open_source(tmp_path / "shards")


def test_a_torch_dist_folder_names_its_own_files_only(source, tmp_path):
    convert(TorchDistTarget(open_source(source), tmp_path / "dist"))
    shutil.move(tmp_path / "dist/__0_0.distcp", tmp_path / "victim.distcp")
    metadata = read_metadata(tmp_path / "dist/.metadata")
    for info in metadata.storage_data.values():
        info.relative_path = "../victim.distcp"
    (tmp_path / "dist/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata names the file '\.\./victim\.distcp'"):
        open_source(tmp_path / "dist")


def test_side_files_behind_links_are_named_and_not_carried(source, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    (tmp_path / "secret").write_text("of somebody else")
    (tmp_path / "code").mkdir()
    (folder / "secret.txt").symlink_to(tmp_path / "secret")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "vocab.json").symlink_to("gone.json")
    (folder / "inference").symlink_to(tmp_path / "code")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500/optimizer.pt").write_text("")
    (folder / "checkpoint-500/trainer_state.json").write_text("{}")
    for rubbish in ("a.distcp", "b.npz", "c.ckpt", "pytorch_model.bin.index.json", "d.PT"):
        (folder / rubbish).write_text("")
    to_shards(folder, tmp_path / "shards", LayoutConfig())
    report = to_hf(tmp_path / "shards", tmp_path / "out")
    first = to_hf(folder, tmp_path / "direct")
    assert report.left_behind == ()  # they were left behind before
    assert first.left_behind == (
        "checkpoint-500 (holds weights of its own)",
        "inference (a linked folder)",
        "loop.json (a link that leads nowhere)",
        "secret.txt (a link out of the folder)",
        "tokenizer.json (a Git LFS pointer; run git lfs pull)",
        "vocab.json (a link that leads nowhere)",
    )
    kept = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "modeling_deepseek.py"]
    for out in ("out", "direct"):
        assert sorted(file.name for file in (tmp_path / out).iterdir()) == kept
