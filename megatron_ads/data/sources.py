"""Read the rows of one configured source."""

import os
from pathlib import Path

from megatron_ads.config import SourceConfig, SourceKind
from megatron_ads.data.ads_pairs import DEFAULT_ROWS, builtin_rows
from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError

DATA_ROOT = "MEGATRON_ADS_DATA"
"""Environment variable that names the folder of public data sets."""


def read_source(source: SourceConfig, *, seed: int) -> list[ChatRow]:
    """Return the rows of ``source``, at most ``source.rows`` of them.

    Raises:
        DataError: If a file is missing or a row in it is malformed.
    """
    if source.kind is SourceKind.builtin:
        return builtin_rows(source.rows or DEFAULT_ROWS, seed=seed)
    if source.kind is SourceKind.esci:
        from megatron_ads.data.esci import esci_rows

        rows = esci_rows(Path(source.path) if source.path else _data_root() / "esci_us" / "pairs.jsonl")
    else:
        from megatron_ads.data.jsonl import jsonl_rows

        rows = jsonl_rows(Path(source.path or ""))
    return list(rows)[: source.rows]


def _data_root() -> Path:
    root = os.environ.get(DATA_ROOT)
    if not root:
        raise DataError(
            f"data.sources asks for public data, but {DATA_ROOT} is not set. Point it at the folder with "
            "esci_us/pairs.jsonl, or choose data=builtin."
        )
    return Path(root)
