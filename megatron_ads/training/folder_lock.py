"""One job at a time in a folder: a lock that names its holder. No torch, for launchers.

The system's lock on the file ends with the process that took it and those that inherited it, however they end. Not
every network file system shows it on other machines, so the content, which a job removes at its end, counts too.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TextIO

from megatron_ads.config.run import RunConfig
from megatron_ads.errors import ConfigError
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

LOCK_FILE = "job.lock"
_TRIES = 10
"""A tenth of a second apart: whoever only looks at the lock has it for an instant."""
_SLURM_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process that works in a folder for its job."""

    host: str
    pid: int
    since: str
    slurm_job: str | None = None
    restarts: int = 0
    """How often Slurm has started that job before."""
    rendezvous: str | None = None
    """Where the nodes of a job under torchrun meet, if there are several."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Describe this process."""
        job, index = environment.get("SLURM_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        nodes = environment.get("NNODES") or "1"
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            slurm_job=job if index is None else f"{environment.get('SLURM_ARRAY_JOB_ID')}_{index}",
            restarts=int(environment.get("SLURM_RESTART_COUNT") or "0"),
            rendezvous=None if nodes == "1" else f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}",
        )

    def __str__(self) -> str:
        slurm = "" if self.slurm_job is None else f", Slurm job {self.slurm_job}"
        return f"process {self.pid} on {self.host}{slurm}, since {self.since}"


def folders_of(config: RunConfig) -> dict[str, Path]:
    """Return the folders that a job writes to, by setting."""
    return {"log.dir": Path(config.log.dir), "checkpoint.dir": Path(config.checkpoint.dir)}


@contextmanager
def hold(folders: Mapping[str, Path], environment: Mapping[str, str]) -> Iterator[None]:
    """Hold folders for this process and the children that inherit its files; what a dead job left is taken over.

    Raises:
        ConfigError: Naming the job that holds one, or if one cannot be written.
    """
    me = Holder.of(environment)
    with ExitStack() as held:
        for setting, folder in {path.resolve(): (name, path) for name, path in folders.items()}.values():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_held(setting, folder, me))
            except OSError as error:
                raise ConfigError(f"{setting} {folder} cannot be written: {error.strerror}. Choose another.") from None
        yield


@contextmanager
def _held(setting: str, folder: Path, me: Holder) -> Iterator[None]:
    path = folder / LOCK_FILE
    for _ in range(_TRIES):
        file = path.open("a+", encoding="utf-8")
        found = _other_holder(file, me)
        with suppress(FileNotFoundError):  # whoever held it has just ended
            if found is None and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()
        time.sleep(0.1)
    else:
        raise ConfigError(_in_use(setting, folder, found))
    with file:
        os.set_inheritable(file.fileno(), True)
        file.truncate(0)
        file.write(json.dumps(asdict(me)))
        file.flush()
        try:
            yield
        finally:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # what the job did is done
                logger.warning(
                    "%s cannot be deleted (%s); jobs on other machines take the folder as in use until it is.",
                    *(path, error.strerror),
                )


def require_free(folders: Mapping[str, Path], environment: Mapping[str, str]) -> None:
    """Refuse folders that another job holds; nothing is changed.

    Raises:
        ConfigError: Naming the job.
    """
    me = Holder.of(environment)
    for setting, folder in folders.items():
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            (folder / LOCK_FILE).open(encoding="utf-8") as file,
        ):
            if found := _other_holder(file, me, first_node=environment.get("NODE_RANK", "0") in ("", "0")):
                raise ConfigError(_in_use(setting, folder, found))


def _in_use(setting: str, folder: Path, found: "Holder | str | None") -> str:
    unsure = isinstance(found, Holder) and found.host != socket.gethostname()
    advice = f" If that one has ended, which cannot be seen from here, delete {folder / LOCK_FILE}." if unsure else ""
    return (
        f"{setting} {folder} is in use by another job: {found}. Wait for it to end, or choose another log.dir and "
        f"checkpoint.dir.{advice}"
    )


def _other_holder(file: TextIO, me: Holder, *, first_node: bool = True) -> "Holder | str | None":
    """Lock an open file; return the other job that holds it, or only that there is one; None if this job may."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if file.writable() else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        locked: bool | None = False
        if not file.writable():  # Slurm may be slow to answer, and a job that starts meanwhile must get the lock
            fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        locked = True
    except OSError:  # a file system without locks
        locked = None
    file.seek(0)
    try:
        holder = Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return "one that has just begun" if locked else None
    if holder.slurm_job is not None and holder.slurm_job == me.slurm_job and holder.restarts < me.restarts:
        return None  # Slurm has ended it before it started us
    if not first_node and holder.rendezvous is not None and holder.rendezvous == me.rendezvous:
        return None  # ours, of node 0
    if locked is None:
        locked = holder.host == me.host and Path(f"/proc/{holder.pid}").exists()
    foreign = holder.host != me.host and (holder.slurm_job is None or holder.slurm_job != me.slurm_job)
    return holder if locked or (foreign and not _slurm_has_ended(holder.slurm_job)) else None


def _slurm_has_ended(job: str | None) -> bool:
    """Whether Slurm says that a job is over; not, if it cannot be asked."""
    if job is None or shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if answer.returncode != 0:
        return "Invalid job id" in answer.stderr  # it is forgotten
    alive = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING"}
    return alive.isdisjoint(answer.stdout.split())
