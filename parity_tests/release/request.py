"""What is asked of a release check: the checkpoint, how much of it, where to."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_ads.architecture import read_model_shape
from megatron_ads.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line, checked."""

    hf: Path | None
    """Hugging Face folder to check instead of a small random one."""
    quick: bool
    out: Path
    data: Path | None
    """Folder with public data; None: what needs it is not run."""

    @property
    def model(self) -> Path:
        """Return the folder that the gates start from: ``hf``, or what the conversion part makes."""
        return self.hf or self.out / "conversion" / "model"

    @property
    def round_trip(self) -> Path:
        """Return the folder that the conversion part writes last."""
        return self.out / "conversion" / "back"

    @cached_property
    def weight_bytes(self) -> int:
        """Return the size of ``hf``'s files."""
        return sum(file.stat().st_size for file in self.hf.iterdir() if file.is_file()) if self.hf else 0

    @cached_property
    def is_fp8(self) -> bool:
        """Return whether ``hf`` is stored in FP8."""
        return self.hf is not None and "quantization_config" in _config(self.hf)

    @cached_property
    def is_dense(self) -> bool:
        """Return whether ``hf`` is a model without routed experts.

        Raises:
            ConfigError: If it is none of the supported models.
        """
        return self.hf is not None and read_model_shape(self.hf).num_experts == 0


def read_request(hf: Path | None, *, quick: bool, out: Path) -> Request:
    """Return the request with absolute paths.

    Raises:
        ConfigError: If a folder that it names is not there, or ``hf`` has no readable config.json.
    """
    named = os.environ.get("MEGATRON_ADS_DATA")
    data = Path(named).resolve() if named else None
    if data is not None and not data.is_dir():
        raise ConfigError(f"MEGATRON_ADS_DATA: there is no folder {data}. Name one, or leave it unset.")
    if hf is not None:
        hf = hf.resolve()
        _config(hf)
    return Request(hf=hf, quick=quick, out=out.resolve(), data=data)


def _config(folder: Path) -> dict[str, object]:
    try:
        value: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"--hf {folder} has no readable config.json. Give the folder of a checkpoint.") from None
    return value
