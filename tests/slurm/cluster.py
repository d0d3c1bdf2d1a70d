"""A real Slurm cluster on this machine for the tests, and what a user does with it: submit, look, wait."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "slurm" / "cluster.sh"
BATCH = ROOT / "launch" / "slurm.sbatch"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str | None:
    """Return why there can be no cluster here, and what to do about it; None if there can."""
    if os.environ.get("MEGATRON_ADS_SLURM", "0") in ("", "0"):
        return "takes some ten minutes and starts a Slurm cluster on this machine: run ./tests/slurm/run.sh"
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        return f"{', '.join(missing)} not there: as root, apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "an emulated Slurm cluster needs root (several nodes on one host): run ./tests/slurm/run.sh as root"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    def command(self, *words: str) -> str:
        """Run one of Slurm's programs and return what it prints."""
        answer = subprocess.run(words, env=self.environment(), capture_output=True, text=True, timeout=60, check=False)
        assert answer.returncode == 0, answer
        return answer.stdout

    def lose_node(self, node: str) -> None:
        """Take ``node`` down, which requeues its jobs, and give it back; its own slurmd may have done so already."""
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        resume = ["scontrol", "update", f"nodename={node}", "state=resume"]
        answer = subprocess.run(resume, env=self.environment(), capture_output=True, text=True, timeout=60, check=False)
        state = self.command("sinfo", "--noheader", f"--nodes={node}", "--format=%T")
        assert answer.returncode == 0 or "down" not in state, (answer, state)

    def environment(self) -> dict[str, str]:
        """Return the environment of whoever uses the cluster."""
        return os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",  # the nodes are all this machine, whose name need not resolve
        }

    def submit(self, log: Path, *words: str, options: tuple[str, ...] = (), export: str = "") -> str:
        """Submit ``launch/slurm.sbatch`` with its arguments and return the number of the job."""
        variables = f"--export=ALL{',' if export else ''}{export}"
        return self.command(
            "sbatch", "--parsable", f"--output={log}", f"--chdir={self.folder}", variables, *options, str(BATCH), *words
        ).strip()

    def field(self, job: str, name: str) -> str:
        """Return a field of ``scontrol show job``."""
        shown = self.command("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in shown if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        """Return such as RUNNING."""
        return self.field(job, "JobState")

    def wait(self, what: str, is_so: Callable[[], bool], seconds: float, log: Path) -> None:
        """Wait until something is so; fail with the job's log if it does not come to be."""
        deadline = time.monotonic() + seconds
        while not is_so():
            text = log.read_text(errors="replace") if log.exists() else "(no log)"
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s:\n{text}"
            time.sleep(1)

    def wait_for_end(self, job: str, log: Path, seconds: float = 180) -> str:
        """Wait until a job is over, and return its last state."""
        self.wait(f"the end of job {job}", lambda: self.state(job) in ENDED, seconds, log)
        return self.state(job)

    def wait_for_requeue(self, job: str, restarts: int, log: Path, seconds: float = 90) -> None:
        """Wait until a job is back in the queue, and let it start at once: Slurm would hold it back for two minutes."""

        def is_back() -> bool:
            return self.field(job, "Restarts") == str(restarts) and self.state(job) == "PENDING"

        self.wait(f"requeue {restarts} of job {job}", is_back, seconds, log)
        self.command("scontrol", "update", f"jobid={job}", "StartTime=now")


@contextlib.contextmanager
def running_cluster(folder: Path, nodes: int, cpus: int) -> Iterator[Cluster]:
    """Start a cluster, and stop it whatever happens."""
    environment = os.environ | {"PORTBASE": str(_free_ports(nodes + 12))}
    subprocess.run([SCRIPT, "up", folder, str(nodes), str(cpus)], env=environment, check=True, timeout=90)
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=120)


def _free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive ports that nobody uses."""
    for _ in range(100):
        first = random.randrange(17000, 30000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("", port)))
            return first
    raise AssertionError(f"no {count} free ports in a row")


def rank_pid(job: str, rank: int) -> int | None:
    """Return the process of a rank; None if it is not there."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = set((process / "environ").read_text(errors="replace").split("\0"))
            words = (process / "cmdline").read_text(errors="replace").split("\0")
            if wanted <= variables and "megatron_ads.training" in words:
                return int(process.name)
    return None
