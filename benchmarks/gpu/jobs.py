"""Whole jobs on the one GPU: resumed, repeated bit for bit, run by the command line; and the parity rungs."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.layers import stack_that_fits
from benchmarks.gpu.record import Record
from benchmarks.gpu.stacks import build, one_rank
from benchmarks.gpu.timing import on_gpu
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.launching.processes import JobError
from megatron_ads.runtime import cpu_compat, process_groups

_ROOT = Path(__file__).resolve().parents[2]
LOSS_TOLERANCES = {"bf16 and fp32": 1e-2, "fp32 here and on the CPU": 1e-3}
"""Relative, of every step of the first 20: on a CPU BF16 is 2.5e-3 off; two devices add in other orders."""


# --- a job that is interrupted


def resumed_job(record: Record) -> None:
    """Train a small model over the device's own backend, save, resume: the same losses as without the interruption."""
    from megatron_ads.runtime.health.activity import Activity, observed
    from parity_tests.harness.training_jobs import Recipe, resume_and_train, train, train_and_save

    cpu_compat.install()  # before anything else imports Megatron-Core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_model(folder / "model", CONFIGS[Preset.tiny])
        for precision in ("bf16",) if record.dry_run else ("fp32", "bf16"):
            saved = folder / precision

            def recipe(steps: int, precision: str = precision, saved: Path = saved) -> Recipe:
                return Recipe(folder=folder / "model", model={"precision": precision}, checkpoints=saved, steps=steps)

            with record.attempt(precision), observed(Activity(on_gpu=on_gpu())):
                whole = _then_stop(train, recipe(4))
                first, rest = _then_stop(train_and_save, recipe(2)), _then_stop(resume_and_train, recipe(2))
                record.figure(f"{precision}: losses", whole.loss)
                resumed = first.loss + rest.loss
                said = f"{precision}: losses {whole.loss} without interruption, {resumed} with one"
                record.check(whole.loss == resumed, said)
                record.check(whole.grad_norm == first.grad_norm + rest.grad_norm, f"{precision}: other gradient norms")
    with record.attempt("messages"):
        _exchange_objects(record)


def _then_stop(job: Any, recipe: Any) -> Any:
    begin = time.monotonic()
    try:
        return job(recipe)
    finally:
        process_groups.stop()
        print(f"{job.__name__}: {time.monotonic() - begin:.1f} s", flush=True)


def _exchange_objects(record: Record) -> None:
    """Time joining a job of one rank, and send an object, as checkpoints and the preflight do."""
    begin = time.monotonic()
    one_rank()
    record.figure("start_seconds", time.monotonic() - begin)
    objects: list[Any] = [None]
    torch.distributed.all_gather_object(objects, {"rank": 0})
    backend = torch.distributed.get_backend()
    record.figure("backend", backend, f"{backend}: start, collectives, objects, save and resume")
    record.check(objects == [{"rank": 0}], f"an object came back as {objects}")


# --- equal runs


def deterministic(record: Record) -> None:
    """Train twice in deterministic mode: equal bits, or the operations that have no deterministic kernel."""
    if (stack := stack_that_fits(record, "deterministic")) is None:
        return
    runs = []
    for number in range(2):
        with record.attempt(f"run {number + 1}"):
            one_rank(deterministic=True)
            built = build(stack)
            runs.append([(report.loss, report.update.grad_norm) for report in (built.step() for _ in range(3))])
            process_groups.stop()
    if len(runs) == 2:
        record.figure("losses_and_norms", runs[0], "two runs of three steps each")
        record.check(runs[0] == runs[1], f"two equal runs differ: {runs[0]} and {runs[1]}")


# --- the command line


def quickstart(record: Record) -> None:
    """Train the quickstart's model by the command line, on the card in BF16 and FP32, and in FP32 on the CPU."""
    from megatron_ads.observability.metrics import read_metrics

    steps, seconds = (2, 200) if record.dry_run else (20, 50)
    here = dict(os.environ)
    runs = {"bf16": ("bf16", here), "fp32": ("fp32", here)}
    if on_gpu():
        runs["fp32 on the CPU"] = ("fp32", here | {"CUDA_VISIBLE_DEVICES": ""})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_demo_model(folder / "model", CONFIGS[Preset.tiny])
        losses: dict[str, list[float]] = {}
        for run, (precision, environment) in runs.items():
            with record.attempt(run):
                words = train_command(folder, name := run.replace(" ", "-"), precision, steps, rows=steps * 100)
                _run([sys.executable, "-m", "megatron_ads.cli", *words], environment, seconds=seconds)
                losses[run] = [row["loss"] for row in read_metrics(folder / name) if "loss" in row]
                record.figure(f"{run}: losses", losses[run])
    pairs = {"bf16 and fp32": ("bf16", "fp32"), "fp32 here and on the CPU": ("fp32", "fp32 on the CPU")}
    for name, (one, other) in pairs.items():
        if one in losses and other in losses:
            worst = max(abs(a / b - 1) for a, b in zip(losses[one], losses[other], strict=True))
            record.figure(name, worst, f"losses of {name}: {worst:.1e} apart at most, over {steps} steps")
            record.check(worst < LOSS_TOLERANCES[name], f"losses of {name} are {worst:.1e} apart")


def train_command(folder: Path, name: str, precision: str, steps: int, *, rows: int) -> list[str]:
    """Return the arguments of ``megatron-ads`` that train ``folder/model`` on one rank and log to ``folder/name``."""
    return [
        *("train", "--recipe", "sft/quickstart", "layout=pp1_ep1", f"model.load={folder / 'model'}"),
        *(f"model.precision={precision}", f"log.dir={folder / name}", f"train.max_steps={steps}"),
        f"data.sources=[{{kind: simulator, task: query_ad_relevance, rows: {rows}}}]",
        *("data.validation_rows=0", "train.evaluate_every=null", "optim.warmup_steps=1", "log.tensorboard=false"),
    ]


def parity(record: Record) -> None:
    """Run the rungs of the parity ladder that need a GPU; a dry run only collects them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["pytest", "parity_tests", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={folder / 'x'}"]
        figures = folder / "figures"
        try:
            cores = len(os.sched_getaffinity(0))
            workers = ["-n", str(min(8, cores // 2))] if cores >= 4 and find_spec("xdist") else []
            only = ["--collect-only"] if record.dry_run else workers
            environment = os.environ | {"PARITY_FIGURES": str(figures)}
            with record.attempt("the ladder"):
                _run([sys.executable, "-m", *words, *only], environment, seconds=400 if record.dry_run else 290)
        finally:  # what was recorded before a failure or the time limit
            lines = figures.read_text(encoding="utf-8").splitlines() if figures.exists() else []
            found = [json.loads(line) for line in lines]
            record.figure("figures", found, f"{len(found)} figures of the ladder")
            if (folder / "x").exists() and not record.dry_run:
                _outcome(record, folder / "x")


def _outcome(record: Record, report: Path) -> None:
    from parity_tests.record import outcome

    summary, *others = outcome(report)
    record.figure("outcome", [summary, *others], summary)
    for line in others:
        record.check(not line.startswith("failed"), line)


def _run(words: Sequence[str], environment: Mapping[str, str], *, seconds: float) -> None:
    """Run a command to its end in this step's log.

    Raises:
        JobError: If it fails, or takes longer than ``seconds``.
    """
    print("$", *words, flush=True)
    try:
        ended = subprocess.run(
            words, env=dict(environment), cwd=_ROOT, timeout=seconds, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{words[2]} {words[3]} was not done after {seconds:.0f} s; see log.txt.") from None
    if ended.returncode:
        raise JobError(f"{words[2]} {words[3]} ended with exit status {ended.returncode}; see log.txt.")
