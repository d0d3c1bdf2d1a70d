"""Rung 10: 61 layers under pp 31, 31 real processes over gloo on this machine, against one process.

    python -m parity_tests.rung_10_pipeline [--record FILE]

The first stage has no experts, as in DeepSeek-R1's layout. The job trains a step, saves, is ended, resumes, trains
another step and exports to Hugging Face format; one process trains the same two steps. Losses, gradient norms and
exported weights must be equal, and a deliberate error on one side must be seen. Takes minutes on two cores.

A failure with rung 8 green is in what only a deep pipeline has: a stage without experts next to the optimizer and the
checkpoint, the order of messages, or a name that is right only for the layers of the first stages.

Exit status: 0 equal, 1 not.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conversion.convert import to_hf
from megatron_ads.observability.provenance import provenance
from parity_tests.checkpoints import SMALL_V3, write_checkpoint
from parity_tests.deliberate_errors import EPSILON_CHANGED
from parity_tests.harness import ranks
from parity_tests.harness.training_jobs import Losses, Recipe, resume_and_export, train_and_export, train_and_save
from parity_tests.tolerances import PIPELINE_LOSS, PIPELINE_WEIGHTS

STAGES = 31
PIPELINE = "Ett|(tt|)*29tmL"
DEEP = SMALL_V3 | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 16}
"""61 layers, 3 of them dense, an MTP layer; two experts in each of the 8 groups."""
RUN_SECONDS = 420
"""Longest one of the runs may take; its processes are then ended."""
MEMORY_BYTES = 16 << 30
"""Most memory that all processes together may take."""


class Memory:
    """The most memory that this process and all it started held at once, sampled; pages they share count once."""

    def __init__(self) -> None:
        self.most_bytes = 0

    def sample(self) -> None:
        """Look again."""
        self.most_bytes = max(self.most_bytes, sum(map(_proportional_bytes, _family())))


def _family() -> set[int]:
    """Return the ids of this process and its descendants."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended meanwhile
        return 0


def _proportional_bytes(pid: int) -> int:
    """Return the process's memory, each page divided by the number of processes that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@contextmanager
def _watched() -> Iterator[Memory]:
    memory, done = Memory(), threading.Event()

    def watch() -> None:
        while not done.wait(2.0):
            memory.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def measure(root: Path) -> dict[str, Any]:
    """Run everything below ``root`` and return the figures."""
    folder = write_checkpoint(root / "model", DEEP)
    model = {"mtp_loss_weight": 0.3, "expert_bias_update_rate": 0.001}
    alone = Recipe(folder=folder, model=model, steps=2)
    deep = replace(alone, layout={"pp": STAGES, "pipeline": PIPELINE}, checkpoints=root / "checkpoints", steps=1)

    (straight,) = _timed("one process", 1, train_and_export, alone, root / "alone")
    saved = _timed("31 processes: train, save", STAGES, train_and_save, deep)
    resumed = _timed("31: resume, train, export", STAGES, resume_and_export, deep, root / "deep")
    wrong = replace(alone, folder=EPSILON_CHANGED.write(folder, root / "wrong"))
    (twin,) = _timed("one process, one epsilon changed", 1, train_and_export, wrong, root / "twin")

    for name in ("alone", "deep", "twin"):
        to_hf(root / name, root / f"{name}-hf")
    joined = [Losses(a.loss + b.loss, a.grad_norm + b.grad_norm) for a, b in zip(saved, resumed, strict=True)]
    return {
        "loss of both steps": straight.loss,
        "loss difference": max(_difference(rank.loss, straight.loss) for rank in joined),
        "gradient norm difference": max(_difference(rank.grad_norm, straight.grad_norm) for rank in joined),
        "weight difference": _weights(root / "deep-hf", root / "alone-hf", folder),
        "loss difference of the deliberate error": _difference(twin.loss, straight.loss),
        "weight difference of the deliberate error": _weights(root / "twin-hf", root / "alone-hf", folder),
    }


def _timed(what: str, world: int, function: Any, *args: Any) -> list[Losses]:
    started = time.monotonic()
    results: list[Losses] = ranks.run_ranks(world, function, *args, timeout=RUN_SECONDS)
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)
    return results


def _difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def _weights(ours: Path, theirs: Path, before: Path) -> float:
    """Root mean square of the difference of the exports, over that of what training changed; all tensors together."""
    a, b, start = (load_file(folder / "model.safetensors") for folder in (ours, theirs, before))
    assert set(a) == set(b) == set(start)
    apart = torch.stack([(a[name] - b[name]).pow(2).sum() for name in b]).sum()
    moved = torch.stack([(b[name] - start[name]).pow(2).sum() for name in b]).sum()
    return float((apart / moved).sqrt())


def judge(figures: dict[str, Any]) -> dict[str, bool]:
    """Return what must hold, and whether it does."""
    return {
        "losses are those of one process": figures["loss difference"] < PIPELINE_LOSS.value,
        "gradient norms are those of one process": figures["gradient norm difference"] < 10 * PIPELINE_LOSS.value,
        "exported weights are those of one process": figures["weight difference"] < PIPELINE_WEIGHTS.value,
        "the deliberate error is seen in the losses": figures["loss difference of the deliberate error"]
        > PIPELINE_LOSS.value,
        "the deliberate error is seen in the weights": figures["weight difference of the deliberate error"]
        > PIPELINE_WEIGHTS.value,
        "memory stays below its bound": figures["memory_gib"] * 2**30 < MEMORY_BYTES,
    }


def main() -> int:
    """Run the rung, print its figures, record them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    started, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="rung-10-"))
    try:
        with _watched() as memory:
            figures = measure(root)
    finally:
        ranks.stop_all()
        shutil.rmtree(root)
    figures |= {"memory_gib": round(memory.most_bytes / 2**30, 2), "seconds": round(time.monotonic() - started)}
    verdict = judge(figures)
    print(json.dumps(figures, indent=2))
    print("\n".join(f"{'ok    ' if holds else 'FAILED'} {what}" for what, holds in verdict.items()))
    if args.record:
        args.record.write_text(json.dumps({"figures": figures, "verdict": verdict, **provenance()}, indent=2) + "\n")
    return 0 if all(verdict.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
