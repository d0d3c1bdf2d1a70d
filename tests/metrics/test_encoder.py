"""A sentence encoder is loaded again when, and only when, what decides its embeddings is another."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from numpy.typing import NDArray

from megatron_ads.errors import ConfigError
from megatron_ads.metrics import encoder
from megatron_ads.metrics.encoder import sentence_encoder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Stand in for the library, with models whose vectors are the number in their file; yield the names loaded."""
    names: list[str] = []

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            names.append(name)
            file = next(iter(sorted(Path(name).glob("weights"))), None) if Path(name).is_dir() else _of_hub(tmp_path)
            if file is None:
                raise OSError("no weights")
            self.value = float(file.read_text())

        def encode(self, texts: list[str], **_: Any) -> NDArray[np.float64]:
            return np.full((len(texts), 1), self.value)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield names
    encoder._load.cache_clear()


def _of_hub(root: Path) -> Path:
    folder = root / "hub" / "models--sentence-transformers--mini"
    return folder / "snapshots" / (folder / "refs" / "main").read_text() / "modules.json"


def publish(root: Path, revision: str, value: str) -> None:
    """Put a revision of the model ``mini`` into the hub's cache."""
    folder = root / "hub" / "models--sentence-transformers--mini"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "modules.json").write_text(value)


def value(name: str, setting: str = "a setting") -> float:
    return float(sentence_encoder(name, setting)(["text"])[0, 0])


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_folder_is_loaded_once_until_a_file_in_it_changes(loads: list[str], tmp_path: Path) -> None:
    write(tmp_path / "model" / "weights", "1")
    assert [value("model"), value("model", "another setting")] == [1, 1] and loads == ["model"]
    write(tmp_path / "model" / "weights", "22")
    assert value("model") == 22
    write(tmp_path / "model" / "1_Pooling" / "config.json", "{}")
    assert value("model") == 22 and loads == ["model"] * 3


def test_a_relative_name_is_the_folder_that_it_names_now(
    loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model" / "weights", "1")
    write(tmp_path / "elsewhere" / "model" / "weights", "2")
    assert value("model") == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert value("model") == 2


def test_a_model_of_the_hub_is_loaded_again_for_another_revision(loads: list[str], tmp_path: Path) -> None:
    publish(tmp_path, "a" * 40, "1")
    assert [value("mini"), value("mini")] == [1, 1] and loads == ["mini"]
    publish(tmp_path, "b" * 40, "2")
    assert value("mini") == 2


def test_what_cannot_be_loaded_is_named_with_the_setting_of_each_attempt(loads: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for setting in ("one", "other"):
        with pytest.raises(ConfigError, match=f"{setting} is 'empty', which cannot be loaded: no weights"):
            sentence_encoder("empty", setting)
