"""Draw the users of a world in pieces of a fixed size: memory is bounded, and more users change no earlier one."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_ads.data.simulator.behaviour import EVENT_TABLES, Behaviour, Simulation
from megatron_ads.data.simulator.logs import SCHEMAS, still_tables, tables_of
from megatron_ads.data.simulator.population import Population, draw_population, segment_priors
from megatron_ads.data.simulator.preferences import Moment
from megatron_ads.data.simulator.sessions import Columns
from megatron_ads.data.simulator.tables import TableFormat, open_table
from megatron_ads.data.simulator.world import DEFAULT_ADVERTISERS, World
from megatron_ads.errors import ConfigError
from megatron_ads.progress import Progress

PIECE = 2048
"""Users drawn at once; decides which users a seed gives, so it is not a setting."""
_R = TypeVar("_R", Population, Moment | None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some users and what they did."""

    people: Population
    behaviour: Behaviour


def draw_pieces(world: World, *, users: int, days: int, anchor: int | None = None) -> Iterator[Piece]:
    """Yield the first ``users`` users of a world, ``PIECE`` at a time; the last piece may be smaller.

    Who a user is, and what happens on a day, depends on the world alone: more users or days change nothing earlier.
    """
    simulation, priors = Simulation(world), segment_priors(world.seed)
    for number, first in enumerate(range(0, users, PIECE)):
        draw = np.random.default_rng([world.seed, 2, number])
        people = draw_population(draw, priors, first_user=first, count=PIECE)
        piece = Piece(people=people, behaviour=simulation.run(people, draw, days=days, anchor=anchor))
        yield piece if users - first >= PIECE else _first_users(piece, users - first)


def _first_users(piece: Piece, count: int) -> Piece:
    """Return a piece without the users from number ``count`` on."""
    behaviour = piece.behaviour
    tables: dict[str, Any] = {name: _rows_of(getattr(behaviour, name), count) for name in EVENT_TABLES}
    moments: dict[str, Any] = {name: _cut(getattr(behaviour, name), count) for name in ("known", "true")}
    return Piece(people=_cut(piece.people, count), behaviour=replace(behaviour, **tables, **moments))


def _rows_of(table: Columns, count: int) -> Columns:
    end = int(np.searchsorted(table["user"], count))
    return {name: column[:end] for name, column in table.items()}


def _cut(record: _R, count: int) -> _R:
    """Return a record whose arrays, all of one row a user, are cut."""
    if record is None:
        return record
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    shorter: dict[str, Any] = {key: value[:count] for key, value in values.items() if isinstance(value, np.ndarray)}
    return replace(record, **shorter)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is simulated."""

    users: int
    days: int
    seed: int = 0
    advertisers: int = DEFAULT_ADVERTISERS

    def __post_init__(self) -> None:
        for name in ("users", "days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def write_logs(folder: Path, world: World, scale: Scale, *, form: TableFormat = TableFormat.parquet) -> dict[str, int]:
    """Write every table of a simulation into a folder, piece by piece; return the rows of each."""
    rows: dict[str, int] = {}
    for name, table in still_tables(world).items():
        writer = open_table(folder, name, table.schema, form=form)
        writer.append(table)
        writer.close()
        rows[name] = table.num_rows
    rows |= dict.fromkeys(SCHEMAS, 0)
    writers = {name: open_table(folder, name, schema, form=form) for name, schema in SCHEMAS.items()}
    with Progress(scale.users, description="simulating", unit="user") as progress:
        for piece in draw_pieces(world, users=scale.users, days=scale.days):
            for name, table in tables_of(piece.people, piece.behaviour).items():
                writers[name].append(table)
                rows[name] += table.num_rows
            progress.update(len(piece.people.age_U))
    for writer in writers.values():
        writer.close()
    return rows
