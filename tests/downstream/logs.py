"""Logs for the tests: a simulation, and a team's tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ads.config.downstream import DownstreamConfig, load_downstream
from megatron_ads.data.simulator.folder import Scale, write_logs
from megatron_ads.data.simulator.world import draw_world

SETTINGS = ("retriever.epochs=6", "ranker.epochs=4", "held_out=0.25", "buckets=4096")


def write_simulated(folder: Path, *, users: int) -> Path:
    """Write the logs of a small simulation, with the manifest that tells it from a team's."""
    scale = Scale(users=users, days=28)
    folder.mkdir()
    write_logs(folder, draw_world(0), scale)
    (folder / "manifest.json").write_text("{}")
    return folder


def settings(*overrides: str) -> DownstreamConfig:
    return load_downstream([*SETTINGS, *overrides], "test")


TABLES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "items": [{"item": "Acme Shoes", "text": "running shoes"}, {"item": "Blue Travel", "text": "flights, hotels"}],
    "events": [
        {"user": "u1", "time": "2025-03-01T10:00", "event": "onsite_search", "text": "running shoes", "age": "25-34"},
        {"user": "u1", "time": "2025-03-10T10:00", "event": "onsite_search", "text": "flights to rome"},
        {
            "user": "u1",
            "time": "2025-03-10T10:30",
            "event": "matched_conversion",
            "text": "flights",
            "advertiser": "Blue Travel",
        },
        {"user": "u2", "time": "2025-03-02T10:00", "event": "page_view", "text": "hotels"},
    ],
    "impressions": [
        {
            "user": "u1",
            "time": "2025-03-10T10:00",
            "item": "blue travel",
            "clicked": 1,
            "converted": True,
            "query": "x",
        },
        {"user": "u2", "time": "2025-03-09T10:00", "item": "Acme Shoes", "clicked": False, "converted": False},
    ],
}


def write_tables(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]] = TABLES) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
