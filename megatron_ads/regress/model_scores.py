"""What one model made of the suite: a score for every question, kept in a file that later releases compare with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from conversion.atomic_file import write_small
from megatron_ads.errors import DataError

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question and what became of it."""

    question: str
    """Task and number; the same for every model."""
    asked: str
    """Digest of the question itself, by which a changed data set is noticed."""
    score: float
    answer: str
    """What was written, reasoning left out, or the number of the choice that was the most probable."""
    finished: bool
    """False: the answer was cut off, or never came out of its reasoning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkScores:
    """One benchmark of one model."""

    name: str
    settings: Mapping[str, Any]
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelScores:
    """All benchmarks of one model."""

    model: str
    chat: bool
    """Whether written answers were asked for by the chat template."""
    limit: int | None
    """Questions of each task; None: all."""
    benchmarks: tuple[BenchmarkScores, ...]
    provenance: Mapping[str, Any]

    def write(self, file: Path) -> None:
        """Write all of it as JSON, whole or not at all."""
        write_small(file, json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return what ``write`` wrote.

        Raises:
            DataError: If it is something else.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("of another version")
            benchmarks = [
                BenchmarkScores(**{**one, "items": tuple(Item(**item) for item in one["items"])})
                for one in values.pop("benchmarks")
            ]
            return cls(benchmarks=tuple(benchmarks), **values)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise DataError(
                f"{file} does not hold the scores of a model ({error}). Give a file that regress wrote, such as "
                "OUT/base.json, or a model."
            ) from None
