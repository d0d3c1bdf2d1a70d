"""What one node must have before ranks are started on it. Light: no torch, so that it can run on every node first.

    python -m megatron_ads.launching.node_check --local-ranks 8 --gpus --folder RUN --expect RUN/slurm/7/attempt.json \\
      --rendezvous HOST:PORT --nodes 31 --node 3

Prints a line for every problem, and exits with 2 if there is one.
"""

import argparse
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.disk import existing
from megatron_ads.launching.environment import Allocation, meeting_place
from megatron_ads.launching.network_check import check_connections

_OLDEST_PYTHON = (3, 11)
_DRIVER_SECONDS = 60.0
_CHECK_SECONDS = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="megatron_ads.launching.node_check")
    parser.add_argument("--local-ranks", type=int, required=True)
    parser.add_argument("--gpus", action="store_true", help="each rank needs a GPU")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="must be writable")
    parser.add_argument("--expect", type=Path, help="a file that another node has written to shared storage")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where node 0 listens")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    args = parser.parse_args()
    problems = python_problems(sys.version_info[:2])
    if args.gpus:
        problems += gpu_problems(args.local_ranks, os.environ) + compiler_problems(os.environ)
    for folder in args.folder:
        problems += folder_problems(folder)
    if args.expect is not None and not args.expect.is_file():
        problems.append(
            f"{args.expect}, just written on the first node, is not here: log.dir is not on storage that all nodes "
            "share. Set log.dir and checkpoint.dir to a shared folder."
        )
    if args.rendezvous is not None:
        host, port = args.rendezvous.rsplit(":", 1)
        problems += check_connections(host, int(port), number=args.node, count=args.nodes)
    for problem in problems:
        print(f"{socket.gethostname()}: {problem}", flush=True)
    return 2 if problems else 0


def python_problems(version: tuple[int, int]) -> list[str]:
    if version >= _OLDEST_PYTHON:
        return []
    return [
        f"Python is {platform.python_version()} ({sys.executable}), but 3.11 or newer is needed; make an environment "
        "with ./launch/setup_env.sh, or name one in MEGATRON_ADS_VENV."
    ]


def wants_gpu(environment: Mapping[str, str]) -> bool:
    """Whether ranks started here will use GPUs: Slurm gave some to the job, or there is a driver and none is hidden."""
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    granted = any(environment.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE"))
    return granted or Path("/proc/driver/nvidia/version").exists()


def gpu_problems(local_ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the driver and the GPUs that ranks of this node would see."""
    if shutil.which("nvidia-smi") is None:
        return ["nvidia-smi is not found: the NVIDIA driver is not installed on this node. Use nodes with GPUs."]
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"the NVIDIA driver did not answer in {_DRIVER_SECONDS:.0f} s; leave this node out (sbatch --exclude)."]
    if answer.returncode != 0:
        said = " ".join((answer.stderr or answer.stdout).split())[:200]
        return [f"the NVIDIA driver does not work: {said} Leave this node out (sbatch --exclude) and report it."]
    there = len(answer.stdout.splitlines())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = there if visible is None else min(there, len(visible.split(",")))
    if count >= local_ranks:
        return []
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible})"
    return [
        f"{count} GPUs are visible{shown}, but {local_ranks} ranks are to run here. Ask for as many GPUs as ranks a "
        "node (sbatch --gpus-per-node), or start fewer ranks."
    ]


def compiler_problems(environment: Mapping[str, str]) -> list[str]:
    """Return what Triton lacks: on a GPU it compiles kernels in the first forward pass, after all weights are read."""
    problems = []
    compiler = environment.get("CC") or "gcc or clang"
    if not any(map(shutil.which, compiler.split(" or "))):
        problems.append(
            f"no C compiler ({compiler}) is found, which kernels are compiled with. Install gcc, or name one in CC."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        problems.append(
            f"{header} does not exist, which kernels are compiled with. Install Python's headers (Debian: python3-dev)."
        )
    cache = environment.get("TRITON_CACHE_DIR")
    return problems + (folder_problems(Path(cache)) if cache else [])


def folder_problems(folder: Path) -> list[str]:
    """Return why a folder cannot be written, or made where it is missing; nothing is left behind."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            file.write(b"written")
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}. Give a folder that every node may write to."]
    return []


@dataclass(frozen=True, slots=True)
class NodesCheck:
    """What the nodes of an allocation said about themselves."""

    problems: tuple[str, ...]
    finished: bool
    """Whether every node came to an end; if not, it was interrupted, or a node is out of order."""
    failure: str | None = None
    """Why the check itself could not be carried out."""


def check_nodes(allocation: Allocation, arguments: Sequence[str]) -> NodesCheck:
    """Run this check on every node of a Slurm allocation at the same time."""
    place = meeting_place(os.environ)
    command = [
        *("srun", f"--ntasks={allocation.nodes}", "--ntasks-per-node=1", "--input=none", "--kill-on-bad-exit=0"),
        *(sys.executable, "-m", "megatron_ads.launching.node_check", *arguments),
        *(["--rendezvous", ":".join(place), f"--nodes={allocation.nodes}"] if allocation.nodes > 1 else []),
    ]
    try:
        answer = subprocess.run(command, timeout=_CHECK_SECONDS, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return NodesCheck((), False, f"the nodes did not finish checking themselves within {_CHECK_SECONDS:.0f} s")
    problems, failure = tuple(answer.stdout.splitlines()), None
    if answer.returncode != 0 and not problems:  # else srun's own lines add nothing
        failure = f"the nodes could not check themselves: {' '.join(answer.stderr.split())}"
    return NodesCheck(problems, answer.returncode == 0, failure)


if __name__ == "__main__":
    sys.exit(main())
