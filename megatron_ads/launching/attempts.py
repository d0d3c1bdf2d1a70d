"""What an attempt at a job came to, and whether another one is worth it.

An attempt that ended with a failure is followed by another, from the last checkpoint, as long as the job gets on:
only attempts that began at the checkpoint where the job still stands count towards the bound.

    <log.dir>/slurm/<job>/attempt-<n>/attempt.json      where it began
                                     /rank-0003.log     what each rank wrote
                                     /records/          how each rank ended
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_ads.runtime.health.rank_record import ExitStatus, RankRecord
from megatron_ads.training.checkpoint_folder import complete_checkpoints
from megatron_ads.training.outcome import Outcome

ATTEMPT = "attempt.json"


class Verdict(StrEnum):
    """What one attempt came to."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """A signal asked for it, and the checkpoint is saved."""
    REFUSED = "refused"
    """Something the user has to mend; another attempt would end in the same way."""
    FAILED = "failed"
    """A rank crashed, was killed, or lost another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do after an attempt."""

    again: bool
    status: ExitStatus
    reason: str


def judge(records: Sequence[RankRecord], ranks: int, outcome: Outcome | None) -> Verdict:
    """Say what an attempt of ``ranks`` ranks came to, from what they wrote down at their ends."""
    if any(record.status is ExitStatus.USER_ERROR for record in records):
        return Verdict.REFUSED
    if len(records) < ranks or any(record.failed for record in records) or outcome is None:
        return Verdict.FAILED
    return Verdict.FINISHED if outcome is Outcome.FINISHED else Verdict.STOPPED


def decide(verdict: Verdict, fruitless: int, most: int) -> Decision:
    """Return whether to try again.

    Args:
        verdict: Of the attempt that has ended.
        fruitless: Attempts, it included, that began at the checkpoint where the job stands now.
        most: How often an attempt may be repeated without getting on.
    """
    match verdict:
        case Verdict.FINISHED:
            return Decision(again=False, status=ExitStatus.DONE, reason="every step is done")
        case Verdict.REFUSED:
            reason = "not started again: this has to be mended first"
            return Decision(again=False, status=ExitStatus.USER_ERROR, reason=reason)
        case Verdict.STOPPED:
            reason = "stopped on request, with a checkpoint; going on from it"
            return Decision(again=True, status=ExitStatus.STOPPED, reason=reason)
    if fruitless > most:
        reason = f"given up: {fruitless} attempts in a row ended before another checkpoint (at most {most} restarts)"
        return Decision(again=False, status=ExitStatus.CRASHED, reason=reason)
    reason = f"starting again from the last checkpoint; {fruitless} of at most {most + 1} attempts from there failed"
    return Decision(again=True, status=ExitStatus.CRASHED, reason=reason)


def checkpoint_step(directory: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    return max((step for step, _ in complete_checkpoints(directory)), default=0)


def fruitless_attempts(job_folder: Path, step: int) -> int:
    """Return how many attempts began at the checkpoint of ``step``."""
    return sum(json.loads(file.read_text())["step"] == step for file in job_folder.glob(f"attempt-*/{ATTEMPT}"))
