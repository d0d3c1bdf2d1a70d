"""The tables of the simulated logs: their columns, and how drawn numbers become them.

Users, advertisers, ads and queries are named by numbers, with their texts in tables of their own. ``click_chance`` and
``conversion_chance`` are the true probabilities, for comparison: no model may be given them.
"""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_ads.data.simulator.behaviour import EVENT_TABLES, Behaviour
from megatron_ads.data.simulator.population import Population
from megatron_ads.data.simulator.queries import wanted_by
from megatron_ads.data.simulator.sessions import Columns
from megatron_ads.data.simulator.vocabulary import AGES, DEPARTMENTS, GENDERS, KINDS, PLACES, PRICES
from megatron_ads.data.simulator.world import World, department_of

START = datetime(2025, 1, 6, tzinfo=UTC)
"""Midnight that day 0 begins with."""
_EPOCH_SECONDS = int(START.timestamp())

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
        ("converted", pa.bool_()), ("click_chance", pa.float32()), ("conversion_chance", pa.float32()),
    ]),
    "conversions": pa.schema([
        *_EVENT, ("kind", pa.int32()), ("advertiser", pa.int32()), ("attributed", pa.bool_()), ("ad", pa.int32()),
    ]),
    "visits": pa.schema([*_EVENT, ("kind", pa.int32()), ("advertiser", pa.int32())]),
}  # fmt: skip
"""Tables that grow with the users."""


def tables_of(people: Population, behaviour: Behaviour) -> dict[str, pa.Table]:
    """Return one piece of every growing table."""
    users = {
        "user": people.first_user + np.arange(len(people.age_U)),
        "age": np.array(AGES)[people.age_U],
        "gender": np.array(GENDERS)[people.gender_U],
        "place": np.array(PLACES)[people.place_U],
        "price_level": np.array(PRICES)[people.price_U],
    }
    tables = {"users": pa.table(users, schema=SCHEMAS["users"])}
    for name in EVENT_TABLES:
        tables[name] = _event_table(name, getattr(behaviour, name), people.first_user)
    return tables


def _event_table(name: str, columns: Columns, first_user: int) -> pa.Table:
    schema = SCHEMAS[name]
    seconds = _EPOCH_SECONDS + (columns["day"] * 24 * 60 + columns["minute"]) * 60
    ready = {**columns, "user": columns["user"] + first_user, "time": seconds}
    arrays = [pa.array(ready[field.name]).cast(field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def still_tables(world: World) -> dict[str, pa.Table]:
    """Return the tables that do not grow with the users."""
    rows: dict[str, list[dict[str, Any]]] = {
        "kinds": [
            {"kind": number, "name": kind.name, "department": DEPARTMENTS[department_of(number)].name}
            for number, kind in enumerate(KINDS)
        ],
        "advertisers": [
            {
                "advertiser": number,
                "name": shop.name,
                "domain": shop.domain,
                "kinds": list(shop.kinds),
                "price_level": PRICES[shop.price],
                "place": None if shop.place is None else PLACES[shop.place],
            }
            for number, shop in enumerate(world.advertisers)
        ],
        "ads": [
            {
                "ad": number,
                "advertiser": ad.advertiser,
                "kind": ad.kind,
                "brand": world.brand_names[ad.brand],
                "title": ad.title,
                "description": ad.description,
                "url": ad.url,
            }
            for number, ad in enumerate(world.ads)
        ],
        "queries": [
            {"query": number, "text": text, "kind": wanted_by(number, world.brands_of_kind).kind}
            for number, text in enumerate(world.queries)
        ],
    }
    return {name: pa.Table.from_pylist(table) for name, table in rows.items()}
