"""Work done in stages that survive interruptions: what is complete is not done again, what has changed is.

Every stage has a fingerprint: of its own settings and of the fingerprints of the stages it builds on. Its record,
``stages/NAME.json``, is written when the stage is complete and holds the fingerprint and the result. A stage is
done again when its record is missing, its fingerprint differs, or one of its outputs is gone.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from megatron_ads.errors import ConfigError
from megatron_ads.progress import readable_duration

RECORDS = "stages"
WAIT_SECONDS = 60.0
"""How long to wait for an earlier process to leave the folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One piece of work that writes files below the folder and returns numbers."""

    name: str
    title: str
    """What it does, in words: ``fine-tune on 4 processes``."""
    settings: Mapping[str, Any]
    """JSON values that decide the result, apart from the stages before."""
    after: Sequence[str] = ()
    """Names of the stages whose outputs it reads."""
    outputs: Sequence[Path]
    """Files and folders it writes; removed before it runs again."""
    run: Callable[[], Mapping[str, Any]]
    """Does the work; returns JSON values for the record. Raises to say that the stage is not complete."""
    resumable: bool = False
    """Whether ``run`` continues from outputs that an interrupted run with the same fingerprint left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """What a complete stage leaves behind."""

    fingerprint: str
    seconds: float
    """Wall time of the run that completed it."""
    result: dict[str, Any]
    resumed: bool = False
    """Whether that run continued an interrupted one, so that ``seconds`` are not all it took."""


def run_stages(
    stages: Sequence[Stage], folder: Path, commands: Mapping[str, Sequence[str]], *, opening: str = ""
) -> dict[str, StageRecord]:
    """Bring every stage to completion, in order; return the records by name.

    Prints ``opening`` when the folder is its own, then each stage with the command line that does the same, of
    ``commands``, and how long it took.

    Raises:
        ConfigError: If the folder cannot be used, or another process is at work in it.
    """
    records: dict[str, StageRecord] = {}
    ran = False
    with _sole_use(folder):
        if opening:
            print(opening, flush=True)
        for number, stage in enumerate(stages, start=1):
            heading = f"[{number}/{len(stages)}] {stage.title}"
            after = {name: records[name].fingerprint for name in stage.after}
            settings = json.dumps({"settings": dict(stage.settings), "after": after}, sort_keys=True)
            fingerprint = hashlib.sha256(settings.encode()).hexdigest()
            record = None
            with suppress(OSError, ValueError, TypeError):  # missing or unreadable: the stage runs again
                record = StageRecord(**json.loads(_record_file(folder, stage.name).read_text(encoding="utf-8")))
            if record is not None and record.fingerprint == fingerprint and all(map(Path.exists, stage.outputs)):
                print(f"{heading}: complete, took {readable_duration(record.seconds)}", flush=True)
            else:
                ran, record = True, _run(stage, folder, fingerprint, heading, commands.get(stage.name))
            records[stage.name] = record
    if not ran:
        print(f"everything in {folder} was complete already; remove the folder to do it all again")
    return records


def _record_file(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name}.json"


def _run(stage: Stage, folder: Path, fingerprint: str, heading: str, command: Sequence[str] | None) -> StageRecord:
    """Run a stage, from what an interrupted run with the same fingerprint left if it can continue."""
    started = folder / RECORDS / f"{stage.name}.started"
    interrupted = started.exists() and started.read_text(encoding="utf-8") == fingerprint
    resuming = stage.resumable and interrupted and any(map(Path.exists, stage.outputs))
    _record_file(folder, stage.name).unlink(missing_ok=True)
    if not resuming:
        for output in stage.outputs:
            if output.is_dir() and not output.is_symlink():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
    started.write_text(fingerprint, encoding="utf-8")
    print(heading + (" (continuing where it was interrupted)" if resuming else ""), flush=True)
    if command:
        print(f"      $ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    result = dict(stage.run())
    seconds = time.monotonic() - start
    record = StageRecord(fingerprint=fingerprint, seconds=seconds, result=result, resumed=resuming)
    write_small(_record_file(folder, stage.name), json.dumps(asdict(record), indent=2) + "\n")
    started.unlink()
    print(f"      done in {readable_duration(seconds)}", flush=True)
    return record


@contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process and the jobs it starts; the lock ends with them, however they end.

    A job that was interrupted a moment ago may still be saving: it is waited for.
    """
    try:
        if not (folder / RECORDS).is_dir() and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds something else; choose a new or empty folder with --out.")
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another with --out.") from None
    with (folder / RECORDS / "lock").open("w", encoding="utf-8") as lock:
        os.set_inheritable(lock.fileno(), True)
        give_up = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    message = f"another process is at work in {folder}; wait for it, or choose another --out."
                    raise ConfigError(message) from None
            time.sleep(0.2)
        yield
