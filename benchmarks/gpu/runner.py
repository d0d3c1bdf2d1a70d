"""Run the steps of the GPU benchmark, each in a process of its own with a time limit, and print what they found.

    benchmarks/gpu.sh [--out DIR] [--seconds 540] [--step NAME ...] [--dry-run]

``DIR/results.jsonl`` has one JSON line for each step: how it ended (``passed``, ``findings``: something is not as it
should be, ``failed``: it died, ``timed out``, ``skipped``), its figures and findings. ``DIR/table.txt`` is the table
that is printed at the end, ``DIR/log.txt`` all that the steps printed. A step that fails does not stop the next one.

``--dry-run`` runs every step on tiny sizes, on a CPU too: it shows that the code runs, and measures nothing.

Exit status: 0 every step passed or was skipped, 1 one did not, 2 there is no GPU, or no such step.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.bounded_process import run_bounded
from benchmarks.gpu.record import Found, Record, read_record

_LEAST_SECONDS = 5.0
"""A step is not started with less time than this left."""
_DRY_RUN_PATIENCE = 4
"""By how much longer every limit is in a dry run: a CPU may be slow and shared."""
_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a function that takes a ``Record`` and, where there is one, the argument."""

    name: str
    seconds: float
    """Time limit."""
    function: str
    """``module:function``, or ``module:function:argument``."""

    def run(self, record: Record) -> None:
        """Run it in this process."""
        module, function, *arguments = self.function.split(":")
        getattr(import_module(module), function)(record, *arguments)


STEPS = (
    Step("facts", 40, "benchmarks.gpu.machine:facts"),
    Step("attention", 45, "benchmarks.gpu.attention:attention"),
    Step("experts", 45, "benchmarks.gpu.experts:experts"),
    Step("pointwise", 45, "benchmarks.gpu.pointwise:pointwise"),
    Step("layers", 80, "benchmarks.gpu.layers:train_stack:plain"),
    Step("layers-full", 50, "benchmarks.gpu.layers:train_stack:full"),
    Step("layers-selective", 50, "benchmarks.gpu.layers:train_stack:selective"),
    Step("stage", 60, "benchmarks.gpu.layers:train_stack:stage"),
    Step("transformers", 60, "benchmarks.gpu.layers:train_transformers"),
    Step("nccl-job", 50, "benchmarks.gpu.jobs:resumed_job"),
    Step("switches", 60, "benchmarks.gpu.switches:compare_switches"),
    Step("checkpoint", 90, "benchmarks.gpu.checkpoints:checkpoint"),
    Step("layers-32k", 50, "benchmarks.gpu.layers:train_stack:long"),
    Step("lora", 45, "benchmarks.gpu.layers:train_stack:lora"),
    Step("quickstart", 75, "benchmarks.gpu.jobs:quickstart"),
    Step("build-ranks", 45, "benchmarks.gpu.machine:build_ranks"),
    Step("deterministic", 40, "benchmarks.gpu.jobs:deterministic"),
    Step("parity", 300, "benchmarks.gpu.jobs:parity"),
)
"""In the order of what is worth most if the time runs out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, or with ``--run`` one of them in this process."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default runs/gpu)")
    parser.add_argument("--seconds", type=float, default=540, help="limit of all steps together (default 540)")
    parser.add_argument("--step", action="append", metavar="NAME", help="only this step; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too: measures nothing")
    parser.add_argument("--run", nargs=2, metavar=("FUNCTION", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        function, file = arguments.run
        # So that what is to be done at the end is done: temporary folders go, and so do processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        Step(function, 0, function).run(Record(Path(file), dry_run=arguments.dry_run))
        return 0
    by_name = {step.name: step for step in STEPS}
    if unknown := sorted(set(arguments.step or ()) - by_name.keys()):
        print(
            f"benchmarks/gpu.sh: there is no step {', '.join(unknown)}; there are {', '.join(by_name)}.",
            file=sys.stderr,
        )
        return 2
    if not arguments.dry_run and (reason := _why_no_gpu()):
        print(f"benchmarks/gpu.sh: {reason}. Give --dry-run to run the steps on tiny sizes here.", file=sys.stderr)
        return 2
    steps, seconds = [step for step in STEPS if not arguments.step or step.name in arguments.step], arguments.seconds
    if arguments.dry_run:
        steps = [replace(step, seconds=_DRY_RUN_PATIENCE * step.seconds) for step in steps]
        seconds *= _DRY_RUN_PATIENCE
    results = run_steps(steps, arguments.out, seconds=seconds, dry_run=arguments.dry_run)
    return int(any(result["status"] not in ("passed", "skipped") for result in results))


def _why_no_gpu() -> str | None:
    import torch  # seconds of import, and a dry run does without

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def run_steps(steps: Sequence[Step], out: Path, *, seconds: float, dry_run: bool) -> list[dict[str, Any]]:
    """Run ``steps`` in ``seconds`` at most; write the results, the table and the log into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt", "table.txt"):
        (out / name).unlink(missing_ok=True)
    give_up, results = time.monotonic() + seconds, []
    for step in steps:
        result = _run_step(step, out, seconds=min(step.seconds, give_up - time.monotonic()), dry_run=dry_run)
        results.append(result)
        print(f"{step.name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
        with (out / "results.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(result) + "\n")
    text = table(results, dry_run=dry_run)
    (out / "table.txt").write_text(text, encoding="utf-8")
    print(text, end="", flush=True)
    return results


def _run_step(step: Step, out: Path, *, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Run one step and return its line of the results."""
    if seconds < min(_LEAST_SECONDS, step.seconds):
        left_out = Found(skipped="no time was left")
        return {"step": step.name, "status": "skipped", "seconds": 0.0} | asdict(left_out)
    file, log = out / "step.partial", out / "log.txt"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", step.function, str(file.resolve())]
    command += ["--dry-run"] if dry_run else []
    how = run_bounded(command, log, name=step.name, seconds=seconds)
    found = asdict(read_record(file))
    file.unlink(missing_ok=True)
    ended = {"step": step.name, "status": "passed", "seconds": round(how.seconds, 1)}
    if how.error:
        ended |= {"status": "timed out" if how.exit_status is None else "failed", "error": how.error}
    elif found["findings"]:
        ended["status"] = "findings"
    elif found["skipped"]:
        ended["status"] = "skipped"
    return ended | found


def table(results: Sequence[Mapping[str, Any]], *, dry_run: bool) -> str:
    """Return the table of all steps: how each ended, and what it found in words."""
    from megatron_ads.reporting.page import text_table

    rows = []
    for result in results:
        said = [*result["headlines"], *(f"! {text}" for text in result["findings"])]
        said += [f"! {result['error']}"] if result.get("error") else []
        said += [result["skipped"]] if result["skipped"] else []
        cells = (result["step"], result["status"], f"{result['seconds']:.0f}")
        rows += [(*cells, said[0] if said else ""), *(("", "", "", more) for more in said[1:])]
    lines = text_table(rows, ["step", "ended", "s", "found"], left=["step", "ended", "found"], width=_WIDTH)
    title = ["A dry run on tiny sizes: nothing here is a measurement."] if dry_run else []
    return "\n".join([*title, *lines]) + "\n"
