"""Tensors that come one by one become a folder that can be opened, in files of bounded size, whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conversion.hf_folder import open_hf_folder
from conversion.hf_stream import write_hf_folder
from conversion.sources import WeightSource, open_source
from megatron_ads.errors import ConversionError, DiskFullError
from parity_tests.harness.hf_checkpoints import EDGE, random_tensors, to_fp8, write_hf

LIMIT = 40_000


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(EDGE, torch.bfloat16)


@pytest.fixture(scope="module")
def source(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    """The same weights as they were published, in FP8."""
    return open_source(write_hf(tmp_path_factory.mktemp("published") / "hf", EDGE, to_fp8(tensors), files=2))


def test_a_folder_has_the_tensors_of_the_stream_and_the_files_of_its_source(
    tensors: dict[str, Tensor], source: WeightSource, tmp_path: Path
) -> None:
    target = tmp_path / "new"
    (target / "old").mkdir(parents=True)
    write_hf_folder(target, reversed(tensors.items()), source, shard_bytes=LIMIT)
    files = sorted(target.glob("*.safetensors"))
    stored = [load_file(file) for file in files]
    assert len(files) > 2
    assert all(sum(each.nbytes for each in one.values()) <= LIMIT or len(one) == 1 for one in stored)
    found = {name: tensor for one in stored for name, tensor in one.items()}
    assert found.keys() == tensors.keys() | source.derived.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert open_hf_folder(target).tensors.keys() == found.keys()  # checks names, shapes and index against the config
    config = json.loads((target / "config.json").read_text())
    assert (config["torch_dtype"], "quantization_config" in config) == ("bfloat16", False)
    names = {file.name for file in source.side_folder.iterdir() if file.suffix != ".safetensors"}
    assert {file.name for file in target.iterdir()} == names | {file.name for file in files}


def test_an_interrupted_stream_leaves_neither_a_folder_nor_a_part_of_one(
    tensors: dict[str, Tensor], source: WeightSource, tmp_path: Path
) -> None:
    def until_full() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[: len(tensors) // 2]
        raise DiskFullError("full")

    with pytest.raises(DiskFullError):
        write_hf_folder(tmp_path / "new", until_full(), source, shard_bytes=LIMIT)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(source: WeightSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match=r"file/new.* cannot be read or written \(Not a directory\)"):
        write_hf_folder(tmp_path / "file" / "new", iter([]), source)
