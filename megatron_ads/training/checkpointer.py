"""Saves a job as it proceeds, and restores it from the latest complete checkpoint."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_ads.config.training import CheckpointConfig
from megatron_ads.layout import ParallelLayout
from megatron_ads.observability.log import get_logger
from megatron_ads.training import checkpoint
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_folder import complete_checkpoints, partial_checkpoints, require_resumable

logger = get_logger(__name__)


class DataPosition(Protocol):
    """Where a job is in its data; the same on every rank and under every layout."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointer:
    """What belongs into the checkpoints of a job, and where they are."""

    settings: CheckpointConfig
    model: TrainedModel
    data: DataPosition
    layout: ParallelLayout
    side_files: Path | None
    """Folder with the config and the tokenizer, copied into each checkpoint."""

    def load_latest(self, *, last_step: int) -> int:
        """Restore the latest complete checkpoint and return its step; 0 if there is none. A collective.

        Raises:
            CheckpointError: If that checkpoint is damaged, not to be resumed from, or after ``last_step``.
        """
        folder = _latest(Path(self.settings.dir))
        if folder is None:
            return 0
        require_resumable(folder, resume=self.settings.resume, last_step=last_step)
        progress = checkpoint.load_checkpoint(
            folder, self.model.chunks, self.model.optimizer, self.layout, adapters=self.model.adapters
        )
        self.data.load_state_dict(progress.data)
        logger.info("resumed from %s, after step %d", folder, progress.step)
        return progress.step

    def save(self, step: int) -> float:
        """Write the checkpoint of ``step`` and return the seconds it took; a collective."""
        started = time.monotonic()
        checkpoint.save_checkpoint(
            Path(self.settings.dir),
            self.model.chunks,
            self.model.optimizer,
            checkpoint.JobProgress(step=step, updates=self.model.optimizer.updates, data=self.data.state_dict()),
            self.layout,
            side_files=self.side_files,
            keep_last=self.settings.save_total_limit,
            adapters=self.model.adapters,
        )
        return time.monotonic() - started


def _latest(directory: Path) -> Path | None:
    """Return the newest complete checkpoint as rank 0 sees it, so that all ranks load the same one."""
    found: list[Path | None] = [None]
    if dist.get_rank() == 0:
        for leftover in partial_checkpoints(directory):
            logger.warning("%s is a save that was cut off; it is not used and goes with the next save", leftover)
        complete = complete_checkpoints(directory)
        found = [complete[-1][1] if complete else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
