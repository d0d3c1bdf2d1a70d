"""R1's full depth and expert count, at small widths, through every conversion; and kill -9 at random moments.

    python -m parity_tests.conversion_full_size --folder /disk/with/4GB [--kills 20] [--workers 2]

The model has 3 dense and 58 MoE layers of 256 experts and an MTP layer, so every layout below is the real one: 248
shards for pp 31 x ep 8. Prints a line per check; exit 1 at the first that fails.
"""

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch

from conversion.hf_folder import INDEX
from conversion.journal import JOURNAL
from conversion.plan import offsets
from conversion.safetensors_file import HeaderEntry, header_order
from conversion.sparse_r1 import R1_CONFIG, stored_entries
from megatron_ads.cli import main as command_line

SHRUNKEN_R1 = R1_CONFIG | {
    "vocab_size": 512,
    "hidden_size": 160,
    "intermediate_size": 192,
    "moe_intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
"""Hidden is a block and a quarter; kv_a_proj_with_mqa has 144 rows, a block and an eighth (in R1: 576, 4.5 blocks)."""

REFERENCE_LAYOUT = ("--pp", "31", "--ep", "8", "--last-stage-layers", "1")
OTHER_LAYOUTS = {
    "pp31-vpp2-ep8": ("--pp", "31", "--vpp", "2", "--ep", "8", "--pipeline", "Et|(t|)*60mL"),
    "pp16-ep4": ("--pp", "16", "--ep", "4", "--first-stage-layers", "3", "--last-stage-layers", "2"),
    "pp8-ep16-tp2": (
        *("--pp", "8", "--ep", "16", "--tp", "2"),
        *("--first-stage-layers", "4", "--last-stage-layers", "3"),
    ),
}


_REPEATED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
_POOL_ELEMENTS = 1 << 20


class CheckFailed(Exception):
    """A conversion did not do what it must."""


def write_checkpoint(folder: Path, *, files: int) -> None:
    """Write a random FP8 checkpoint, scales no powers of two and mostly in another file than their weight."""
    entries = [entry for stored in stored_entries(SHRUNKEN_R1) for entry in stored]
    pools = _random_pools()
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:06d}.safetensors"
        ordered = header_order(entries[number::files])
        with (folder / name).open("wb") as file:
            file.write(offsets(ordered, {"format": "pt"})[0])
            for entry in ordered:
                file.write(_random_bytes(entry, pools[entry.dtype]))
        weight_map |= {entry.name: name for entry in ordered}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SHRUNKEN_R1, indent=2))
    (folder / "tokenizer.json").write_text("{}")


def _random_pools() -> dict[torch.dtype, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (_POOL_ELEMENTS,), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0  # no NaN
    return {
        torch.float8_e4m3fn: codes,
        torch.bfloat16: torch.randn(_POOL_ELEMENTS, generator=generator).bfloat16(),
        torch.float32: torch.rand(_POOL_ELEMENTS, generator=generator) * 1e-2 + 1e-4,
    }


def _random_bytes(entry: HeaderEntry, pool: torch.Tensor) -> bytes:
    """Return values that depend on the name alone; a repeat has those of what it repeats."""
    name = next((full for end, full in _REPEATED.items() if entry.name.endswith(f".61.{end}")), entry.name)
    count = entry.nbytes // entry.dtype.itemsize
    start = zlib.crc32(name.encode()) % (_POOL_ELEMENTS - count)
    return pool[start : start + count].view(torch.uint8).numpy().tobytes()


def run(*arguments: str | Path) -> float:
    """Run one command line in this process; return the seconds it took."""
    start = time.perf_counter()
    status = command_line([str(argument) for argument in arguments])
    seconds = time.perf_counter() - start
    print(f"    {seconds:6.1f} s  {' '.join(str(argument) for argument in arguments)}", flush=True)
    if status:
        raise CheckFailed(f"status {status}")
    return seconds


def require_same_files(left: Path, right: Path, pattern: str, *, count: int | None = None) -> None:
    """Fail unless both folders have the same files of this pattern, byte for byte."""
    names = sorted(file.name for file in left.glob(pattern))
    if names != sorted(file.name for file in right.glob(pattern)) or (count is not None and len(names) != count):
        raise CheckFailed(f"{left} and {right} hold other files, or not {count} of them ({len(names)})")
    _, different, unreadable = filecmp.cmpfiles(left, right, names, shallow=False)
    if different or unreadable or not names:
        raise CheckFailed(f"{left} and {right} differ in {different or unreadable or 'having no files'}")


def check_byte_identity(work: Path, workers: str) -> float:
    """FP8 to 248 shards and back, byte for byte; verify agrees. Return the seconds of the first conversion."""
    seconds = run("convert", "to-megatron", work / "hf", work / "shards", *REFERENCE_LAYOUT, "--workers", workers)
    run("convert", "to-hf", work / "shards", work / "back", "--reference", work / "hf", "--workers", workers)
    require_same_files(work / "hf", work / "back", "*")
    run("verify", work / "hf", work / "shards", "--workers", workers)
    if len(list(work.glob("shards/*.safetensors"))) != 248:
        raise CheckFailed("not 248 shards")
    print("ok  FP8 -> 248 shards -> FP8 is byte-identical")
    return seconds


def check_other_layouts(work: Path, workers: str) -> None:
    """By way of the reference layout and HF, every other layout is the same as directly."""
    run("convert", "to-hf", work / "shards", work / "bf16", "--dtype", "bf16", "--workers", workers)
    for name, layout in OTHER_LAYOUTS.items():
        run("convert", "to-megatron", work / "hf", work / "directly", *layout, "--workers", workers)
        run("convert", "to-megatron", work / "bf16", work / "by-way", *layout, "--workers", workers)
        require_same_files(work / "directly", work / "by-way", "*.safetensors")
        shutil.rmtree(work / "directly")
        shutil.rmtree(work / "by-way")
        print(f"ok  pp31-ep8 -> HF -> {name} equals converting directly")


def check_kills(work: Path, workers: str, kills: int, seconds: float) -> None:
    """Kill a conversion at random moments, resume until done: same bytes, and no finished file written twice.

    ``seconds`` is what it takes undisturbed; a run is killed within the first quarter of it, so a conversion meets
    several kills.
    """
    arguments = ["convert", "to-megatron", str(work / "hf"), str(work / "killed"), *REFERENCE_LAYOUT]
    command = [sys.executable, "-m", "megatron_ads.cli", *arguments, "--workers", workers, "--resume"]
    target, chance = work / "killed", random.Random(0)
    done = 0
    while done < kills:
        shutil.rmtree(target, ignore_errors=True)
        finished: dict[str, int] = {}
        while not (target / "manifest.json").exists() or (target / JOURNAL).exists():
            killed = _run_and_kill(command, target, chance.uniform(0.0, seconds / 4) if done < kills else None)
            done += killed
            for name, modified in finished.items():
                if (target / name).stat().st_mtime_ns != modified:
                    raise CheckFailed(f"{name} was finished and written again")
            finished = {file.name: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
            print(f"    kill {done}: {len(finished)} of 248 files done", flush=True)
        require_same_files(work / "shards", target, "*.safetensors", count=248)
        if (work / "shards/manifest.json").read_text() != (target / "manifest.json").read_text():
            raise CheckFailed("the manifests differ")
    print(f"ok  {done} times kill -9, then --resume: the undisturbed result, nothing written twice")


def _run_and_kill(command: list[str], target: Path, seconds_after_start: float | None) -> bool:
    """Start the command, kill it some time after it began to write; return whether it was killed."""
    left_over = set(target.glob("*.partial"))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and seconds_after_start is not None:
        if set(target.glob("*.partial")) - left_over:  # it has begun to write
            time.sleep(seconds_after_start)
            break
        time.sleep(0.01)
    if seconds_after_start is None or process.poll() is not None:
        if process.wait():
            raise CheckFailed(f"status {process.returncode}")
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def main() -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work; 4 GB are needed")
    parser.add_argument("--kills", type=int, default=20, help="how often to kill a conversion (default 20)")
    parser.add_argument("--kills-only", action="store_true", help="leave out the other layouts")
    parser.add_argument("--workers", default="1", help="worker processes of every conversion (default 1)")
    args = parser.parse_args()
    work = args.folder / f"conversion-full-size-{os.getpid()}"
    try:
        write_checkpoint(work / "hf", files=163)
        seconds = check_byte_identity(work, args.workers)
        if not args.kills_only:
            check_other_layouts(work, args.workers)
        check_kills(work, args.workers, args.kills, seconds)
    except CheckFailed as failure:
        print(f"FAILED  {failure}")
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
