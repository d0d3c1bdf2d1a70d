"""The files beside the weights of a Hugging Face folder that must travel with them: config, tokenizer, custom code."""

import os
import shutil
from pathlib import Path

from conversion.atomic_file import naming_full_disk, sync_folder

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
