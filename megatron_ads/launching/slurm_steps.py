"""The short steps of a Slurm job: every node checks itself, and every task of a rehearsal reports its place."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.launching.allocation import Allocation
from megatron_ads.launching.environment_number import environment_number
from megatron_ads.launching.tiling import read_reports, summary, tiling_problems
from megatron_ads.planning.job import load_job
from megatron_ads.runtime.health.rank_record import ExitStatus

_CHECK_SECONDS = 300.0
_REHEARSAL_SECONDS = 900.0
_ANSWER_SECONDS = 60.0


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


def meeting_place(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return address and port at which node 0 listens.

    It is the node of the batch step, so its name is ours, and a port that is free here is free there.

    Raises:
        ConfigError: If MASTER_PORT is given and no number.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = int(probe.getsockname()[1])
    port = environment_number(environment, "MASTER_PORT", free)
    return environment.get("MASTER_ADDR") or socket.gethostname(), str(port)


@dataclass(frozen=True, slots=True)
class NodesCheck:
    """What the nodes said about themselves."""

    problems: tuple[str, ...]
    finished: bool
    """Whether every node came to an end; if not, it was interrupted, or a node is out of order."""


def check_nodes(allocation: Allocation, arguments: Sequence[str]) -> NodesCheck:
    """Run the check of a node on every node at the same time; problems go to the job's log."""
    place = meeting_place(os.environ)
    command = [
        *("srun", f"--ntasks={allocation.nodes}", "--ntasks-per-node=1", "--input=none", "--kill-on-bad-exit=0"),
        *(sys.executable, "-m", "megatron_ads.launching.node_check", *arguments),
        *(["--meet", ":".join(place), f"--nodes={allocation.nodes}"] if allocation.nodes > 1 else []),
    ]
    try:
        answer = subprocess.run(command, timeout=_CHECK_SECONDS, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        say(f"the nodes did not finish checking themselves within {_CHECK_SECONDS:.0f} s")
        return NodesCheck((), finished=False)
    problems = tuple(answer.stdout.splitlines())
    for line in problems:
        say(line)
    if answer.returncode != 0 and not problems:  # else srun's own lines add nothing
        say(f"the nodes could not check themselves: {' '.join(answer.stderr.split())}")
    return NodesCheck(problems, finished=answer.returncode == 0)


def rehearse(allocation: Allocation, recipe: str, overrides: Sequence[str]) -> int:
    """Let every task report its place in the job, and check that the places make up the job."""
    job = load_job(recipe, overrides, ranks=allocation.ranks)
    if not check_nodes(allocation, [f"--local-ranks={allocation.ranks_per_node}"]).finished:
        return ExitStatus.USER_ERROR
    file = Path(f"rehearsal-{allocation.job}.jsonl")
    command = [
        *("srun", "--input=none", "--kill-on-bad-exit=0", sys.executable, "-m", "megatron_ads.launching.rank_report"),
        *("--recipe", recipe, *overrides),
    ]
    try:
        with file.open("wb") as output:
            subprocess.run(command, stdout=output, timeout=_REHEARSAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        say(f"the tasks did not all report within {_REHEARSAL_SECONDS:.0f} s")
    reports, problems = read_reports(file)
    problems += tiling_problems(reports, job, allocation.nodes)
    for line in (*summary(reports, job), *problems, f"the reports: {file.absolute()}"):
        say(line)
    say("the rehearsal found problems" if problems else "every rank has its place, and nothing is missing or twice")
    return ExitStatus.USER_ERROR if problems else ExitStatus.DONE
