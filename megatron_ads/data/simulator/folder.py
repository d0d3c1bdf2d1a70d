"""A folder with a whole simulation: logs, rows, and a manifest that says what they are; it appears when complete."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ads.config.data import AdsTask
from megatron_ads.data.simulator.logs import START
from megatron_ads.data.simulator.row_files import write_examples
from megatron_ads.data.simulator.simulate import Scale, write_logs
from megatron_ads.data.simulator.simulated_rows import TASKS_OF_USERS, examples_of
from megatron_ads.data.simulator.tables import TableFormat, flush_file
from megatron_ads.data.simulator.user_examples import LABEL_DAYS
from megatron_ads.data.simulator.world import draw_world
from megatron_ads.errors import ConfigError
from megatron_ads.progress import Progress

MANIFEST = "manifest.json"


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
    with _new_folder(out) as partial:
        manifest: dict[str, Any] = {
            "seed": scale.seed,
            "users": scale.users,
            "days": scale.days,
            "advertisers": scale.advertisers,
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
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        flush_file(partial / MANIFEST)
    return manifest


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into; it gets the name ``out`` if nothing goes wrong."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder. Choose another one, or remove it.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if out.exists():
        out.rmdir()
    os.rename(partial, out)
