"""Saves a job as it proceeds, and restores it from the latest complete checkpoint."""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch.distributed as dist

from megatron_ads.config.training import CheckpointConfig
from megatron_ads.errors import DivergedError, MegatronAdsError
from megatron_ads.layout import ParallelLayout
from megatron_ads.observability.log import get_logger
from megatron_ads.training import checkpoint
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_errors import raised_on_all_ranks
from megatron_ads.training.checkpoint_folder import partial_checkpoints, starting_point
from megatron_ads.training.checkpoint_save import PendingSave

logger = get_logger(__name__)


class DataPosition(Protocol):
    """Where a job is in its data; the same on every rank and under every layout."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""


@dataclass(kw_only=True, slots=True)
class Checkpointer:
    """What belongs into the checkpoints of a job, and where they are.

    As a context, it waits at its end for a checkpoint that is still being written; it abandons it if the job ends by an
    error that the other ranks may not know of.
    """

    settings: CheckpointConfig
    model: TrainedModel
    data: DataPosition
    layout: ParallelLayout
    side_files: Path | None
    """Folder with the config and the tokenizer, copied into each checkpoint."""
    job: dict[str, Any] = field(default_factory=dict)
    """The settings of the job by dotted name, plain values; what has changed on a resumption is logged."""
    _pending: PendingSave | None = field(default=None, init=False)

    def load_latest(self, *, last_step: int) -> int:
        """Restore the latest complete checkpoint and return its step; 0 if there is none. A collective.

        Raises:
            CheckpointError: If that checkpoint is damaged, not to be resumed from, or after ``last_step``, or a folder
                is in the way of those to come.
        """
        folder = _latest(Path(self.settings.dir), resume=self.settings.resume, last_step=last_step)
        if folder is None:
            return 0
        progress = checkpoint.load_checkpoint(
            folder, self.model.chunks, self.model.optimizer, self.layout, adapters=self.model.adapters
        )
        self._report_changes(progress.settings)
        self.data.load_state_dict(progress.data)
        logger.info("resumed from %s, after step %d", folder, progress.step)
        return progress.step

    def save(self, step: int) -> float:
        """Save the checkpoint of ``step`` and return the seconds training waited for it; a collective.

        Raises:
            CheckpointError, ConversionError: On every rank, if it cannot be written, or the one before could not be.
        """
        started, updates = time.monotonic(), self.model.optimizer.updates
        self.wait()
        pending = checkpoint.save_checkpoint(
            Path(self.settings.dir),
            self.model.chunks,
            self.model.optimizer,
            checkpoint.JobProgress(step=step, updates=updates, data=self.data.state_dict(), settings=self.job),
            self.layout,
            side_files=self.side_files,
            keep_last=self.settings.save_total_limit,
            adapters=self.model.adapters,
            in_background=self.settings.async_save,
        )
        self._pending = pending if self.settings.async_save else None
        return time.monotonic() - started

    def wait(self) -> None:
        """Return when the latest checkpoint is complete; all ranks call it.

        Raises:
            CheckpointError, ConversionError: On every rank, if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, DivergedError):  # raised on all ranks
            with suppress(MegatronAdsError):  # logged already; how the job ends is that it has diverged
                self.wait()
        elif self._pending is not None:
            self._pending.abandon()

    def _report_changes(self, before: dict[str, Any]) -> None:
        """Log the settings that differ from those under which a checkpoint was written; an older one has none."""
        changed = [
            f"{name} {before.get(name, 'unset')} -> {self.job.get(name, 'unset')}"
            for name in sorted(before.keys() | self.job.keys())
            if before and before.get(name) != self.job.get(name)
        ]
        if changed:
            logger.info(
                "settings that have changed since that checkpoint, and hold from here on: %s (the next update's "
                "learning rate is %g; the weights are the checkpoint's)",
                ", ".join(changed),
                self.model.schedule.at(self.model.optimizer.updates),
            )


def _latest(directory: Path, *, resume: bool, last_step: int) -> Path | None:
    """Return the newest complete checkpoint as rank 0 sees it, so that all ranks load the same one."""
    found: list[Path | None] = [None]
    with raised_on_all_ranks():
        if dist.get_rank() == 0:
            for leftover in partial_checkpoints(directory):
                logger.warning("%s is a save that was cut off; it is not used and goes with the next save", leftover)
            found = [starting_point(directory, resume=resume, last_step=last_step)]
    dist.broadcast_object_list(found, src=0)
    return found[0]
