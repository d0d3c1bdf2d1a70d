"""How fast conversion is, as a ratio to copying the same bytes on the same disk in the same run.

    python -m benchmarks.conversion --folder /disk/with/space [--gigabytes 2 4] [--workers 1 2] [--repeats 3]

For each model size and direction, alternately: convert; and copy, that is read as many bytes as the conversion reads
and write as many as it writes, by as many processes. Both begin with the source dropped from the page cache and end
when every written file is flushed. Prints JSON; a ratio of 1 is the speed of the copy.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conversion.plan import offsets
from conversion.safetensors_file import HeaderEntry, header_order
from conversion.sparse_r1 import R1_CONFIG, stored_entries
from megatron_ads.observability.provenance import provenance

BLOCK_BYTES = 4 << 20
POOL_BYTES = 64 << 20
FILE_BYTES = 1 << 30
LAYOUT = ("--pp", "2", "--ep", "2")
LIMIT_SECONDS = 3600
"""What takes longer than this hangs."""


@dataclass(frozen=True)
class Sample:
    """One timed run."""

    seconds: float
    peak_bytes_per_process: int


def model_config(gigabytes: float) -> dict[str, Any]:
    """Return a config whose FP8 checkpoint is about this large: a shallow R1 of a quarter of its width."""
    layers = max(round(gigabytes / 0.36), 2)
    return R1_CONFIG | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "n_routed_experts": 64,
        "num_hidden_layers": layers + layers % 2,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "first_k_dense_replace": 1,
        "vocab_size": 32768,
    }


def write_model(folder: Path, config: dict[str, Any]) -> int:
    """Write a checkpoint of random finite values; return its bytes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0  # no NaN
    pools = {
        torch.float8_e4m3fn: codes,
        torch.bfloat16: (torch.randn(POOL_BYTES // 2, generator=generator) * 0.02).bfloat16(),
        torch.float32: torch.rand(POOL_BYTES // 4, generator=generator) * 1e-3 + 1e-4,
    }
    bytes_of = {dtype: pool.view(torch.uint8).numpy().data for dtype, pool in pools.items()}
    groups: list[list[HeaderEntry]] = [[]]
    for entries in stored_entries(config):
        if sum(entry.nbytes for entry in groups[-1]) > FILE_BYTES:
            groups.append([])
        groups[-1].extend(entries)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        ordered = header_order(group)
        with (folder / name).open("wb") as file:
            file.write(offsets(ordered, {"format": "pt"})[0])
            for entry in ordered:
                left = entry.nbytes
                while left:
                    left -= file.write(bytes_of[entry.dtype][:left])
        weight_map |= {entry.name: name for entry in group}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.sync()
    return weight_bytes(folder)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all weight files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_from_page_cache(folder: Path) -> None:
    """Forget cached pages of a folder's files, so that they are read from the disk."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def convert(source: Path, target: Path, *, direction: str, workers: int) -> Sample:
    """Run one conversion as a user would."""
    arguments = ["convert", direction, str(source), str(target), "--workers", str(workers)]
    arguments += LAYOUT if direction == "to-megatron" else ("--dtype", "fp8", "--max-shard-size", "1GB")
    start = time.perf_counter()
    command = [sys.executable, "-c", _MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    return Sample(seconds, json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


_MEASURED = """
import json, resource, sys
from megatron_ads.cli import main
status = main(sys.argv[1:])
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"peak_bytes": max(peaks) * 1024}))
sys.exit(status)
"""


def copy(source: Path, target: Path, *, written: int, workers: int) -> Sample:
    """Read every source file and write ``written`` bytes, divided over ``workers`` processes."""
    target.mkdir()
    files = sorted(source.glob("*.safetensors"))
    ratio = written / weight_bytes(source)
    start = time.perf_counter()
    processes = [
        multiprocessing.Process(target=_copy_files, args=(files[index::workers], target, ratio), daemon=True)
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
        if process.exitcode != 0:
            process.kill()
            raise SystemExit(f"A copy to {target} ended with {process.exitcode}; None: not within {LIMIT_SECONDS} s.")
    seconds = time.perf_counter() - start
    return Sample(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def _copy_files(files: list[Path], target: Path, ratio: float) -> None:
    buffer = bytearray(BLOCK_BYTES)
    for file in files:
        out = os.open(target / file.name, os.O_CREAT | os.O_WRONLY)
        with file.open("rb", buffering=0) as handle:
            read = written = 0
            while count := handle.readinto(buffer):
                read += count
                while written < int(read * ratio):
                    written += os.write(out, memoryview(buffer)[: min(count, int(read * ratio) - written)])
        os.fsync(out)
        os.close(out)


def compare(work: Path, source: Path, direction: str, workers: int, repeats: int) -> dict[str, Any]:
    """Alternate conversions and copies; return the medians and the ratio."""
    conversions, copies = [], []
    written = 0
    for _ in range(repeats):
        conversions.append(_timed(work / "converted", source, partial(convert, direction=direction, workers=workers)))
        written = weight_bytes(work / "converted")
        copies.append(_timed(work / "copied", source, partial(copy, written=written, workers=workers)))
    ours, theirs = (statistics.median(sample.seconds for sample in samples) for samples in (conversions, copies))
    return {
        "direction": direction,
        "workers": workers,
        "read_bytes": weight_bytes(source),
        "written_bytes": written,
        "convert_seconds": [round(sample.seconds, 2) for sample in conversions],
        "copy_seconds": [round(sample.seconds, 2) for sample in copies],
        "speed_of_the_copy": round(theirs / ours, 3),
        "peak_bytes_per_worker": max(sample.peak_bytes_per_process for sample in conversions),
    }


def _timed(target: Path, source: Path, run: Callable[[Path, Path], Sample]) -> Sample:
    shutil.rmtree(target, ignore_errors=True)
    drop_from_page_cache(source)
    return run(source, target)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work; 8 times the largest size is needed")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0, 4.0], help="FP8 model sizes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    work = args.folder / f"conversion-benchmark-{os.getpid()}"
    results = []
    try:
        for gigabytes in args.gigabytes:
            shutil.rmtree(work, ignore_errors=True)
            write_model(work / "hf", model_config(gigabytes))
            convert(work / "hf", work / "shards", direction="to-megatron", workers=2)
            for workers in args.workers:
                for direction, source in (("to-megatron", "hf"), ("to-hf", "shards")):
                    results.append(compare(work, work / source, direction, workers, args.repeats))
                    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(provenance() | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
