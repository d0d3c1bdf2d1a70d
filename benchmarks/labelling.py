"""What `megatron-ads label` itself costs: rows through an engine that answers at once, and its memory.

    python -m benchmarks.labelling --out DIR [--rows 1000000]

The rows are a table of query-ad pairs; the engine is an object of this process that gives every prompt the same
readable answer: what is left is reading, asking, parsing and writing, and the journal, which is on disk after every 64
answers. Next to it, in the same run: the same lines parsed as JSON and nothing else, which no job over them can be
faster than. Memory is the peak of this process and of the one that reads.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.sft_small import write_results
from megatron_ads.cli import exit_status
from megatron_ads.config.generation import GenerationConfig
from megatron_ads.config.labelling import LabelConfig, load_label_recipe
from megatron_ads.inference.engine import Completion, Engine
from megatron_ads.journal import Journal

_WORDS = ("running", "shoes", "leather", "sofa", "garden", "hose", "winter", "coat", "phone", "case", "coffee", "maker")
_ANSWER = "<think>The ad offers what the query asks for.</think><Label>Good</Label>"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``DIR/results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="empty or absent folder")
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="rows to label (default 1,000,000)")
    return exit_status("benchmarks.labelling", partial(_run, parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    from megatron_ads.labelling.job import run_job

    arguments.out.mkdir(parents=True, exist_ok=True)
    table = _write_rows(arguments.out / "pairs.jsonl", arguments.rows)
    started = time.monotonic()
    with table.open("rb") as lines:
        read = sum(1 for line in lines if json.loads(line))
    limit = time.monotonic() - started
    columns = "{id: key, query: search, title: ad, description: text}"
    own = arguments.out / "recipe.yaml"
    own.write_text("defaults: [/base_label, _self_]\n", encoding="utf-8")
    source = f"sources=[{{kind: table, path: '{table}', task: query_ad_relevance, columns: {columns}}}]"
    settings = [source, "model.url=http://localhost:9/v1", "model.model=immediate"]
    config = load_label_recipe(str(own), settings, out=str(arguments.out / "labels"))
    started = time.monotonic()
    run_job(config, _open_immediate)
    seconds = time.monotonic() - started
    files = sorted((arguments.out / "labels" / "labels").glob("*.parquet"))
    labelled = sum(pq.read_metadata(file).num_rows for file in files)
    found = {
        "rows": arguments.rows,
        "labelled": labelled,
        "seconds": seconds,
        "rows_per_second": labelled / seconds,
        "json_alone_rows_per_second": read / limit,
        "peak_bytes": _peak(resource.RUSAGE_SELF),
        "peak_bytes_of_the_reader": _peak(resource.RUSAGE_CHILDREN),
    }
    write_results(arguments.out, found, "".join(f"| {name} | {value:,.1f} |\n" for name, value in found.items()))
    return 0 if labelled == arguments.rows else 1


def _write_rows(file: Path, count: int) -> Path:
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            one, other = _WORDS[number % len(_WORDS)], _WORDS[number // 7 % len(_WORDS)]
            row = {
                "key": f"r{number}", "search": f"{one} {other} {number % 5000}", "ad": f"{other} {one}, model {number}",
                "text": f"Buy {one} for your {other} today, delivered in {number % 9 + 1} days.",
            }  # fmt: skip
            lines.write(json.dumps(row) + "\n")
    return file


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


@dataclass(frozen=True, slots=True)
class _Immediate:
    """An engine that answers at once."""

    def generate(
        self, prompts: Sequence[Any], config: GenerationConfig, *, rules: Any = None
    ) -> list[list[Completion]]:
        return [[Completion(text=_ANSWER, prompt_tokens=60, answer_tokens=20)] for _ in prompts]


@contextmanager
def _open_immediate(config: LabelConfig) -> Iterator[Any]:
    from megatron_ads.inference.journalled_engine import JournalledEngine
    from megatron_ads.labelling.labeller import Labeller

    def open_engine(journal: Journal, priority: int) -> Engine:
        return JournalledEngine(_Immediate(), journal, batch_size=config.model.batch_size)  # type: ignore[arg-type]

    yield Labeller(config, open_engine, None)


if __name__ == "__main__":
    sys.exit(main())
