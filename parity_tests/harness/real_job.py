"""A whole training job in processes of its own, started as srun would start it, or by `megatron-ads train`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
FEW_ROWS = "data.sources=[{kind: simulator, task: query_ad_relevance, rows: 400}]"
"""The quickstart's source at a size that a process reads in no time."""
SMALL: dict[str, Any] = dict(CONFIGS[Preset.tiny]) | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "torch_dtype": "float32",
}


@dataclass(kw_only=True)
class RealJob:
    """One run directory, and the processes that work in it."""

    model: Path
    root: Path
    recipe: str = "sft/quickstart"
    ranks: int = 4
    layout: dict[str, int] = field(default_factory=lambda: {"pp": 2, "ep": 2, "first_stage_layers": 2})
    """By default stage 0 has dense layers only."""
    steps: int = 12
    save_every: int = 2
    timeout_seconds: int = 40
    overrides: list[str] = field(default_factory=list)
    """Further settings, ``reweight.tasks=true``; they win over those above."""
    longest_wait: float = 240.0
    """Seconds that starting or finishing may take."""
    processes: list["subprocess.Popen[bytes] | ForkedRank"] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """Where the job saves."""
        return self.root / "checkpoints"

    def _arguments(self) -> list[str]:
        layout = {"first_stage_layers": "null"} | self.layout
        return [
            "--recipe",
            self.recipe,
            f"model.load={self.model}",
            f"log.dir={self.root}",
            "log.tensorboard=false",
            FEW_ROWS,
            f"checkpoint.save_every={self.save_every}",
            f"train.max_steps={self.steps}",
            "train.evaluate_every=null",
            "data.validation_rows=0",
            "data.seq_length=128",
            "train.global_batch_size=4",
            "train.micro_batch_size=1",
            "optim.warmup_steps=2",
            f"runtime.timeout_seconds={self.timeout_seconds}",
            "runtime.threads=1",
            *(f"layout.{name}={size}" for name, size in layout.items()),
            *self.overrides,
        ]

    def start_ranks(self, *, forked: bool = False) -> None:
        """Start every rank as a process of its own, as srun does: nothing but the ranks watches over them.

        ``forked`` ranks begin with what this process has imported, which takes some 6 CPU seconds a rank.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        port = free_port()
        for rank in range(self.ranks):
            environment = _environment() | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks),
                "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            if forked:
                self.processes.append(ForkedRank(self._arguments(), environment, self.log(rank)))
            else:
                self._start(["-m", "megatron_ads.training", *self._arguments()], environment, self.log(rank))

    def start_launcher(self) -> None:
        """Start the job as a user does, under `megatron-ads train`."""
        command = ["-m", "megatron_ads.cli", "train", "--ranks", str(self.ranks), *self._arguments()]
        self._start(command, _environment(), self.log("launcher"))

    def _start(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )

    def log(self, who: int | str) -> Path:
        """Return where a rank, or the launcher with all of its ranks, writes its lines."""
        return self.root / f"output-{who}.txt"

    def logs(self) -> str:
        """Return all lines of all processes of this job so far."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.root.glob("output-*.txt")))

    def wait(self, timeout: float) -> list[int]:
        """Return the exit status of every process.

        Raises:
            subprocess.TimeoutExpired: If one still runs after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        statuses = [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        self.processes.clear()
        return statuses

    def run_to_end(self, *, forked: bool = False) -> None:
        """Start every rank and wait until all are done; what still runs then is killed.

        Raises:
            AssertionError: If a rank ends otherwise, with all that the job has logged.
            subprocess.TimeoutExpired: If one still runs after ``longest_wait`` seconds.
        """
        self.start_ranks(forked=forked)
        try:
            statuses = self.wait(self.longest_wait)
        finally:
            self.kill()
        if statuses != [ExitStatus.DONE] * self.ranks:
            raise AssertionError(f"exit statuses {statuses}:\n{self.logs()}")

    def rank_pid(self, rank: int) -> int | None:
        """Return the process id of a rank, also below the launcher; None if it is not there yet, or any more."""
        if len(self.processes) == self.ranks:
            return self.processes[rank].pid
        ranks = [pid for pid in descendants(self.processes[0].pid) if f"RANK={rank}" in _variables(pid)]
        return ranks[0] if ranks else None

    def kill(self) -> None:
        """End whatever still runs, ranks below the launcher included."""
        for process in self.processes:
            below = descendants(process.pid) if process.poll() is None else []
            process.kill()
            process.wait()
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.processes.clear()

    def losses(self) -> dict[int, float]:
        """Return the loss of every step so far."""
        return {record["step"]: record["loss"] for record in self.metrics() if "loss" in record}

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of the metrics file that are whole."""
        file = self.root / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def weights(self) -> dict[str, int]:
        """Return a checksum of every file of exported weights."""
        return {file.name: zlib.crc32(file.read_bytes()) for file in (self.root / "export").glob("*.safetensors")}

    def complete(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        return sorted(manifest.parent.name for manifest in self.checkpoints.glob("step-*/manifest.json"))

    def damage(self, name: str) -> list[str]:
        """Return what is wrong with a checkpoint, by its manifest alone."""
        folder = self.checkpoints / name
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return [
            file
            for file, said in files.items()
            if not (folder / file).is_file() or zlib.crc32((folder / file).read_bytes()) != said["crc32"]
        ]


@contextlib.contextmanager
def two_rank_job(folder: Path, **settings: Any) -> Iterator[RealJob]:
    """Describe a job of two ranks that share the experts of a small model; what still runs at the end is killed."""
    options = {"root": folder / "run", "ranks": 2, "layout": {"pp": 1, "ep": 2}} | settings
    job = RealJob(model=write_small_model(folder / "model"), **options)
    try:
        yield job
    finally:
        job.kill()


class ForkedRank:
    """A rank forked from this process, with the methods of ``subprocess.Popen`` that a job needs."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        """Fork; the child runs what ``python -m megatron_ads.training`` runs and never returns."""
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # not pytest's
            os.environ |= environment
            sys.argv = ["megatron_ads.training", *arguments]
            os._exit(_run_rank())

    def poll(self) -> int | None:
        """Return the exit status, or None while the rank runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float = 60.0) -> int:
        """Return the exit status.

        Raises:
            subprocess.TimeoutExpired: If the rank still runs.
        """
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the rank has exited."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the rank at once."""
        self.send_signal(signal.SIGKILL)


def _run_rank() -> int:
    from megatron_ads.training.__main__ import main

    try:
        return main()
    except BaseException:  # noqa: BLE001 - a process boundary: what the interpreter would have printed
        traceback.print_exc()
        return 1


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs, and so on."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, listed) for each in (child, *descendants(child))]


def _variables(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def write_small_model(folder: Path | str) -> Path:
    """Write the model of these jobs: two dense layers, two with experts, an MTP layer, and a tokenizer."""
    write_demo_model(Path(folder), SMALL)
    return Path(folder)


def _environment() -> dict[str, str]:
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
