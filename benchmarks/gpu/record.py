"""What one step of the GPU benchmark found, written line by line: a step that dies keeps what it had found."""

import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Found:
    """What a step has found so far."""

    figures: dict[str, Any] = field(default_factory=dict)
    headlines: list[str] = field(default_factory=list)
    """The figures that matter, in words, for the table."""
    findings: list[str] = field(default_factory=list)
    """What is not as it should be."""
    skipped: str | None = None
    """Why the step measured nothing."""


class Record:
    """A step's figures and findings; ``dry_run`` tells the step to take tiny sizes."""

    def __init__(self, file: Path | None = None, *, dry_run: bool = False) -> None:
        """Append every entry to ``file``; None keeps them in memory only."""
        self.dry_run = dry_run
        self.found = Found()
        self._file = file

    def figure(self, name: str, value: Any, headline: str = "") -> None:
        """Keep one JSON value, and say it in words in the table where there is a ``headline``."""
        self._append({"figure": name, "value": value, "headline": headline})

    def check(self, holds: bool, finding: str) -> None:
        """Note ``finding`` unless ``holds``; the step continues."""
        if not holds:
            self._append({"finding": finding})

    def skip(self, reason: str) -> None:
        """Say why the step measures nothing."""
        self._append({"skipped": reason})

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turn an error of one part of a step into a finding, so that the other parts still run."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - what fails on a GPU for the first time is what is looked for
            traceback.print_exc(file=sys.stderr)
            self.check(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _append(self, entry: dict[str, Any]) -> None:
        _take(self.found, entry)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry) + "\n")


def read_record(file: Path) -> Found:
    """Return what a step wrote before it ended, however it did; a line that was cut off is left out."""
    found = Found()
    lines: Iterable[str] = file.read_text(encoding="utf-8").splitlines() if file.exists() else ()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        _take(found, entry)
    return found


def _take(found: Found, entry: dict[str, Any]) -> None:
    if "figure" in entry:
        found.figures[entry["figure"]] = entry["value"]
        found.headlines += [entry["headline"]] if entry["headline"] else []
    elif "finding" in entry:
        found.findings.append(entry["finding"])
    else:
        found.skipped = entry["skipped"]
