"""Rows prepared by ``megatron-ads data prepare`` next to the tokenizer alone, and how full the rows of steps are."""

import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from benchmarks.data import prepare, start, tokenizer_speed, write_rows
from benchmarks.speed.measure import Comparison, Effort, Share, in_turn

_TOKENS = 800
_LEAST_FILLED = 0.98
_ROUNDS = 5


def data(effort: Effort) -> Iterator[Comparison | Share]:
    """Prepare rows next to the tokenizer alone, then see how full the rows of a job's steps are."""
    rows = 2000 if effort.quick else 20_000
    yield from _prepared(effort, rows, "data")
    found = start(_corpora(effort) / "0", _file(effort, rows))
    about = "share of the positions of a job's rows of 4096 tokens that hold tokens"
    yield Share(name="data/filled", about=about, value=found["filled"], least=_LEAST_FILLED)


def growth(effort: Effort) -> Iterator[Comparison]:
    """Prepare more and more rows."""
    for rows in (1000, 4000) if effort.quick else (5000, 20_000, 80_000):
        first, *_ = _prepared(effort, rows, f"growth/rows/{rows}", of_curve=True)
        yield first
        shutil.rmtree(_corpora(effort))


def _prepared(effort: Effort, rows: int, name: str, *, of_curve: bool = False) -> Iterator[Comparison]:
    """Compare by the clock, and by the time of the processors, which a busy machine changes less."""
    file, numbers = _file(effort, rows), count()
    tokens: list[int] = []
    cpu: dict[str, list[float]] = {"work": [], "reference": []}

    def prepared() -> float:
        began = time.perf_counter()
        made, usage = prepare(file, _corpora(effort) / str(next(numbers)), workers=1)
        cpu["work"].append(usage["cpu_seconds"])
        tokens.append(made["tokens"])
        return time.perf_counter() - began

    def tokenized() -> float:
        speed, cpu_speed = tokenizer_speed(file, 1)
        cpu["reference"].append(rows / cpu_speed)
        return rows / speed

    works = {"reference": tokenized, "work": prepared}
    found = in_turn(works, seconds=effort.seconds, least=_ROUNDS, warm_up=0)
    for by, taken in (("processor", cpu), ("clock", found)):
        yield Comparison(
            name=name if of_curve else f"{name}/prepare, by the {by}",
            work=f"megatron-ads data prepare of {rows} rows of {_TOKENS} tokens by one process, which is started",
            reference="DeepSeek's tokenizer alone on the same texts",
            work_seconds=taken["work"],
            reference_seconds=taken["reference"],
            tolerance=0.15,
            growth=("rows", rows) if of_curve else None,
            figures={"tokens": tokens[-1]},
        )


def _file(effort: Effort, rows: int) -> Path:
    return write_rows(effort.folder / f"rows-{rows}.jsonl", rows, _TOKENS)


def _corpora(effort: Effort) -> Path:
    return effort.folder / "corpora"
