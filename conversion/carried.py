"""What travels with the weights of a checkpoint: config, tokenizer, custom code, and small tensors of no parameter.

Some checkpoints store tensors that their config determines, such as rotary frequencies. No Megatron model holds them;
they are carried unchanged, so that an export has the keys its source had.
"""

import base64
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from conversion.atomic_file import naming_full_disk, sync_folder, tensor_bytes
from conversion.safetensors_file import CODES, DTYPES, HeaderEntry, StoredTensor

SIDE_FOLDER = "hf"
"""Where a shards or torch_dist folder has them."""
_NOT_CARRIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".partial")


def side_files(folder: Path) -> tuple[Path, ...]:
    """Return the files to carry, relative to ``folder``: top-level ones but weights, and subfolders of code."""
    found = [
        file.relative_to(folder)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not _is_left_behind(file.relative_to(folder))
    ]
    return tuple(found)


def _is_left_behind(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts) or file.name.endswith(_NOT_CARRIED)


def copy_side_files(source: Path, target: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Copy the side files of ``source`` into ``target``, but those named in ``skip``; they are on disk afterwards."""
    with naming_full_disk(target):
        target.mkdir(parents=True, exist_ok=True)
        folders = {target}
        for file in side_files(source):
            if str(file) not in skip:
                copy = target / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(source / file, copy)
                folders.add(copy.parent)
        for folder in folders:
            sync_folder(folder)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


@dataclass(frozen=True, slots=True)
class DerivedBuffer:
    """One such tensor, bytes included."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, stored: StoredTensor) -> "DerivedBuffer":
        """Read one from a file."""
        return cls(stored.dtype, stored.shape, bytes(tensor_bytes(stored.read())))

    @classmethod
    def parse(cls, entry: dict[str, str | list[int]]) -> "DerivedBuffer":
        """Read one from the form that :meth:`as_json` gives.

        Raises:
            LookupError, TypeError, ValueError: If ``entry`` is of another form.
        """
        dtype, shape = DTYPES[str(entry["dtype"])], tuple(int(extent) for extent in entry["shape"])
        data = base64.b64decode(str(entry["base64"]))
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes cannot be {dtype} of shape {shape}")
        return cls(dtype, shape, data)

    def as_json(self) -> dict[str, str | list[int]]:
        """Return a form for a manifest."""
        return {
            "dtype": CODES[self.dtype],
            "shape": list(self.shape),
            "base64": base64.b64encode(self.data).decode(),
        }

    def entry(self, name: str) -> HeaderEntry:
        """Return the header entry it is written under."""
        return HeaderEntry(name, self.dtype, self.shape)
