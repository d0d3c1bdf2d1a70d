"""How fast conversion is, as a ratio to copying the same bytes on the same disk in the same run.

    python -m benchmarks.conversion --folder /disk/with/space [--gigabytes 2 4] [--workers 1 2] [--repeats 3]

For each model size and direction, alternately: convert; and copy, that is read as many bytes as the conversion reads
and write as many as it writes, by as many processes. Both begin with the source dropped from the page cache and end
when every written file is flushed. Prints JSON; a ratio of 1 is the speed of the copy.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conversion.safetensors_file import read_header
from conversion.sparse_r1 import R1_CONFIG, write_sparse
from megatron_ads.observability.provenance import provenance

BLOCK_BYTES = 4 << 20
POOL_BYTES = 64 << 20
FILE_BYTES = 1 << 30
LAYOUT = ("--pp", "2", "--ep", "2")
LIMIT_SECONDS = 3600
"""What takes longer than this hangs."""


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


def write_model(folder: Path, config: dict[str, Any], *, files: int) -> None:
    """Write a checkpoint of random finite values."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0  # no NaN
    pools = {
        torch.float8_e4m3fn: codes,
        torch.bfloat16: (torch.randn(POOL_BYTES // 2, generator=generator) * 0.02).bfloat16(),
        torch.float32: torch.rand(POOL_BYTES // 4, generator=generator) * 1e-3 + 1e-4,
    }
    bytes_of = {dtype: pool.view(torch.uint8).numpy().data for dtype, pool in pools.items()}
    write_sparse(folder, config, files=files)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            for tensor in read_header(path).tensors.values():
                file.seek(tensor.offset)
                left = tensor.nbytes
                while left:
                    left -= file.write(bytes_of[tensor.dtype][:left])
    os.sync()


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all weight files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def convert(source: Path, target: Path, *, direction: str, workers: int) -> tuple[float, int]:
    """Run one conversion as a user would; return its seconds and the peak bytes of a process."""
    arguments = ["convert", direction, str(source), str(target), "--workers", str(workers)]
    arguments += LAYOUT if direction == "to-megatron" else ("--dtype", "fp8", "--max-shard-size", "1GB")
    _prepare(source, target)
    start = time.perf_counter()
    command = [sys.executable, "-c", _MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    return seconds, json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


_MEASURED = """
import json, resource, sys
from megatron_ads.cli import main
status = main(sys.argv[1:])
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"peak_bytes": max(peaks) * 1024}))
sys.exit(status)
"""


def copy(source: Path, target: Path, *, written: int, workers: int) -> float:
    """Read every source file and write ``written`` bytes, by ``workers`` processes; return the seconds."""
    ratio = written / weight_bytes(source)
    _prepare(source, target)
    target.mkdir()
    start = time.perf_counter()
    with ProcessPoolExecutor(workers) as pool:
        files = sorted(source.glob("*.safetensors"))
        for _ in pool.map(partial(copy_file, target=target, ratio=ratio), files, timeout=LIMIT_SECONDS):
            pass
    return time.perf_counter() - start


def copy_file(file: Path, *, target: Path, ratio: float) -> None:
    """Read a file, write ``ratio`` times as many bytes into the folder ``target``, and flush them."""
    buffer = bytearray(BLOCK_BYTES)
    with file.open("rb", buffering=0) as handle, (target / file.name).open("wb", buffering=0) as out:
        read = written = 0
        while count := handle.readinto(buffer):
            read += count
            while written < int(read * ratio):
                written += out.write(memoryview(buffer)[: min(count, int(read * ratio) - written)])
        os.fsync(out.fileno())


def _prepare(source: Path, target: Path) -> None:
    """Remove an earlier target, and forget cached pages of the source."""
    shutil.rmtree(target, ignore_errors=True)
    forget_files(source)


def forget_files(folder: Path) -> None:
    """Drop the cached pages of all files of a folder, so that they are read from the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(work: Path, source: Path, direction: str, workers: int, repeats: int) -> dict[str, Any]:
    """Alternate conversions and copies; return the medians and the ratio."""
    conversions, copies = [], []
    written = 0
    for _ in range(repeats):
        conversions.append(convert(source, work / "converted", direction=direction, workers=workers))
        written = weight_bytes(work / "converted")
        copies.append(copy(source, work / "copied", written=written, workers=workers))
    return {
        "direction": direction,
        "workers": workers,
        "read_bytes": weight_bytes(source),
        "written_bytes": written,
        "convert_seconds": [round(seconds, 2) for seconds, _ in conversions],
        "copy_seconds": [round(seconds, 2) for seconds in copies],
        "speed_of_the_copy": round(
            statistics.median(copies) / statistics.median(seconds for seconds, _ in conversions), 3
        ),
        "peak_bytes_per_worker": max(peak for _, peak in conversions),
    }


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
            write_model(work / "hf", model_config(gigabytes), files=math.ceil(gigabytes * 1e9 / FILE_BYTES))
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
