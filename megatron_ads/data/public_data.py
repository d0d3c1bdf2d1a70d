"""Where public data are: below the folder that ``MEGATRON_ADS_DATA`` names, or at a path of one's own."""

import os
from pathlib import Path

from megatron_ads.errors import DataError

DATA_ROOT = "MEGATRON_ADS_DATA"


def locate(path: str | None, file: Path, *, kind: str) -> Path:
    """Return where a file of public data is.

    Args:
        path: The file, or the folder that holds it; None: below the data root.
        file: Its place below the data root.
        kind: The source kind that reads it.

    Raises:
        DataError: If neither ``path`` nor the environment names anything.
    """
    if path is not None:
        given = Path(path)
        return given if given.suffix == file.suffix else given / file.name
    root = os.environ.get(DATA_ROOT)
    if not root:
        raise DataError(
            f"The source kind {kind} reads {file} below the folder that the environment variable {DATA_ROOT} names, "
            f"and it names none. Set {DATA_ROOT}, or the source's path, or choose data=simulator."
        )
    return Path(root) / file
