"""The Hugging Face folder of any checkpoint: its own, or an export that lasts as long as it is used."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.convert import to_hf
from conversion.plan import folder_state
from conversion.sources import open_source
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)
_WEIGHTS_AND_SETTINGS = frozenset({".safetensors", ".distcp", ".pt", ".metadata", ".json", ".jinja"})


def model_state(model: Path) -> str:
    """Return a digest of names, sizes and modification times of a checkpoint's files; their bytes are not read."""
    files = (file for file in model.rglob("*") if (file.suffix or file.name) in _WEIGHTS_AND_SETTINGS)
    return folder_state([file for file in files if file.is_file()])


@contextmanager
def hugging_face_folder(model: Path) -> Iterator[Path]:
    """Yield ``model``, or, if it is a Megatron checkpoint, an export of it, which is deleted afterwards.

    Raises:
        ConversionError: If the folder is no checkpoint, is incomplete or damaged, or the export does not fit the disk.
    """
    if _is_hugging_face(model):
        yield model
        return
    kind = open_source(model).kind
    with tempfile.TemporaryDirectory(prefix="megatron-ads-export-") as folder:
        logger.info("%s is a %s: exporting it to %s for as long as it is used (TMPDIR moves it).", model, kind, folder)
        target = Path(folder) / "model"
        to_hf(model, target)
        yield target


def tokenizer_folder(model: Path) -> Path:
    """Return the folder that has the tokenizer of a checkpoint of any kind, without an export.

    Raises:
        ConversionError: If the folder is no checkpoint.
    """
    return model if _is_hugging_face(model) else open_source(model).side_folder


def _is_hugging_face(model: Path) -> bool:
    """Return whether a folder is to be used as it is; so is one that does not exist, for its user to complain of."""
    return not model.is_dir() or (model / "config.json").exists()
