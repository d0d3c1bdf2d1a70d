"""How each rank of a job ended: its exit status, and a file per rank that shows the launcher which one failed first.

An exit status alone does not do: Slurm reports the largest one of all ranks, torchrun that of one.
"""

import json
import os
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from conversion.atomic_file import write_small
from megatron_ads.errors import ConfigError

FOLDER_VARIABLE = "MEGATRON_ADS_RANK_RECORDS"
"""Environment variable that names the folder; without it nothing is recorded."""
_TORCHRUN_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_TRACEBACK_LINES = 12
_ROOM_BYTES = 16384


class ExitStatus(IntEnum):
    """Process exit statuses of a training rank. Statuses from 74 on are those of BSD's sysexits where one fits."""

    DONE = 0
    """The job reached its last step and exported its weights."""
    CRASHED = 1
    """An error in the program, with a traceback."""
    USER_ERROR = 2
    """A setting, a checkpoint, a data file or the topology is wrong; the log says what to do. Do not start again."""
    PEER_LOST = 74
    """Another rank died, failed, or could not be reached; the log names it. Start again from the last checkpoint."""
    STOPPED = 75
    """Stopped by a signal after a whole step, with a checkpoint. Start again to continue (EX_TEMPFAIL)."""
    HUNG = 76
    """Nothing moved for the job's timeout; every rank's log names the cause, ``hang.txt`` in the log folder has the
    report. Start again from the last checkpoint, on other machines if one of them was the cause."""
    DIVERGED = 77
    """Update after update was skipped, or the weights are no numbers; nothing is exported. Do not start again as it is:
    the log says what to change."""

    @property
    def is_final(self) -> bool:
        """Whether another start would end in the same way."""
        return self in (ExitStatus.USER_ERROR, ExitStatus.DIVERGED)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRecord:
    """The end of one rank that had time to write it down; a killed one has none."""

    rank: int
    host: str
    status: ExitStatus
    message: str
    """What was wrong; empty if nothing was."""
    ended: float
    """Seconds since the epoch, by the clock of ``host``."""

    @property
    def failed(self) -> bool:
        """Whether this rank ended before its time."""
        return self.status not in (ExitStatus.DONE, ExitStatus.STOPPED)


def own_folder() -> Path | None:
    """Return where this rank writes, below a folder for each restart by torchrun; None: no launcher asked for it."""
    folder, restart = os.environ.get(FOLDER_VARIABLE), os.environ.get(_TORCHRUN_RESTARTS)
    if folder is None:
        return None
    return Path(folder) if restart is None else Path(folder) / f"restart-{int(restart):03d}"


def forget_record(rank: int) -> None:
    """Forget how this rank ended before, and take room on the disk for how it will, even if that is full by then.

    torchrun counts only the restarts that it does after a failure of its own.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    if (folder := own_folder()) is None:
        return
    _file(folder, rank).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _room(folder, rank).write_bytes(bytes(_ROOM_BYTES))
    except OSError as error:
        message = f"{folder} (log.dir) cannot be written: {error.strerror}. Make room there, or choose another log.dir."
        raise ConfigError(message) from None


def write_record(rank: int, status: ExitStatus, message: str = "") -> None:
    """Write down how this rank ends, if a launcher asked for it; the first end counts."""
    folder = own_folder()
    if folder is None or (file := _file(folder, rank)).exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    _room(folder, rank).unlink(missing_ok=True)
    record = RankRecord(rank=rank, host=socket.gethostname(), status=status, message=message, ended=time.time())
    write_small(file, json.dumps(asdict(record)))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.json"


def _room(folder: Path, rank: int) -> Path:
    return folder / f".rank-{rank:04d}.room"


def last_lines(error: BaseException) -> str:
    """Return the end of a traceback, which is the part that says what happened."""
    return "\n".join("".join(traceback.format_exception(error)).splitlines()[-_TRACEBACK_LINES:])


def read_records(folder: Path) -> list[RankRecord]:
    """Return the records found, the earliest end first."""
    stored = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("rank-*.json"))]
    records = [RankRecord(**each | {"status": ExitStatus(each["status"])}) for each in stored]
    return sorted(records, key=lambda record: record.ended)


def first_failure(records: Sequence[RankRecord]) -> RankRecord | None:
    """Return the rank that failed first of its own accord; one that lost a peer only if there is no other."""
    failed = [record for record in records if record.failed]
    return next((record for record in failed if record.status is not ExitStatus.PEER_LOST), next(iter(failed), None))


def exit_status(status: ExitStatus) -> ExitStatus:
    """Return the exit status for the launcher.

    torchrun starts all ranks again whenever one does not exit with 0. It must not after a stop or a user's error; the
    launcher that started torchrun reads the records.
    """
    under_torchrun = os.environ.keys() >= {FOLDER_VARIABLE, _TORCHRUN_RESTARTS}
    return ExitStatus.DONE if under_torchrun and (status is ExitStatus.STOPPED or status.is_final) else status


def refusal_before_restart() -> RankRecord | None:
    """Return the final error, of any rank, with which an earlier start by torchrun ended: another is of no use."""
    folder = own_folder()
    if folder is None or os.environ.get(_TORCHRUN_RESTARTS, "0") == "0":
        return None
    nodes = folder.parent.parent  # every node has a folder of its own there
    records = [record for earlier in sorted(nodes.glob("*/restart-*")) for record in read_records(earlier)]
    return next((record for record in records if record.status.is_final), None)
