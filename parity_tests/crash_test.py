"""Kill one rank of a real job again and again, and check that nothing complete is lost and no number changes.

    python -m parity_tests.crash_test [--repetitions 20] [--seed 0] [--async-save] [--out DIR]

A small model is trained on 4 processes, pp 2 x ep 2, stage 0 without routed experts: once undisturbed, then once for
each repetition, in which a random rank gets SIGKILL at a random moment: while the job starts, between two steps, or
(every second time) inside a save. Most repetitions start the ranks on their own, as srun does, so that nothing but
the ranks themselves ends the rest of the job, forked from a process that has imported Megatron-Core already; every
fifth runs under `megatron-ads train`. Then it must hold that

- the other ranks exit within 60 s, with status 74 once the ranks have linked up, and say which rank has gone
- every checkpoint that was complete before the kill and is not superseded is there, with every checksum right
- the same command continues from the newest complete checkpoint to the end
- the losses of all steps and the exported weights equal those of the undisturbed job, bit for bit

Exit status: 0 all of it held each time, 1 something did not (the run's folder is kept and named). About 20 s a
repetition on two cores; no wait is longer than --longest-wait.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.real_job import ROOT, RealJob

EXIT_SECONDS = 60.0
"""How long the other ranks may take to exit."""
STEPS, SAVE_EVERY = 12, 2


class BrokenPromiseError(Exception):
    """What did not hold after a kill."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Who is killed and when."""

    rank: int
    phase: str
    """``start``: so many seconds after the start; ``step``: after a step; ``save``: inside the save behind a step."""
    step: int
    delay_seconds: float
    under_launcher: bool

    def __str__(self) -> str:
        moment = {
            "start": f"{self.delay_seconds:.1f} s after the start",
            "step": f"{1000 * self.delay_seconds:.0f} ms after step {self.step}",
            "save": f"{1000 * self.delay_seconds:.0f} ms into the save behind step {self.step}",
        }[self.phase]
        return f"rank {self.rank} killed {moment}{', under megatron-ads train' if self.under_launcher else ''}"


def draw_kill(number: int, generator: random.Random, save_seconds: float) -> Kill:
    """Return the kill of a repetition; every second one falls into a save."""
    phase = "save" if number % 2 else generator.choice(["start", "step", "step", "step"])
    step = generator.randrange(SAVE_EVERY, STEPS, SAVE_EVERY) if phase == "save" else generator.randrange(1, STEPS)
    longest = {"start": 15.0, "step": 0.3, "save": 1.2 * save_seconds}[phase]
    return Kill(generator.randrange(4), phase, step, generator.uniform(0, longest), number % 5 == 4)


def carry_out(kill: Kill, job: RealJob) -> list[str]:
    """Start the job and kill the rank; return the checkpoints that were complete just before."""
    if kill.under_launcher:
        job.start_launcher()
    else:
        job.start_ranks(forked=True)
    _wait_until(job, lambda: job.rank_pid(kill.rank) is not None)
    if kill.phase == "step":
        _wait_until(job, lambda: max(job.losses(), default=0) >= kill.step)
    elif kill.phase == "save":
        partial, final = f".step-{kill.step:08d}.partial", f"step-{kill.step:08d}"
        _wait_until(job, lambda: (job.checkpoints / partial).exists() or (job.checkpoints / final).exists())
    time.sleep(kill.delay_seconds)
    complete = job.complete()
    pid = job.rank_pid(kill.rank)
    if pid is None:
        raise BrokenPromiseError("the job ended before the kill")
    os.kill(pid, signal.SIGKILL)
    return complete


def _wait_until(job: RealJob, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + job.longest_wait
    while not reached():
        if time.monotonic() > deadline or any(process.poll() is not None for process in job.processes):
            raise BrokenPromiseError("the job ended, or stood still, before the kill")
        time.sleep(0.005)


def check_the_others(kill: Kill, job: RealJob, reached: int) -> float:
    """Wait for every process to exit; return the seconds it took."""
    started = time.monotonic()
    try:
        statuses = job.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BrokenPromiseError(f"still running {EXIT_SECONDS:.0f} s after the kill") from error
    seconds = time.monotonic() - started
    if kill.phase == "start" or reached == STEPS:
        return seconds  # perhaps before the ranks had linked up, or after their end
    if f"rank {kill.rank} (stage {kill.rank // 2}) has gone" not in job.logs():
        raise BrokenPromiseError(f"no rank said that rank {kill.rank} had gone")
    if not kill.under_launcher:
        expected = [-signal.SIGKILL if rank == kill.rank else ExitStatus.PEER_LOST for rank in range(4)]
        if statuses != expected:
            raise BrokenPromiseError(f"exit statuses {statuses} instead of {expected}")
    return seconds


def check_checkpoints(before: Sequence[str], job: RealJob) -> None:
    """Find everything that was complete still complete and undamaged, but for what newer checkpoints replace."""
    now = job.complete()
    lost = [name for name in before[-1:] if name not in now]
    damaged = {name: job.damage(name) for name in now if job.damage(name)}
    if lost or damaged:
        raise BrokenPromiseError(f"lost {lost}, damaged {damaged}")


def check_resume(job: RealJob, undisturbed: RealJob) -> None:
    """Run the same command again; compare its end with that of the undisturbed job."""
    newest = job.complete()[-1:]
    job.start_ranks(forked=True)
    statuses = job.wait(job.longest_wait)
    if statuses != [ExitStatus.DONE] * 4:
        raise BrokenPromiseError(f"exit statuses {statuses} after resuming")
    if newest and f"resumed from {job.checkpoints / newest[0]}," not in job.logs():
        raise BrokenPromiseError(f"did not resume from {newest[0]}")
    if job.losses() != undisturbed.losses() or len(job.losses()) != STEPS:
        raise BrokenPromiseError("the losses differ from those of the undisturbed job")
    if job.weights() != undisturbed.weights() or not job.weights():
        raise BrokenPromiseError("the exported weights differ from those of the undisturbed job")


def run_undisturbed(job: RealJob) -> float:
    """Run the job to its end; return the seconds of its longest save."""
    job.start_ranks(forked=True)
    statuses = job.wait(job.longest_wait)
    if statuses != [ExitStatus.DONE] * 4:
        raise BrokenPromiseError(f"exit statuses {statuses} of the undisturbed job:\n{job.logs()}")
    return max(record.get("checkpoint_seconds", 0.0) for record in job.metrics())


def run_repetition(kill: Kill, job: RealJob, undisturbed: RealJob) -> str:
    """Kill, check, resume, check; return what happened in a line."""
    try:
        before = carry_out(kill, job)
        seconds = check_the_others(kill, job, max(job.losses(), default=0))
        check_checkpoints(before, job)
        saved = job.complete()[-1:] or ["none"]
        check_resume(job, undisturbed)
    finally:
        job.kill()
    return f"{kill}: others gone after {seconds:.1f} s, resumed from {saved[0]}, same losses and weights"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the repetitions; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="crash_test"
    )
    parser.add_argument("--repetitions", type=int, default=20, metavar="N", help="kills (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="decides ranks and moments (default 0)")
    parser.add_argument(
        "--longest-wait", type=float, default=180.0, metavar="SECONDS", help="for a job to start, or end (default 180)"
    )
    parser.add_argument(
        "--async-save", action="store_true", help="kill jobs that save in the background; the undisturbed one does not"
    )
    parser.add_argument("--out", type=Path, help="folder to work in (default: a temporary one, removed unless broken)")
    args = parser.parse_args(argv)
    root = args.out or Path(tempfile.mkdtemp(prefix="crash-test-"))
    overrides = ["checkpoint.async_save=true"] if args.async_save else []
    broken = run_repetitions(args.repetitions, root, random.Random(args.seed), args.longest_wait, overrides)
    _say(f"{args.repetitions - broken} of {args.repetitions} kills survived")
    if args.out is None and not broken:
        shutil.rmtree(root)
    return 1 if broken else 0


def run_repetitions(
    repetitions: int, root: Path, generator: random.Random, longest_wait: float, overrides: list[str]
) -> int:
    """Return how many repetitions broke a promise; the folders of the others are removed.

    ``overrides`` are settings of the jobs that are killed, and not of the undisturbed one.
    """
    _import_what_ranks_need()
    model = write_model_elsewhere(root / "model")
    undisturbed = RealJob(model=model, root=root / "undisturbed", longest_wait=longest_wait)
    save_seconds = run_undisturbed(undisturbed)
    _say(f"undisturbed: {STEPS} steps, losses {undisturbed.losses()[1]:.4f} to {undisturbed.losses()[STEPS]:.4f}")
    broken = 0
    for number in range(repetitions):
        kill = draw_kill(number, generator, save_seconds)
        job = replace(undisturbed, root=root / f"kill-{number:02d}", overrides=overrides, processes=[])
        try:
            _say(f"{number + 1}/{repetitions} {run_repetition(kill, job, undisturbed)}")
            shutil.rmtree(job.root)
        except (BrokenPromiseError, subprocess.TimeoutExpired) as error:
            broken += 1
            _say(f"{number + 1}/{repetitions} {kill}: BROKEN: {error}; see {job.root}")
    return broken


def _import_what_ranks_need() -> None:
    """Import without running anything: threads do not survive a fork."""
    from megatron_ads.runtime import cpu_compat

    cpu_compat.install()
    import_module("megatron_ads.training.sft")


def write_model_elsewhere(folder: Path) -> Path:
    """Write the small model in a process of its own, which leaves no threads here; return its folder."""
    code = "import sys; from parity_tests.harness.real_job import write_small_model; write_small_model(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder.absolute())], check=True, cwd=ROOT)
    return folder


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
