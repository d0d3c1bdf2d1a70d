"""The Hugging Face folder of any checkpoint: its own, or an export that lasts as long as the evaluation."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.convert import to_hf
from conversion.sources import open_source
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)


@contextmanager
def hugging_face_folder(model: Path) -> Iterator[Path]:
    """Yield ``model``, or, if it is a Megatron checkpoint, an export of it, which is deleted afterwards.

    Raises:
        ConversionError: If the folder is no checkpoint, is incomplete or damaged, or the export does not fit the disk.
    """
    if not model.is_dir() or (model / "config.json").exists():
        yield model
        return
    kind = open_source(model).kind
    with tempfile.TemporaryDirectory(prefix="megatron-ads-evaluate-") as folder:
        logger.info("%s is a %s: exporting it to %s for this evaluation (TMPDIR moves it).", model, kind, folder)
        target = Path(folder) / "model"
        to_hf(model, target)
        yield target
