"""One part of the release check: its command lines, run with a time limit each, and what their results say."""

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from benchmarks.bounded_process import run_bounded
from megatron_ads.journal import digest_of


class Outcome(StrEnum):
    """How a part ended."""

    passed = "passed"
    failed = "failed"
    not_judged = "not judged"
    """It ran, and nothing it found has a limit."""
    not_run = "not run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One thing that was found, next to what it may be."""

    name: str
    value: str
    limit: str = ""
    passed: bool | None = None
    """None: it is not judged."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """What the results of a part say."""

    figures: Sequence[Figure] = ()
    left_out: Sequence[str] = ()
    """What of it was not run, and why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command line of a part."""

    name: str
    command: tuple[str, ...]
    limit_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is run, and how its results are read. It works in a folder of its own, ``OUT/NAME``."""

    name: str
    title: str
    """What it shows, in words."""
    steps: tuple[Step, ...] = ()
    """Run in order; the first that does not exit with 0 is the last."""
    read: Callable[[Path], Findings] | None = None
    """Reads the results in the part's folder; raises OSError, ValueError, LookupError, TypeError or SyntaxError if
    there are none. None: the exit status says all."""
    after: tuple[str, ...] = ()
    """Names of the parts whose results it needs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    continues: bool = False
    """Whether its command lines continue from what an interrupted run of the same left."""
    scratch: tuple[str, ...] = ()
    """What is removed from its folder when it has passed."""
    left_out: tuple[str, ...] = ()
    """What of it these command lines do not run, and why."""
    why_not: str = ""
    """Why it is not run at all."""

    def fingerprint(self, circumstances: object) -> str:
        """Return a digest of what decides the result."""
        return digest_of([self.name, [step.command for step in self.steps], dict(self.environment), circumstances])


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """What is known of a part; a line of the journal."""

    name: str
    title: str
    outcome: Outcome
    why: str = ""
    """Why it failed, or was not run."""
    figures: Sequence[Figure] = ()
    left_out: Sequence[str] = ()
    seconds: float = 0.0
    commands: Sequence[str] = ()
    fingerprint: str = ""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Return the result that ``asdict`` made ``record`` of."""
        figures = tuple(Figure(**one) for one in record["figures"])
        return cls(**{**record, "outcome": Outcome(record["outcome"]), "figures": figures})


def not_run(part: Part, why: str) -> PartResult:
    """Return the result of a part that is left out."""
    return PartResult(name=part.name, title=part.title, outcome=Outcome.not_run, why=why)


def run_part(part: Part, folder: Path, fingerprint: str) -> PartResult:
    """Run a part's command lines in the repository's folder and read what they left in ``folder``."""
    _prepare(part, folder, fingerprint)
    seconds, error = 0.0, ""
    for step in part.steps:
        log = folder / f"{step.name}.log"
        ended = run_bounded(step.command, log, name=step.name, seconds=step.limit_seconds, environment=part.environment)
        seconds += ended.seconds
        if ended.error:
            error = f"{step.name} {ended.error}" if ended.exit_status is None else f"{step.name}: {ended.error}"
            break
    findings, unreadable = _read(part, folder, error)
    outcome, why = _judge(findings, error, unreadable)
    if outcome is Outcome.passed:
        for name in part.scratch:
            shutil.rmtree(folder / name, ignore_errors=True)
    return PartResult(
        name=part.name,
        title=part.title,
        outcome=outcome,
        why=why,
        figures=tuple(findings.figures),
        left_out=(*part.left_out, *findings.left_out),
        seconds=round(seconds, 1),
        commands=tuple(shlex.join(step.command) for step in part.steps),
        fingerprint=fingerprint,
    )


def _prepare(part: Part, folder: Path, fingerprint: str) -> None:
    """Empty the folder, except of what an interrupted run of the same part left and can be continued."""
    begun = folder / "begun"
    if not (part.continues and begun.exists() and begun.read_text(encoding="utf-8") == fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(fingerprint, encoding="utf-8")


def _read(part: Part, folder: Path, error: str) -> tuple[Findings, str]:
    if part.read is None:
        return Findings([Figure(name="exit status", value=error or "0", limit="0", passed=not error)]), ""
    try:
        return part.read(folder), ""
    except (OSError, ValueError, LookupError, TypeError, SyntaxError) as error:  # of XML: a SyntaxError
        return Findings(), f"its results cannot be read: {type(error).__name__}: {error}"


def _judge(findings: Findings, error: str, unreadable: str) -> tuple[Outcome, str]:
    missed = [figure.name for figure in findings.figures if figure.passed is False]
    if error or unreadable or missed:
        return Outcome.failed, error or unreadable or f"not within its limit: {', '.join(missed)}"
    if any(figure.passed for figure in findings.figures):
        return Outcome.passed, ""
    if findings.figures:
        return Outcome.not_judged, next(iter(findings.left_out), "nothing that it found has a limit")
    if findings.left_out:
        return Outcome.not_run, findings.left_out[0]
    return Outcome.failed, "it left no results"
