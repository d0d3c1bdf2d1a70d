"""A folder of results that appears when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ads.errors import ConfigError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to ``out`` if nothing fails, and else removed.

    Raises:
        ConfigError: If ``out`` holds something, or is no folder.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder. Choose another one, or remove it.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
