from pathlib import Path

import pytest

from conversion.convert import to_shards
from conversion.verify import verify
from megatron_ads.config.model import LayoutConfig
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.errors import ConversionError
from megatron_ads.inference.model_folder import hugging_face_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "model"
    write_demo_model(path, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    return path


def test_a_hugging_face_folder_is_used_in_place(folder: Path) -> None:
    with hugging_face_folder(folder) as used:
        assert used == folder


def test_shards_are_exported_for_as_long_as_they_are_needed(folder: Path, tmp_path: Path) -> None:
    to_shards(folder, tmp_path / "shards", LayoutConfig(pp=2, ep=2))
    with hugging_face_folder(tmp_path / "shards") as used:
        assert (used / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert not verify(folder, used).differences
    assert not used.exists()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not a checkpoint"), hugging_face_folder(tmp_path):
        pass
