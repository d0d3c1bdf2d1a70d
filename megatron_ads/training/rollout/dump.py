"""The rollouts of one step with their rewards, as a file: JSON lines, the first of which tells of the whole step.

Steps are written below ``<log.dir>/rollouts``. A job that continues from an earlier checkpoint takes a step that was
finished from there, and ``train_only`` jobs take all of theirs.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.atomic_file import write_small
from megatron_ads.config.rl import RlConfig
from megatron_ads.errors import DataError
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredStep:
    """What one step is trained on."""

    rollouts: list[Rollout]
    """Groups are consecutive, and numbered from 0."""
    rewards: dict[str, NDArray[np.float64]]
    """(N,) by name; NaN where a rollout has none."""
    faults: Counter[str] = field(default_factory=Counter)
    """Rollouts without a reward because something went wrong, by ``REWARD/FAULT``."""
    draws: int = 1
    """How often prompts were drawn for it."""
    generated: int = 0
    """Answers, those of groups that were replaced included."""


def step_settings(config: RlConfig) -> dict[str, int]:
    """Return the settings that say how large a step is and what its loss is scaled by, by their names in a recipe."""
    return {
        "train.global_batch_size": config.train.global_batch_size,
        "rollout.samples": config.rollout.samples,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
    }


def step_file(folder: Path, step: int) -> Path:
    """Return where a step's rollouts are written."""
    return folder / f"step-{step:06d}.jsonl"


def write_step(file: Path, found: ScoredStep, header: Mapping[str, Any]) -> None:
    """Write a step at once and whole; ``header`` is what else its first line has, ``settings`` among it."""
    numbers = {"rollouts": len(found.rollouts), "draws": found.draws, "generated": found.generated}
    lines: list[Mapping[str, Any]] = [{**header, **numbers, "faults": dict(found.faults)}]
    for place, rollout in enumerate(found.rollouts):
        values = {name: float(values[place]) for name, values in found.rewards.items()}
        lines.append(rollout.as_record() | {"rewards": {n: None if np.isnan(v) else v for n, v in values.items()}})
    write_small(file, "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines))


def read_header(file: Path) -> dict[str, Any]:
    """Return the first line of a step's file; empty if there is none that can be read."""
    try:
        with file.open(encoding="utf-8") as lines:
            header = json.loads(lines.readline())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def read_step(file: Path, rows: Mapping[str, ChatRow]) -> ScoredStep:
    """Return what ``write_step`` wrote.

    Raises:
        DataError: If it is damaged or cut, or has answers to rows that are not there.
    """
    try:
        header, *records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        if len(records) != header["rollouts"]:
            raise DataError(
                f"{file} has {len(records)} of the {header['rollouts']} rollouts that were written to it. Copy it "
                "again, or delete it and have the job that wrote it make it again."
            )
        rewards = [record.pop("rewards") for record in records]
        if missing := [record["row"] for record in records if record["row"] not in rows]:
            raise DataError(
                f"{file} has answers to row {missing[0]!r}, which is not in data.sources, or was left out. Use the "
                "data that the rollouts were made with."
            )
        return ScoredStep(
            rollouts=[Rollout.from_record(record, rows) for record in records],
            rewards={
                name: np.array([np.nan if of[name] is None else of[name] for of in rewards], dtype=np.float64)
                for name in rewards[0]
            },
            faults=Counter(header["faults"]),
            draws=header["draws"],
            generated=header["generated"],
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read as the rollouts of a step ({error}). Make them again.") from None


def recorded_file(folder: Path, step: int) -> Path:
    """Return the file of a step of another job.

    Raises:
        DataError: If there is none.
    """
    file = step_file(folder, step)
    if not file.is_file():
        raise DataError(
            f"{folder} (rollout.dump) has no {file.name}. Name the folder <log.dir>/rollouts of a job of as many "
            "steps, or lower train.max_steps."
        )
    return file


def read_recorded(
    folder: Path,
    step: int,
    rows: Mapping[str, ChatRow],
    rewards: Sequence[str],
    settings: Mapping[str, int],
    *,
    by_teacher: bool = False,
) -> ScoredStep:
    """Return a step of another job's rollouts, with the named rewards, and what its teacher said if that is wanted.

    ``settings`` are the ``step_settings`` of this job.

    Raises:
        DataError: If there is none, it is damaged or cut, of other rows, made with other settings, or without one of
            the rewards or the teacher.
    """
    file = recorded_file(folder, step)
    found = read_step(file, rows)
    require_settings(file, settings)
    if missing := [name for name in rewards if name not in found.rewards]:
        raise DataError(
            f"{file} has no reward {', '.join(missing)} (rewards.use), only {', '.join(found.rewards)}. Use those."
        )
    if by_teacher and all(rollout.teacher_log_probabilities is None for rollout in found.rollouts):
        raise DataError(f"{file} has nothing of a teacher, and teacher.model names one. Use rollouts of a job with it.")
    return replace(
        found,
        rewards={name: found.rewards[name] for name in rewards},
        rollouts=found.rollouts if by_teacher else [_untaught(rollout) for rollout in found.rollouts],
    )


def require_settings(file: Path, settings: Mapping[str, int]) -> None:
    """Refuse a file of rollouts that were made with other ``step_settings`` than those of this job.

    Raises:
        DataError: Naming the first that differs, and both values; or if the file names none.
    """
    there = read_header(file).get("settings")
    if not isinstance(there, dict):
        raise DataError(f"{file} does not say with which settings it was made. Make it again.")
    for name, value in settings.items():
        if there.get(name) != value:
            raise DataError(
                f"{file} was made with {name} = {there.get(name)}, and this job has {value}. Set it to "
                f"{there.get(name)}, or name the rollouts of another job in rollout.dump."
            )


def _untaught(rollout: Rollout) -> Rollout:
    return replace(rollout, teacher_log_probabilities=None)
