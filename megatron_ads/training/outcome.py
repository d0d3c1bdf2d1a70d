"""How a job ended, in a file: torchrun's exit status cannot tell "stopped on request" from "failed"."""

import json
from enum import StrEnum
from pathlib import Path

FILE = "outcome.json"


class Outcome(StrEnum):
    """The ways a job ends without an error."""

    FINISHED = "finished"
    """Every step is done and the weights are exported."""
    STOPPED = "stopped"
    """A signal asked for it; the checkpoint is saved and the same command goes on from there."""


def clear_outcome(directory: Path) -> None:
    """Forget how an earlier attempt ended, before a new one starts."""
    (directory / FILE).unlink(missing_ok=True)


def write_outcome(directory: Path, outcome: Outcome, step: int) -> None:
    """Record the end; one rank does."""
    from conversion.atomic_file import write_small  # imports torch, which the launcher does without

    write_small(directory / FILE, json.dumps({"outcome": outcome, "step": step}))


def read_outcome(directory: Path) -> Outcome | None:
    """Return how the last attempt ended; None if it did not come to its end."""
    try:
        return Outcome(json.loads((directory / FILE).read_text(encoding="utf-8"))["outcome"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
