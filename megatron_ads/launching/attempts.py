"""The result of one attempt at a job, the report on its failure, and whether to make another attempt.

An attempt that failed is followed by another one from the last checkpoint, as long as the job makes progress: only
attempts that began at the newest checkpoint count towards the maximum.

    <log.dir>/slurm/<job>/attempt-<n>/attempt.json      the step where it began
                                     /rank-0003.log     what each rank wrote
                                     /records/          how each rank ended
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.layout import describe_ranks
from megatron_ads.runtime.health.rank_record import ExitStatus, RankRecord, first_failure
from megatron_ads.training.checkpoint_folder import complete_checkpoints
from megatron_ads.training.stopping import Outcome

ATTEMPT = "attempt.json"
_LOG_LINES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do after an attempt."""

    again: bool
    status: ExitStatus
    reason: str


def judge(records: Sequence[RankRecord], ranks: int, outcome: Outcome | None) -> ExitStatus:
    """Return how an attempt of ``ranks`` ranks ended, from their records; CRASHED wherever another may succeed."""
    for final in (ExitStatus.USER_ERROR, ExitStatus.DIVERGED):
        if any(record.status is final for record in records):
            return final
    if len(records) < ranks or any(record.failed for record in records) or outcome is None:
        return ExitStatus.CRASHED
    return ExitStatus.DONE if outcome is Outcome.FINISHED else ExitStatus.STOPPED


def decide(verdict: ExitStatus, fruitless: int, maximum: int) -> Decision:
    """Return whether to try again after an attempt that ended with ``verdict``.

    ``fruitless`` attempts, it included, began at the newest checkpoint; one may be repeated ``maximum`` times.
    """
    again, tries = False, f"{fruitless} attempts"
    match verdict:
        case ExitStatus.DONE:
            reason = "every step is done"
        case ExitStatus.USER_ERROR:
            reason = "not started again: this has to be fixed first"
        case ExitStatus.DIVERGED:
            reason = "not started again: the job has diverged"
        case ExitStatus.STOPPED:
            again, reason = True, "stopped on request, with a checkpoint; continuing from it"
        case _ if fruitless > maximum:
            reason = f"given up: {tries} in a row ended before another checkpoint (at most {maximum} restarts)"
        case _:
            again = True
            reason = f"starting again from the last checkpoint; {tries} from there failed (at most {maximum + 1})"
    return Decision(again=again, status=verdict, reason=reason)


def checkpoint_step(directory: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    return max((step for step, _ in complete_checkpoints(directory)), default=0)


def fruitless_attempts(job_folder: Path, step: int) -> int:
    """Return how many attempts began at the checkpoint of ``step``."""
    return sum(json.loads(file.read_text())["step"] == step for file in job_folder.glob(f"attempt-*/{ATTEMPT}"))


def describe_failure(records: Sequence[RankRecord], ranks: Collection[int], logs: Path | None) -> list[str]:
    """Return lines that describe a failure, the first failing rank first; none if nothing failed.

    ``records`` has the earliest first, ``ranks`` are those that were started, ``logs`` holds a file for each of them
    (None if they wrote to the terminal).
    """
    lines, silent = [], sorted(set(ranks) - {record.rank for record in records})
    first = first_failure(records)
    if first is not None and first.status is ExitStatus.PEER_LOST and silent:
        first = None  # the one that was lost comes first
    if first is not None:
        *before, last = first.message.splitlines() or [""]
        lines += [f"first failure: rank {first.rank} on {first.host}, {first.status.name}: {last}"]
        lines += _indented([*before, last]) if before else []
        lines += [] if logs is None else [f"its log: {_log(logs, first.rank)}"]
    if silent:
        lines.append(f"ended without a record (killed, out of memory, or its machine lost): {describe_ranks(silent)}")
        if logs is not None:
            lines.append(f"the end of {(log := _log(logs, silent[0]))}:")
            lines += _indented(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) if log.is_file() else []
    victims = [record for record in records if record.status is ExitStatus.PEER_LOST and record is not first]
    if victims:
        lines.append(f"lost a peer: {describe_ranks([record.rank for record in victims])}. {victims[0].message}")
    return lines


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.log"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
