"""The batch step of a Slurm job: start the ranks under srun, wait, and decide what comes next.

`launch/slurm.sbatch` runs this on the first node of the allocation. The ranks are Slurm tasks, one each, so that
Slurm's signals reach them directly. Only the warning ahead of the time limit comes here (``--signal=B:USR1@...``): it
may come before there are ranks, and must not be lost then.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conversion.atomic_file import write_small
from megatron_ads.config import recipes
from megatron_ads.config.run import RunConfig
from megatron_ads.errors import ConfigError, MegatronAdsError, one_line
from megatron_ads.launching.attempts import (
    ATTEMPT,
    Decision,
    checkpoint_step,
    decide,
    describe_failure,
    fruitless_attempts,
    judge,
)
from megatron_ads.launching.environment import (
    Allocation,
    core_warnings,
    environment_number,
    meeting_place,
    rank_variables,
)
from megatron_ads.launching.job_check import check_job, needs_gpu
from megatron_ads.launching.node_check import NodesCheck, check_nodes
from megatron_ads.launching.placement import placement_problems, read_reports, summary
from megatron_ads.launching.sweep import sweep_overrides
from megatron_ads.planning.job import load_job
from megatron_ads.runtime.health.rank_record import FOLDER_VARIABLE, ExitStatus, read_records
from megatron_ads.training.folder_lock import folders_of, hold
from megatron_ads.training.stopping import StopRequest, clear_outcome, read_outcome

PLACEMENT_VARIABLE = "MEGATRON_ADS_CHECK_PLACEMENT"
_OLD_PLACEMENT_VARIABLE = "MEGATRON_ADS_REHEARSE"
_PLACEMENT_SECONDS = 900.0
_ANSWER_SECONDS = 60.0
_POLL_SECONDS = 2.0
_START_SECONDS = 5.0
"""After which every rank has begun to listen for signals; before, one would kill it."""
_NOTICE_SECONDS = 30.0
"""Between repetitions of the signal that asks the ranks to stop."""
_GRACE_SECONDS = 60.0
"""How long the other ranks may continue after one has failed: they notice within seconds, unless they hang."""
_REQUEUE_SECONDS = 60.0
"""How long Slurm may take to end this process after it accepted the job back."""


def main(arguments: Sequence[str]) -> int:
    """Carry one attempt out; return the exit status of the job if it is not put back into the queue."""
    with StopRequest(signal.SIGTERM, signal.SIGUSR1) as notice:  # that Slurm is about to end this job
        try:
            if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
                raise ConfigError("usage: sbatch [options] launch/slurm.sbatch RECIPE [key=value ...]")
            return _run(Allocation.of(os.environ), arguments[0], list(arguments[1:]), notice)
        except MegatronAdsError as error:
            say(one_line(error))
            return ExitStatus.USER_ERROR


def _run(allocation: Allocation, recipe: str, overrides: list[str], notice: StopRequest) -> int:
    if wants_placement_check(os.environ):
        return check_placement(allocation, recipe, overrides)
    overrides += sweep_overrides(allocation.array_index, recipe, overrides, os.environ)
    if problems := check_job(recipe, overrides, allocation.ranks).problems:
        for problem in problems:
            say(problem)
        return ExitStatus.USER_ERROR
    with hold(folders_of(recipes.load_job(recipe, overrides)), os.environ):
        attempt = Attempt.begin(allocation, recipe, overrides)
        check = attempt.check_nodes()
        say_nodes(check)
        if check.problems:
            return ExitStatus.USER_ERROR
        started = check.finished and notice.received is None
        if started:
            attempt.run_ranks(notice)
        decision = attempt.decision(started)
        say(decision.reason)
    if decision.again:
        if refusal := ask_slurm("scontrol", "requeue", allocation.job):  # which ends this process
            say(f"Slurm did not take the job back: {refusal}. Submit it again to continue from the checkpoint.")
        else:
            time.sleep(_REQUEUE_SECONDS)
    return decision.status


def say(text: str) -> None:
    """Print a line to the job's log."""
    print(f"{time.strftime('%H:%M:%S')} [launch] {text}", flush=True)


def ask_slurm(*command: str) -> str | None:
    """Run one of Slurm's own programs; return what went wrong, or None."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer in {_ANSWER_SECONDS:.0f} s"
    if answer.returncode == 0:
        return None
    return " ".join(answer.stderr.split()) or f"{command[0]} ended with status {answer.returncode}"


def say_nodes(check: NodesCheck) -> None:
    """Print what a check of the nodes found."""
    for line in (*check.problems, *([check.failure] if check.failure else [])):
        say(line)


def wants_placement_check(environment: Mapping[str, str]) -> bool:
    """Whether the job is to check where its ranks would run, instead of training; a former name is still accepted."""
    old = environment.get(_OLD_PLACEMENT_VARIABLE, "0") not in ("", "0")
    if old:
        say(f"{_OLD_PLACEMENT_VARIABLE} is now called {PLACEMENT_VARIABLE}; the old name will be removed")
    return old or environment.get(PLACEMENT_VARIABLE, "0") not in ("", "0")


def check_placement(allocation: Allocation, recipe: str, overrides: Sequence[str]) -> int:
    """Let every task report which rank it would be, and check that the ranks make up the job."""
    job = load_job(recipe, overrides, ranks=allocation.ranks)
    check = check_nodes(allocation, [f"--local-ranks={allocation.ranks_per_node}"])
    say_nodes(check)
    if not check.finished:
        return ExitStatus.USER_ERROR
    file = Path(f"placement-{allocation.job}.jsonl")
    command = ["srun", "--input=none", "--kill-on-bad-exit=0", sys.executable, "-m", "megatron_ads.launching.placement"]
    command += ["--recipe", recipe, *overrides]
    try:
        with file.open("wb") as output:
            subprocess.run(command, stdout=output, timeout=_PLACEMENT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        say(f"the tasks did not all report within {_PLACEMENT_SECONDS:.0f} s")
    reports, problems = read_reports(file)
    problems += placement_problems(reports, job, allocation.nodes)
    for line in (*summary(reports, job), *problems, f"the reports: {file.absolute()}"):
        say(line)
    say("the placement has problems" if problems else "every rank has its place, and nothing is missing or duplicated")
    return ExitStatus.USER_ERROR if problems else ExitStatus.DONE


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the ranks of a job."""

    allocation: Allocation
    recipe: str
    overrides: Sequence[str]
    config: RunConfig
    folder: Path

    @classmethod
    def begin(cls, allocation: Allocation, recipe: str, overrides: Sequence[str]) -> "Attempt":
        """Record the step that the job continues from.

        Raises:
            ConfigError: If the recipe cannot be composed, or the job makes no progress.
        """
        config = recipes.load_job(recipe, overrides)
        folder = Path(config.log.dir) / "slurm" / allocation.job / f"attempt-{allocation.restarts}"
        step = checkpoint_step(Path(config.checkpoint.dir))
        before = fruitless_attempts(folder.parent, step)
        if before > max_restarts(os.environ):
            raise ConfigError(
                f"This job began {before} times at step {step} and never reached another checkpoint. Look at "
                f"{folder.parent}, and submit it again."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_small(folder / ATTEMPT, json.dumps({"step": step}))
        clear_outcome(Path(config.log.dir))
        return cls(allocation=allocation, recipe=recipe, overrides=overrides, config=config, folder=folder)

    @property
    def records(self) -> Path:
        """Where the ranks record how they ended."""
        return self.folder / "records"

    def check_nodes(self) -> NodesCheck:
        """Let every node check itself and its connections to the others."""
        folders = dict.fromkeys((self.config.checkpoint.dir, self.config.log.dir))
        arguments = [f"--local-ranks={self.allocation.ranks_per_node}", f"--expect={self.folder / ATTEMPT}"]
        arguments += [f"--folder={folder}" for folder in folders]
        if needs_gpu(self.config, os.environ):
            arguments.append("--gpus")
            for line in core_warnings(self.allocation.ranks_per_node, os.environ):
                say(line)
        return check_nodes(self.allocation, arguments)

    def run_ranks(self, notice: StopRequest) -> None:
        """Start every rank and wait until all have ended, or until those that still run after a failure are ended."""
        size = self.allocation
        say(f"{self.recipe}: {size.ranks} ranks on {size.nodes} nodes, attempt {size.restarts}, logs in {self.folder}")
        command = [
            *("srun", "--kill-on-bad-exit=0", "--input=none", f"--output={self.folder}/rank-%4t.log"),
            *(sys.executable, "-m", "megatron_ads.training", "--recipe", self.recipe, *self.overrides),
        ]
        host, port = meeting_place(os.environ)
        environment = {
            **os.environ,
            **rank_variables(self.config, os.environ),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": str(size.ranks_per_node),
            FOLDER_VARIABLE: str(self.records),
        }
        if "SLURM_CPUS_PER_TASK" in environment:  # since Slurm 22.05, srun does not take it from the batch job
            environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
        with subprocess.Popen(command, env=environment, close_fds=False) as job:  # srun inherits the folders' lock
            _wait(job, lambda: any(record.failed for record in read_records(self.records)), notice, size.job)

    def decision(self, started: bool) -> Decision:
        """Report a failure and decide what to do; ``started``: whether ranks were started at all."""
        fruitless = fruitless_attempts(self.folder.parent, checkpoint_step(Path(self.config.checkpoint.dir)))
        verdict = ExitStatus.CRASHED
        if started:
            ended = read_records(self.records)
            verdict = judge(ended, self.allocation.ranks, read_outcome(Path(self.config.log.dir)))
            for line in describe_failure(ended, range(self.allocation.ranks), self.folder):
                say(line)
        return decide(verdict, fruitless, max_restarts(os.environ))


def max_restarts(environment: Mapping[str, str]) -> int:
    """Return how often a job may be started again without progress."""
    return environment_number(environment, "MEGATRON_ADS_MAX_RESTARTS", 3)


def _wait(job: "subprocess.Popen[bytes]", has_failed: Callable[[], bool], notice: StopRequest, number: str) -> None:
    """Wait for srun; pass a stop on to the ranks, and end those that still run after a failure."""
    give_up: float | None = None
    next_notice = time.monotonic() + _START_SECONDS
    while job.poll() is None:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if notice.received is not None and now > next_notice:
            say(f"{notice.received.name}: the ranks are asked to save a checkpoint and stop")
            if problem := ask_slurm("scancel", "--quiet", "--signal=USR1", number):
                say(f"they could not be asked, and will be again: {problem}")
            next_notice = now + _NOTICE_SECONDS
        if give_up is None and has_failed():
            give_up = now + _GRACE_SECONDS
        if give_up is not None and now > give_up:
            say(f"ranks that still run {_GRACE_SECONDS:.0f} s after another one failed are ended")
            job.terminate()  # srun ends its tasks
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(_GRACE_SECONDS)
            job.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
