"""The tables of the simulated logs, written piece by piece as Parquet or JSON lines in bounded memory.

Users, advertisers, ads and queries are named by numbers, with their texts in tables of their own. ``click_chance`` and
``conversion_chance`` are the true probabilities, for comparison: no model may be given them. ``seconds`` is how long
who clicked stayed on the page behind an ad.
"""

import json
import os
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_ads.data.simulator.behaviour import EVENT_TABLES, MINUTES, Behaviour, Columns
from megatron_ads.data.simulator.histories import item_of
from megatron_ads.data.simulator.vocabulary import AGES, DEPARTMENTS, GENDERS, KINDS, PLACES, PRICES, wanted_by
from megatron_ads.data.simulator.world import Advertiser, World, department_of

START = datetime(2025, 1, 6, tzinfo=UTC)
"""Midnight that day 0 begins with."""

_TIME = pa.timestamp("s", tz="UTC")
_EVENT = [("user", pa.int64()), ("time", _TIME)]
SCHEMAS: dict[str, pa.Schema] = {
    "users": pa.schema([
        ("user", pa.int64()), ("age", pa.string()), ("gender", pa.string()), ("place", pa.string()),
        ("price_level", pa.string()),
    ]),
    "sessions": pa.schema([*_EVENT, ("onsite", pa.bool_()), ("query", pa.int32()), ("kind", pa.int32())]),
    "impressions": pa.schema([
        *_EVENT, ("query", pa.int32()), ("slot", pa.int8()), ("ad", pa.int32()), ("clicked", pa.bool_()),
        ("converted", pa.bool_()), ("seconds", pa.int32()), ("click_chance", pa.float32()),
        ("conversion_chance", pa.float32()),
    ]),
    "conversions": pa.schema([
        *_EVENT, ("kind", pa.int32()), ("advertiser", pa.int32()), ("attributed", pa.bool_()), ("ad", pa.int32()),
    ]),
    "visits": pa.schema([*_EVENT, ("kind", pa.int32()), ("advertiser", pa.int32())]),
}  # fmt: skip
"""Tables that grow with the users."""


def tables_of(piece: Behaviour) -> dict[str, pa.Table]:
    """Return one piece of every growing table."""
    people = piece.people
    columns: dict[str, Columns] = {
        "users": {
            "user": np.arange(len(people.age_U)),
            "age": np.array(AGES)[people.age_U],
            "gender": np.array(GENDERS)[people.gender_U],
            "place": np.array(PLACES)[people.place_U],
            "price_level": np.array(PRICES)[people.price_U],
        }
    }
    for name in EVENT_TABLES:
        events: Columns = getattr(piece, name)
        minutes = events["day"] * MINUTES + events["minute"]
        columns[name] = {**events, "time": int(START.timestamp()) + minutes * 60}
    for table in columns.values():
        table["user"] = table["user"] + people.first_user
    tables = {}
    for name, schema in SCHEMAS.items():
        arrays = [pa.array(columns[name][column.name]).cast(column.type) for column in schema]
        tables[name] = pa.Table.from_arrays(arrays, schema=schema)
    return tables


def still_tables(world: World) -> dict[str, pa.Table]:
    """Return the tables whose size does not depend on the number of users."""
    rows: dict[str, list[dict[str, Any]]] = {
        "kinds": [
            {"kind": number, "name": kind.name, "department": DEPARTMENTS[department_of(number)].name}
            for number, kind in enumerate(KINDS)
        ],
        "advertisers": [
            {"advertiser": number, "name": shop.name, "domain": shop.domain, "kinds": list(shop.kinds),
             "price_level": PRICES[shop.price], "place": None if shop.place is None else PLACES[shop.place]}
            for number, shop in enumerate(world.advertisers)
        ],
        "ads": [
            {"ad": number, "advertiser": ad.advertiser, "kind": ad.kind, "brand": world.brand_names[ad.brand],
             "title": ad.title, "description": ad.description, "url": ad.url}
            for number, ad in enumerate(world.ads)
        ],
        "queries": [
            {"query": number, "text": text, "kind": wanted_by(number, world.brands_of_kind).kind}
            for number, text in enumerate(world.queries)
        ],
        "items": [
            {"item": item_of(number, kind), "advertiser": number, "kind": kind, "text": _item_text(shop, kind)}
            for number, shop in enumerate(world.advertisers)
            for kind in shop.kinds
        ],
    }  # fmt: skip
    return {name: pa.Table.from_pylist(table) for name, table in rows.items()}


def _item_text(shop: Advertiser, kind: int) -> str:
    """Return what is known of what a shop sells of a kind, some of which no prompt about its buyers says."""
    place = "everywhere" if shop.place is None else f"in {PLACES[shop.place]}"
    parts = (KINDS[kind].name, DEPARTMENTS[department_of(kind)].name, shop.name, f"{PRICES[shop.price]} price", place)
    return "; ".join(parts)


class TableFormat(StrEnum):
    """How tables are written."""

    parquet = "parquet"
    jsonl = "jsonl"


class TableWriter:
    """A Parquet or JSONL file that a table is appended to. It is complete, and on disk, once it is closed."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, form: TableFormat) -> None:
        """Open ``folder/name.parquet`` or ``folder/name.jsonl``."""
        self._file = (folder / f"{name}.{form}").open("wb")
        self._parquet = None
        if form is TableFormat.parquet:
            self._parquet = pq.ParquetWriter(self._file, schema, compression="zstd", compression_level=1)

    def append(self, table: pa.Table) -> None:
        """Write the rows of ``table`` after those written before, in Parquet as one row group."""
        if self._parquet is not None:
            self._parquet.write_table(table)
        else:
            self._file.writelines(map(_json_lines, table.to_batches(max_chunksize=20_000)))

    def close(self) -> None:
        """Finish the file and flush it to disk."""
        if self._parquet is not None:
            self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _json_lines(batch: pa.RecordBatch) -> bytes:
    """Return the rows of a batch as text, joined column by column: row by row it takes ten times as long."""
    pieces: list[Any] = []
    for number, name in enumerate(batch.schema.names):
        pieces += [f"{', ' if number else '{'}{json.dumps(name)}: ", _as_json(batch.column(number))]
    return "".join(pc.binary_join_element_wise(*pieces, "}\n", "").to_pylist()).encode()


def _as_json(column: pa.Array) -> pa.Array:
    """Return the values of a column as JSON texts."""
    if pa.types.is_boolean(column.type):
        texts = pc.if_else(column, "true", "false")
    elif pa.types.is_integer(column.type):
        texts = column.cast(pa.string())
    elif pa.types.is_floating(column.type):
        texts = column.cast(pa.float64()).cast(pa.string())
    elif pa.types.is_timestamp(column.type):
        texts = pc.strftime(column, format='"%Y-%m-%dT%H:%M:%S+00:00"')
    elif pa.types.is_string(column.type):
        distinct = column.dictionary_encode()
        words = [json.dumps(word, ensure_ascii=False) for word in distinct.dictionary.to_pylist()]
        texts = pa.array(words, pa.string()).take(distinct.indices)
    else:
        texts = pa.array([json.dumps(value) for value in column.to_pylist()], pa.string())
    return texts.fill_null("null")
