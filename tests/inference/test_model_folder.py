import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from conversion.convert import to_shards
from conversion.hf_folder import INDEX
from conversion.verify import verify
from megatron_ads.config.model import LayoutConfig
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.errors import ConfigError, ConversionError
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


def test_dense_models_that_only_transformers_runs_are_used_in_place(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "dense", CONFIGS[Preset.dense])
    _change(tmp_path / "dense/config.json", rope_scaling={"type": "yarn", "factor": 4.0})
    with hugging_face_folder(tmp_path / "dense") as used:
        assert used == tmp_path / "dense"


def test_a_dense_model_in_fp8_is_exported_on_a_cpu(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "dense", CONFIGS[Preset.dense], fp8=True)
    with hugging_face_folder(tmp_path / "dense", takes_weights=True) as used:
        assert used != tmp_path / "dense"
        assert "quantization_config" not in json.loads((used / "config.json").read_text())


def _change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.unlink()  # it may be a link to the undamaged one
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"num_hidden_layers": 10**12}, None, "too few for the num_hidden_layers = 1000000000000"),
        ({"n_routed_experts": 10**9}, None, "n_routed_experts = 1000000000"),
        ({"vocab_size": 10**15}, None, r"config.json gives \(1000000000000000, 128\)"),
        ({"hidden_size": -64}, None, "hidden_size is -64"),
        ({}, "{folder}/{file}", "not a plain name inside"),
        ({}, "../model/{file}", "not a plain name inside"),
        ({"num_nextn_predict_layers": 3, "tie_word_embeddings": True}, None, None),  # transformers loads that
    ],
)
def test_what_files_say_is_judged_before_transformers_believes_it(
    folder: Path, tmp_path: Path, config: dict[str, Any], files: str | None, message: str | None
) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(folder, damaged, copy_function=os.link)
    _change(damaged / "config.json", **config)
    if files:
        index = json.loads((damaged / INDEX).read_text())["weight_map"]
        names = {name: files.format(folder=folder, file=file) for name, file in index.items()}
        _change(damaged / INDEX, weight_map=names)
    expected = pytest.raises((ConfigError, ConversionError), match=message) if message else nullcontext()
    with expected, hugging_face_folder(damaged) as used:
        assert used == damaged


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not a checkpoint"), hugging_face_folder(tmp_path):
        pass
