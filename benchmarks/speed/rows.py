"""Rows prepared by ``megatron-ads data prepare`` next to the tokenizer alone, and how full the rows of steps are."""

import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from benchmarks.data import SEQ_LENGTH, STEP_ROWS, prepare, start, tokenizer_folder, tokenizer_speed, write_rows
from benchmarks.speed.measure import Comparison, Effort, Share, in_turn

_TOKENS = 800
_LEAST_FILLED = 0.98
_LEAST_FILLED_LONG = 0.96
"""Of samples that are a fifth of a row: what is left of a row is seldom as long as another one."""
_STEPS = 5
_TASKS = ("query_ad_relevance", "next_advertiser", "user_profile")


def data(effort: Effort) -> Iterator[Comparison | Share]:
    """Prepare rows next to the tokenizer alone, then see how full the rows of a job's steps are."""
    rows = 1000 if effort.quick else 20_000
    yield from _prepared(effort, rows, "data")
    found = start(_corpora(effort) / "0", _file(effort, rows))
    yield _filled("rows of 400 to 1000 tokens", found["filled"], least=_LEAST_FILLED_LONG)
    yield _filled("simulated ads tasks", _filled_by_ads(effort), least=_LEAST_FILLED)


def _filled(what: str, share: float, *, least: float) -> Share:
    about = f"share of the positions of a job's rows of {SEQ_LENGTH} tokens that hold tokens: {what}"
    return Share(name=f"data/filled, {what}", about=about, value=share, least=least)


def _filled_by_ads(effort: Effort) -> float:
    """Return how full the rows of some steps on simulated rows of short and long answers are."""
    from megatron_ads.config.recipes import load_job
    from megatron_ads.data.batches import BatchStream, ReplicaShare
    from megatron_ads.training.prepared_data import prepared_data

    sources = ", ".join(f"{{kind: simulator, task: {task}, rows: 1000}}" for task in _TASKS)
    settings = [f"data.sources=[{sources}]", f"data.seq_length={SEQ_LENGTH}", "data.prepare_workers=1"]
    config = load_job("sft/small", settings, sections=["data"]).data
    rows = prepared_data(config, tokenizer_folder(), effort.folder / "ads", by_task=False, evaluate=False)
    share = ReplicaShare(global_batch_size=STEP_ROWS, micro_batch_size=1, dp_rank=0, dp_size=1)
    stream = BatchStream(rows.training, share, seq_length=SEQ_LENGTH, packing=True, seed=0)
    batches = [batch for _ in range(_STEPS) for batch in stream.next_step()]
    return sum(batch.token_count for batch in batches) / sum(batch.tokens_BS.numel() for batch in batches)


def growth(effort: Effort) -> Iterator[Comparison]:
    """Prepare more and more rows."""
    for rows in (500, 2000) if effort.quick else (5000, 20_000, 80_000):
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
    found = in_turn(works, seconds=effort.seconds, warm_up=0)
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
