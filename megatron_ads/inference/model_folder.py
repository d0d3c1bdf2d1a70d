"""The Hugging Face folder of any checkpoint: its own, or an export that lasts as long as it is used."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.convert import to_hf
from conversion.hf_folder import check_for_transformers, read_config
from conversion.plan import folder_state
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from megatron_ads.architecture import DEEPSEEK_TYPES, MODEL_TYPES
from megatron_ads.observability.log import get_logger
from megatron_ads.runtime.device import device

logger = get_logger(__name__)
_WEIGHTS_AND_SETTINGS = frozenset({".safetensors", ".distcp", ".pt", ".metadata", ".json", ".jinja"})


def model_state(model: Path) -> str:
    """Return a digest of names, sizes and modification times of a checkpoint's files; their bytes are not read."""
    files = (file for file in model.rglob("*") if (file.suffix or file.name) in _WEIGHTS_AND_SETTINGS)
    return folder_state([file for file in files if file.is_file()])


@contextmanager
def hugging_face_folder(model: Path, *, takes_weights: bool = False) -> Iterator[Path]:
    """Yield ``model``, or an export of it, which is deleted afterwards: of Megatron's, and on a CPU of FP8 as BF16.

    With ``takes_weights``, FP8 becomes BF16 everywhere: a model loaded in FP8 has no place for the weights of a job.

    Raises:
        ConversionError: If the folder is no checkpoint, is incomplete or damaged, or the export does not fit the disk.
    """
    config = read_config(model) if (model / "config.json").exists() else {}
    model_type = config.get("model_type")
    unfit = takes_weights or device().type == "cpu"  # transformers runs FP8 on a GPU only
    fp8_unfit = unfit and model_type in MODEL_TYPES and isinstance(config.get("quantization_config"), dict)
    if _is_hugging_face(model) and not fp8_unfit:
        if model_type in DEEPSEEK_TYPES:  # transformers runs more Qwen2 and Llama models than are trained here
            check_for_transformers(model)
        yield model
        return
    kind = open_source(model).kind
    with tempfile.TemporaryDirectory(prefix="megatron-ads-export-") as folder:
        what = f"{kind}{', in FP8, which is needed as BF16' if fp8_unfit else ''}"
        logger.info("%s is a %s: exporting it to %s for as long as it is used (TMPDIR moves it).", model, what, folder)
        target = Path(folder) / "model"
        to_hf(model, target, dtype=ExportDtype.BF16 if fp8_unfit else ExportDtype.STORED)
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
