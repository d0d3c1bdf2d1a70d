"""What travels with the weights of a checkpoint: config, tokenizer, custom code, and small tensors of no parameter.

Some checkpoints store tensors that their config determines, such as rotary frequencies. No Megatron model holds them;
they are carried unchanged, so that an export has the keys its source had.
"""

import base64
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import naming_full_disk, sync_folder, tensor_bytes
from conversion.errors import naming_refusals
from conversion.names import DERIVED_BUFFER
from conversion.paths import is_lfs_pointer, leads_out
from conversion.safetensors_file import CODES, DTYPES, StoredTensor

SIDE_FOLDER = "hf"
"""Where a shards or torch_dist folder has them."""
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".npy"),
    *(".safetensors.index.json", ".bin.index.json", ".partial", ".pkl"),
)


@dataclass(frozen=True, slots=True)
class SideFiles:
    """What a folder has to carry."""

    names: tuple[str, ...] = ()
    """Relative to the folder."""
    nbytes: int = 0
    left_behind: tuple[str, ...] = ()
    """What cannot be carried although it seems to belong, each with the reason."""


def find_side_files(folder: Path, *, listed: Sequence[str] = (), weights: Sequence[Path] = ()) -> SideFiles:
    """Return the files to carry: top-level ones but weights, and subfolders of code (not of other checkpoints).

    Args:
        folder: A Hugging Face folder, or the ``hf/`` of another one.
        listed: Names that were there when the folder was written; those that are gone are left behind.
        weights: The files of the checkpoint itself; what is in a subfolder with them is passed over.
    """
    names, nbytes, left = [], 0, {}
    with naming_refusals(folder):
        found = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*"))}
        own = {file.relative_to(folder).parts[0] for file in weights if file.is_relative_to(folder)}
        checkpoints = {name.partition("/")[0] for name in found if "/" in name and name.lower().endswith(_WEIGHTS)}
        for name, file in found.items():
            top = name.partition("/")[0]
            if name.startswith(".") or "/." in name or name.lower().endswith(_WEIGHTS) or top in own:
                continue
            if top in checkpoints:
                left[top] = "holds weights of its own"
            elif (obstacle := _obstacle(folder, file)) is not None:
                left[name] = obstacle
            elif file.is_file():
                names.append(name)
                nbytes += file.stat().st_size
    gone = [name for name in listed if name not in {*found, "config.json"}]
    left |= dict.fromkeys(gone, "listed when the checkpoint was written, and gone")
    return SideFiles(tuple(names), nbytes, tuple(f"{name} ({reason})" for name, reason in left.items()))


def _obstacle(folder: Path, file: Path) -> str | None:
    if not file.exists():
        return "a link that leads nowhere"
    if file.is_dir():
        return "a linked folder" if file.is_symlink() else None
    if not file.is_file():
        return "not a regular file"
    if leads_out(folder, file):
        return "a link out of the folder"
    return "a Git LFS pointer; run git lfs pull" if is_lfs_pointer(file) else None


def copy_side_files(source: Path, target: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Copy the side files of ``source`` into ``target``, but those named in ``skip``; they are on disk afterwards."""
    with naming_full_disk(target):
        target.mkdir(parents=True, exist_ok=True)
        folders = {target}
        for name in find_side_files(source).names:
            if name not in skip:
                copy = target / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(source / name, copy)
                folders.add(copy.parent)
        for folder in folders:
            sync_folder(folder)


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # were it a link, its target would be overwritten
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


@dataclass(frozen=True, slots=True)
class DerivedBuffer:
    """One tensor that the config determines, bytes included."""

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
        if min(shape, default=0) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes cannot be {dtype} of shape {shape}")
        return cls(dtype, shape, data)

    def as_json(self) -> dict[str, str | list[int]]:
        """Return a form for a manifest."""
        data = base64.b64encode(self.data).decode()
        return {"dtype": CODES[self.dtype], "shape": list(self.shape), "base64": data}


@dataclass(frozen=True, slots=True)
class Carried:
    """What an export needs to have the keys and files of its source."""

    aliases: frozenset[str]
    """HF names of the repeated tensors that it must write."""
    derived: Mapping[str, DerivedBuffer]
    """Tensors that the config determines, by HF name."""
    side_files: tuple[str, ...] = ()
    """Which there were when the checkpoint was written; none in the record of an earlier version."""

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> "Carried":
        """Read it from a manifest.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: If it is of another form, or carries any other tensor.
        """
        derived = {name: DerivedBuffer.parse(stored) for name, stored in record["derived"].items()}
        if odd := [name for name in derived if not DERIVED_BUFFER.fullmatch(name)]:
            raise ValueError(f"{odd[0]} is not determined by the config")
        names = record.get("side_files", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("side_files is not a list of names")
        return cls(frozenset(record["aliases"]), derived, tuple(names))
