"""Let everything go wrong that can in a job of reinforcement learning, and check that nothing finished is lost.

    python -m parity_tests.rl_faults [--times 10] [--fault NAME] [--seed 0] [--out DIR]

A small model is trained with GRPO on 4 processes, pp 2 x ep 2, stage 0 without routed experts: once undisturbed, then
`--times` times with each fault, in a random rank and step, at a random moment of the phase that is named:

    kill-rollout, kill-update, kill-sync    SIGKILL while answers are generated, weights updated, engines given them
    sigterm                                 SIGTERM to one rank, in any of these phases
    disk-full                               the disk of the job is full from then on (needs the right to mount)
    reward-raises, reward-hangs             the reward fails for all answers of the step; then it is mended
    reward-fails-for-some                   it raises for some: counted, and the job goes on to its end

In all cases but the last the same command is then given again, and it must hold that

- all ranks had ended within --longest-wait, with the status of what happened, and said so in a line
- losses, rollouts with their rewards, and exported weights equal those of the undisturbed job, byte for byte
- no answer that was finished before is generated again, as counted by what each rank put on disk

What each fault came to is printed at the end, also of a run that is interrupted. Exit status: 0 all of it held each
time, 1 something did not (the run's folder is kept and named) or no fault could be inflicted, 130 interrupted.
"""

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from megatron_ads.launching.processes import termination_as_interrupt
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.runtime.health.report import TEXT_FILE
from parity_tests.crash_test import BrokenPromiseError, check_checkpoints, write_model_elsewhere
from parity_tests.harness.inflicted import Fault, fill_disk, inflicted, signal_oneself
from parity_tests.harness.real_job import RealJob

STEPS, PROMPTS, SAMPLES, RANKS = 4, 8, 4, 4
PHASES = ("rollout", "update", "sync")
DISK_MEGABYTES = 160
REWARD_SECONDS = 20
REWARD = """
import pathlib, time
SWITCH = pathlib.Path(__file__).with_name("switch")
def worth(text):
    return sum(map(ord, text)) % 7 / 7
def score(prompt, completion, **columns):
    what = SWITCH.read_text() if SWITCH.exists() else ""
    found = worth(completion[0]["content"])
    if what == "raise" or what == "raise-for-some" and found > 0.5:
        raise RuntimeError("this answer cannot be judged")
    while what == "hang":
        time.sleep(1)
    return found
"""
"""A random model's answers deserve nothing; this one tells them apart all the same."""


@dataclass(kw_only=True)
class RlJob(RealJob):
    """A small job; what its processes print is next to its folder, which may be a disk of its own."""

    recipe: str = "rl/quickstart"
    steps: int = STEPS
    timeout_seconds: int = 240

    def __post_init__(self) -> None:
        """Write its reward."""
        self.beside("").mkdir(parents=True, exist_ok=True)
        self.reward.write_text(REWARD)
        self.overrides = [
            f"train.global_batch_size={PROMPTS}",
            f"rollout.samples={SAMPLES}",
            "rollout.max_new_tokens=12",
            f"rollout.batch_size={SAMPLES}",  # a chunk is one group: two for each rank
            "policy.minibatches=2",
            "optim.warmup_steps=0",
            "optim.learning_rate=1e-3",
            f"rewards.use=[{{name: '{self.reward}:score'}}]",
            f"rewards.timeout_seconds={REWARD_SECONDS}",
        ]

    @property
    def reward(self) -> Path:
        """The file of the reward, the same for all jobs: its name is part of what rollouts are made by."""
        return self.root.parent / "reward.py"

    @property
    def switch(self) -> Path:
        """The file that tells the reward what to do; one job runs at a time."""
        return self.root.parent / "switch"

    def beside(self, name: str) -> Path:
        """Return where something of this job is that is not written by it."""
        return self.root.parent / f"{self.root.name}-beside" / name

    def log(self, who: int | str) -> Path:
        """Return where a rank writes its lines."""
        return self.beside(f"output-{who}.txt")

    def logs(self) -> str:
        """Return all lines of all processes of this job so far."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.beside("").glob("output-*.txt")))

    def run(self, fault: Fault | None = None) -> list[int]:
        """Run it until all ranks have ended; return their statuses."""
        try:
            with inflicted(fault, self.beside("generated.txt")):
                self.start_ranks(forked=True)
            return self.wait(self.longest_wait)
        except subprocess.TimeoutExpired:
            running = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
            raise BrokenPromiseError(f"ranks {running} still ran after {self.longest_wait:.0f} s") from None
        finally:
            self.kill()

    def last_words(self) -> str:
        """Return which rank waited for what, as the report of a hang has it; without one each log's last line."""
        if (report := self.root / TEXT_FILE).exists():
            return report.read_text().splitlines()[0]
        ends = {rank: self.log(rank).read_text(errors="replace").splitlines()[-1:] for rank in range(self.ranks)
                if self.log(rank).exists()}  # fmt: skip
        return "; ".join(f"rank {rank}: {line}" for rank, lines in ends.items() for line in lines)

    def rollouts(self) -> dict[str, bytes]:
        """Return the rollouts of each step, with their rewards."""
        return {file.name: file.read_bytes() for file in (self.root / "rollouts").glob("step-*.jsonl")}


@dataclass(frozen=True, slots=True)
class Case:
    """One fault as it was drawn."""

    name: str
    rank: int
    phase: str
    step: int
    share: float
    """Of the time that the phase takes undisturbed, when the fault comes."""

    def __str__(self) -> str:
        return f"{self.name} (rank {self.rank}, {self.phase} of step {self.step})"

    def fault(self, job: RlJob, seconds: float) -> Fault:
        """Return what happens in a rank; ``seconds`` is how long the phase takes undisturbed."""
        kind = self.name.partition("-")[0]
        if kind == "reward":
            what = {"reward-raises": "raise", "reward-hangs": "hang"}.get(self.name, "raise-for-some")
            strike = partial(_write, job.switch, what)
        elif kind == "disk":
            strike = partial(fill_disk, job.root)
        else:
            strike = signal_oneself(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        return Fault(self.rank, self.phase, self.step, self.share * seconds, strike)

    def expected(self) -> tuple[list[int], str]:
        """Return the ranks' statuses after the fault, and a pattern of what some rank then has said.

        What one rank alone cannot write, its log, ends the others as the loss of a peer does; so 2 stands for 74 too.
        """
        if self.name.startswith("kill"):
            lost = [-signal.SIGKILL if rank == self.rank else ExitStatus.PEER_LOST for rank in range(RANKS)]
            return lost, rf"rank {self.rank} \(stage {self.rank // 2}\) has gone"
        if self.name == "sigterm":
            return [ExitStatus.STOPPED] * RANKS, ""
        said = "Free some space|Make room" if self.name == "disk-full" else "has a value for none"
        return [ExitStatus.USER_ERROR] * RANKS, said


def _write(file: Path, text: str) -> None:
    file.write_text(text)


FAULTS = (*(f"kill-{phase}" for phase in PHASES), "sigterm", "disk-full",
          "reward-raises", "reward-hangs", "reward-fails-for-some")  # fmt: skip


def draw(name: str, generator: random.Random) -> Case:
    """Return a fault in a random rank and step; rewards are computed by rank 0."""
    rank, phase = generator.randrange(RANKS), generator.choice(PHASES)
    step, share = generator.randint(1, STEPS), generator.uniform(0.05, 0.95)
    if name.startswith("kill"):
        phase = name.removeprefix("kill-")
    if name.startswith("reward"):
        rank, phase, share = 0, "reward", 0.0
    if name == "sigterm":
        step = min(step, STEPS - 1)  # after the last step nothing is left to stop
    return Case(name, rank, phase, step, share)


def run_case(case: Case, job: RlJob, undisturbed: RlJob, seconds: float) -> str:
    """Inflict, check, mend, continue, check; return what happened in a line."""
    fault = case.fault(job, seconds)
    if case.name == "reward-fails-for-some":
        return check_counted(case, job, job.run(fault))
    began = time.monotonic()
    statuses = job.run(fault)
    took = time.monotonic() - began
    expected, said = case.expected()
    alone = case.name == "disk-full" and ExitStatus.USER_ERROR in statuses
    found = [ExitStatus.USER_ERROR if alone and each == ExitStatus.PEER_LOST else each for each in statuses]
    if found != expected:
        raise BrokenPromiseError(f"exit statuses {statuses} instead of {expected}")
    line = next((line for line in job.logs().splitlines() if re.search(said, line)), None)
    if line is None:
        raise BrokenPromiseError(f"no rank said: {said}")
    check_checkpoints([], job)
    finished = len(_generated(job))
    for mended in (job.switch, job.root / "filler"):
        mended.unlink(missing_ok=True)
    check_continued(job, undisturbed)
    what = f": {line}" if said else ""
    return f"ended after {took:.0f} s, continued, same end; {finished} chunks kept, none generated twice{what}"


def check_continued(job: RlJob, undisturbed: RlJob) -> None:
    """Give the same command again, and compare its end with that of the undisturbed job."""
    if (statuses := job.run()) != [ExitStatus.DONE] * RANKS:
        raise BrokenPromiseError(f"exit statuses {statuses} after continuing")
    if job.losses() != undisturbed.losses() or len(job.losses()) != STEPS:
        raise BrokenPromiseError("the losses differ from those of the undisturbed job")
    if job.rollouts() != undisturbed.rollouts() or len(job.rollouts()) != STEPS:
        raise BrokenPromiseError("the rollouts differ from those of the undisturbed job")
    if job.weights() != undisturbed.weights() or not job.weights():
        raise BrokenPromiseError("the exported weights differ from those of the undisturbed job")
    if twice := [key for key, times in Counter(_generated(job)).items() if times > 1]:
        raise BrokenPromiseError(f"{len(twice)} finished chunks were generated again")


def check_counted(case: Case, job: RlJob, statuses: list[int]) -> str:
    """Compare the faults in the metrics with the answers that have no reward."""
    if statuses != [ExitStatus.DONE] * RANKS:
        raise BrokenPromiseError(f"exit statuses {statuses} where some answers cannot be judged")
    counted = {
        int(record["step"]): sum(value for name, value in record.items() if name.startswith("rollout/faults/"))
        for record in job.metrics()
        if "loss" in record
    }
    for file in sorted((job.root / "rollouts").glob("step-*.jsonl")):
        step, (_, *answers) = int(file.stem[-6:]), map(json.loads, file.read_text().splitlines())
        missing = sum(value is None for answer in answers for value in answer["rewards"].values())
        if counted.get(step) != missing or (step >= case.step) != bool(missing):
            raise BrokenPromiseError(f"step {step} has {missing} answers without a reward, {counted.get(step)} counted")
    return f"went on to its end; {sum(counted.values()):.0f} faults counted, as many as answers without a reward"


def _generated(job: RlJob) -> list[str]:
    file = job.beside("generated.txt")
    return file.read_text().splitlines() if file.exists() else []


@contextmanager
def own_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Mount a small file system at ``folder`` while the context lasts.

    Raises:
        PermissionError: If this user may not.
    """
    folder.mkdir(parents=True)
    if not wanted:
        yield
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, timeout=10).returncode:
        raise PermissionError("this user may not mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every fault as often as asked; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="rl_faults"
    )
    parser.add_argument("--times", type=int, default=10, metavar="N", help="of each fault (default 10)")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this; may be repeated (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="decides ranks, steps and moments (default 0)")
    parser.add_argument(
        "--longest-wait", type=float, default=300.0, metavar="SECONDS", help="for a job to end (default 300)"
    )
    parser.add_argument("--out", type=Path, help="folder to work in (default: a temporary one, removed unless broken)")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty. Name another folder.")
    root = (args.out or Path(tempfile.mkdtemp(prefix="rl-faults-"))).absolute()
    held: dict[str, list[bool]] = {name: [] for name in args.fault or FAULTS}
    interrupted = False
    try:
        with termination_as_interrupt():
            run_all(root, held, args.times, random.Random(args.seed), args.longest_wait)
    except KeyboardInterrupt:
        interrupted = True
    finally:  # whatever ended it
        for name, outcomes in held.items():
            _say(f"{name}: {sum(outcomes)} of {len(outcomes)} held, {args.times - len(outcomes)} not run")
    if not all(all(outcomes) for outcomes in held.values()):
        return 1
    if args.out is None:
        shutil.rmtree(root)
    if interrupted:
        return 130
    return 0 if any(held.values()) else 1


def run_all(root: Path, held: dict[str, list[bool]], times: int, generator: random.Random, longest_wait: float) -> None:
    """Add to each fault of ``held`` whether everything held, each time; the folders of what held are removed."""
    _import_what_ranks_need()
    model = write_model_elsewhere(root / "model")
    undisturbed = RlJob(model=model, root=root / "undisturbed", longest_wait=longest_wait)
    if (statuses := undisturbed.run()) != [ExitStatus.DONE] * RANKS:
        raise SystemExit(f"exit statuses {statuses} of the undisturbed job:\n{undisturbed.logs()}")
    losses = undisturbed.losses()
    _say(f"undisturbed: {STEPS} steps, losses {losses[1]:.4f} to {losses[STEPS]:.4f}")
    for number in range(times):  # in turn, so that an interrupted run has tried each
        for name in held:
            case = draw(name, generator)
            job = RlJob(model=model, root=root / f"{name}-{number}", longest_wait=longest_wait)
            job.switch.unlink(missing_ok=True)
            try:
                with own_disk(job.root, name == "disk-full"):
                    told = run_case(case, job, undisturbed, _seconds(undisturbed, case.phase))
            except PermissionError as error:
                _say(f"{case}: not run, {error}")
                continue
            except BrokenPromiseError as error:
                told = f"BROKEN: {error} ({job.last_words()}); see {job.root} and {job.beside('')}"
            held[name].append(not told.startswith("BROKEN"))
            _say(f"{number + 1}/{times} {case}: {told}")
            if held[name][-1]:
                shutil.rmtree(job.root)
                shutil.rmtree(job.beside(""))


def _seconds(job: RlJob, phase: str) -> float:
    found = sorted(record[f"timing_s/{phase}"] for record in job.metrics() if f"timing_s/{phase}" in record)
    return found[len(found) // 2]


def _import_what_ranks_need() -> None:
    """Import without running anything: threads do not survive a fork."""
    from megatron_ads.runtime import cpu_compat

    cpu_compat.install()
    import_module("megatron_ads.training.rl")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
