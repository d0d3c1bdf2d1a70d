"""Where a job stands: restored from the latest complete checkpoint, saved again as it moves on."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from conversion.sources import WeightSource
from megatron_ads.config.sft import SftConfig
from megatron_ads.data.batches import BatchStream
from megatron_ads.layout import ParallelLayout
from megatron_ads.observability.log import get_logger
from megatron_ads.training import checkpoint
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_folder import complete_checkpoints, partial_checkpoints, require_resumable

logger = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class Checkpointer:
    """Steps done, and what is needed to save them."""

    step: int
    config: SftConfig
    model: TrainedModel
    stream: BatchStream
    layout: ParallelLayout
    source: WeightSource

    @classmethod
    def resumed(
        cls,
        config: SftConfig,
        model: TrainedModel,
        stream: BatchStream,
        layout: ParallelLayout,
        source: WeightSource,
    ) -> "Checkpointer":
        """Start where the latest complete checkpoint ends, or at step 0; a collective.

        Raises:
            CheckpointError: If that checkpoint is damaged, not to be resumed from, or further than the job goes.
        """
        position = cls(step=0, config=config, model=model, stream=stream, layout=layout, source=source)
        folder = _latest(Path(config.checkpoint.dir))
        if folder is not None:
            require_resumable(folder, resume=config.checkpoint.resume, last_step=config.train.steps)
            progress = checkpoint.load_checkpoint(
                folder, model.chunks, model.optimizer, layout, adapters=model.adapters
            )
            stream.load_state_dict(progress.data)
            position.step = progress.step
            logger.info("resumed from %s, after step %d", folder, progress.step)
        return position

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens ``every`` so many steps happens now."""
        return every is not None and self.step % every == 0

    def save(self) -> float:
        """Write a checkpoint and return the seconds it took; a collective."""
        started = time.monotonic()
        checkpoint.save_checkpoint(
            Path(self.config.checkpoint.dir),
            self.model.chunks,
            self.model.optimizer,
            checkpoint.Progress(step=self.step, updates=self.model.optimizer.updates, data=self.stream.state_dict()),
            self.layout,
            side_files=self.source.side_folder,
            keep_last=self.config.checkpoint.keep_last,
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
