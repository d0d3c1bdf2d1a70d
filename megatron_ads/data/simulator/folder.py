"""A folder with a whole simulation: logs, rows, and a manifest that says what they are; it appears when complete."""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask
from megatron_ads.data.new_folder import new_folder
from megatron_ads.data.simulator.histories import LABEL_DAYS, draw_pieces
from megatron_ads.data.simulator.judging import Example, reachable_recall
from megatron_ads.data.simulator.logs import SCHEMAS, START, TableFormat, TableWriter, still_tables, tables_of
from megatron_ads.data.simulator.simulated_rows import TASKS_OF_USERS, examples_of
from megatron_ads.data.simulator.world import DEFAULT_ADVERTISERS, World, draw_world
from megatron_ads.errors import ConfigError
from megatron_ads.progress import Progress

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is simulated."""

    seed: int = 0
    users: int
    days: int
    advertisers: int = DEFAULT_ADVERTISERS

    def __post_init__(self) -> None:
        for name in ("users", "days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def write_simulation(
    out: Path, scale: Scale, *, tasks: Sequence[AdsTask] = (), rows: int = 0, form: TableFormat = TableFormat.parquet
) -> dict[str, Any]:
    """Write logs of a simulation, and at most ``rows`` rows of each of ``tasks``; return the manifest.

    Rows about users are made at the end of the day ``LABEL_DAYS`` before the last one, from what the logs hold before
    it; logs from after it tell the answers.

    Raises:
        ConfigError: If a number is too small, or the folder holds something.
    """
    history_days = scale.days - LABEL_DAYS
    if history_days < 1 and TASKS_OF_USERS.intersection(tasks):
        raise ConfigError(
            f"days is {scale.days}; rows about users need at least {LABEL_DAYS + 1}, of which the last {LABEL_DAYS} "
            "hold the answers. Simulate more days, or write rows of other tasks."
        )
    world = draw_world(scale.seed, advertisers=scale.advertisers)
    with new_folder(out) as partial:
        manifest: dict[str, Any] = {
            **asdict(scale),
            "first_day": START.date().isoformat(),
            "format": str(form),
            "rows_of_tables": write_logs(partial, world, scale, form=form),
            "anchor_day": history_days if TASKS_OF_USERS.intersection(tasks) else None,
            "tasks": {},
        }
        if tasks:
            (partial / "rows").mkdir()
        with Progress(len(tasks), description="writing rows", unit="task") as progress:
            for task in tasks:
                drawn = examples_of(world, task, history_days=history_days, users=scale.users)
                manifest["tasks"][str(task)] = write_examples(partial / "rows", str(task), islice(drawn, rows))
                progress.update()
        _write(partial / MANIFEST, [json.dumps(manifest, indent=2)])
    return manifest


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text and flush them to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def write_logs(folder: Path, world: World, scale: Scale, *, form: TableFormat = TableFormat.parquet) -> dict[str, int]:
    """Write every table of a simulation into a folder, piece by piece; return the rows of each."""
    rows: dict[str, int] = {}
    for name, table in still_tables(world).items():
        with closing(TableWriter(folder, name, table.schema, form)) as writer:
            writer.append(table)
        rows[name] = table.num_rows
    rows |= dict.fromkeys(SCHEMAS, 0)
    with ExitStack() as files:
        writers = {
            name: files.enter_context(closing(TableWriter(folder, name, schema, form)))
            for name, schema in SCHEMAS.items()
        }
        progress = files.enter_context(Progress(scale.users, description="simulating", unit="user"))
        for piece in draw_pieces(world, users=scale.users, days=scale.days):
            for name, table in tables_of(piece).items():
                writers[name].append(table)
                rows[name] += table.num_rows
            progress.update(len(piece.people.age_U))
    return rows


REPORTED = (1, 5, 20)


def write_examples(folder: Path, name: str, examples: Iterable[Example]) -> dict[str, Any]:
    """Write ``name.jsonl`` and ``name.best.jsonl``; return how many rows there are and the best reachable scores."""
    written = list(examples)
    best = [{"id": example.row.id, "best": example.best, "chances": example.chances} for example in written]
    for suffix, records in (("", [example.row.as_dict() for example in written]), (".best", best)):
        _write(folder / f"{name}{suffix}.jsonl", (json.dumps(record, ensure_ascii=False) for record in records))
    if not written:
        return {"rows": 0}
    if max(len(example.best) for example in written) > 1:
        scores = {f"recall@{most}": reachable_recall(written, most) for most in REPORTED}
    else:
        score = "accuracy" if written[0].row.label is not None else "keeps_every_rule"
        scores = {score: reachable_recall(written, 1)}
    return {"rows": len(written), "best_reachable": scores}
