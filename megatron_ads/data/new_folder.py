"""A folder of results that appears when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.atomic_file import sync_folder
from megatron_ads.disk import make_writable_folder
from megatron_ads.errors import ConfigError


def require_new(out: Path) -> None:
    """Refuse a folder that holds something, or cannot be written: before the work whose result it is to hold.

    Raises:
        ConfigError: If it holds something, or is no folder.
        OSError: If it cannot be written.
    """
    there = os.path.lexists(out)  # a link to nowhere is something too
    if there and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder. Choose another one, or remove it.")
    make_writable_folder(out)
    if not there:
        out.rmdir()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to ``out`` if nothing fails, and else removed.

    Raises:
        ConfigError: If ``out`` holds something, or is no folder.
        OSError: If it cannot be written.
    """
    require_new(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(out.absolute().parent)
