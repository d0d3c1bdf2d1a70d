"""What `megatron-ads quickstart` prints while it works: each stage with its command, and how long it took."""

import shlex
from collections.abc import Mapping, Sequence

from megatron_ads.progress import readable_duration
from megatron_ads.rehearsal.stages import Stage, StageRecord


class Announcements:
    """Prints to stdout. ``commands`` maps a stage's name to the command line that does the same."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._commands = commands
        self.ran = 0
        """Stages that were run, as opposed to found complete."""

    def starting(self, stage: Stage, number: int, total: int, resuming: bool) -> None:
        """Say what is about to run."""
        self.ran += 1
        going_on = " (going on where it was interrupted)" if resuming else ""
        self._say(f"[{number}/{total}] {stage.title}{going_on}")
        if command := self._commands.get(stage.name):
            self._say(f"      $ {shlex.join(command)}")

    def finished(self, stage: Stage, record: StageRecord) -> None:
        """Say how long it took."""
        self._say(f"      done in {readable_duration(record.seconds)}")

    def reused(self, stage: Stage, number: int, total: int, record: StageRecord) -> None:
        """Say that it is complete already."""
        self._say(f"[{number}/{total}] {stage.title}: complete, {readable_duration(record.seconds)} at the time")

    def _say(self, line: str) -> None:
        print(line, flush=True)
