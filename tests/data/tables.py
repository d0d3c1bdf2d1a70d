"""Tables as other programs write them, without this project's code."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from megatron_ads.config.data import AdsTask

PAIR = {"query": "q", "title": "t", "label": "l"}
COLUMNS = {"id": "i", **PAIR}
PAIRS = AdsTask.query_ad_relevance
FORMATS = ("jsonl", "parquet", "csv", "csv.gz", "JSONL.bz2", "CSV", "tsv", "ndjson", "pq")
EVENTS = {"user": "u", "time": "t", "event": "e", "text": "x", "advertiser": "a"}


def plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | list) else str(value)


def write(folder: Path, form: str, table: pa.Table, name: str = "rows") -> Path:
    """Write a table as another program would, without this project's code."""
    folder.mkdir(parents=True, exist_ok=True)
    file, kind = folder / f"{name}.{form}", form.lower().split(".")[0]
    if kind in ("parquet", "pq"):
        pq.write_table(table, file)
        return file
    if kind in ("csv", "tsv"):
        sink = pa.BufferOutputStream()
        table = pa.table(
            {
                column: table[column].cast(pa.string()) if pa.types.is_decimal(table[column].type) else table[column]
                for column in table.column_names
            }
        )
        pa_csv.write_csv(table, sink, pa_csv.WriteOptions(delimiter="," if kind == "csv" else "\t"))
        content = sink.getvalue().to_pybytes()
    else:
        table = pa.table({
            name: column.cast(pa.string()) if column.type == pa.timestamp("ns") else column
            for name, column in zip(table.column_names, table.columns, strict=True)
        })  # fmt: skip
        rows = [{key: plain(cell) for key, cell in row.items()} for row in table.to_pylist()]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = (
        gzip.compress(content) if form.endswith(".gz") else bz2.compress(content) if form.endswith(".bz2") else content
    )
    file.write_bytes(packed)
    return file


def log(times: Any, kinds: list[str], texts: list[str | None], shops: list[str | None]) -> pa.Table:
    return pa.table({"u": [5] * len(kinds), "t": times, "e": kinds, "x": texts, "a": pa.array(shops, pa.string())})


def pairs(**columns: Any) -> pa.Table:
    rows = {"i": ["a", "b"], "q": ["tent", "sofa"], "t": ["Big Tent", "Sofa"], "l": ["Good", "Bad"]}
    return pa.table({**rows, **columns})
