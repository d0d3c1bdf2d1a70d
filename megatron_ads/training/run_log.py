"""What a run leaves to look at: metrics of every step, progress, and what exactly was run."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch.distributed as dist

from conversion.atomic_file import write_small
from conversion.rank_files import ShardsLayout
from megatron_ads.config.sft import SftConfig
from megatron_ads.data.held_out import HeldOut
from megatron_ads.models.adapter_shapes import Lora
from megatron_ads.models.expert_load import ExpertLoad
from megatron_ads.models.flops import flops_per_token
from megatron_ads.observability.log import get_logger
from megatron_ads.observability.metrics import MetricsWriter
from megatron_ads.observability.provenance import provenance
from megatron_ads.observability.trackers import TrackedRuns
from megatron_ads.progress import Progress
from megatron_ads.reporting.run_report import REPORT_FILE, RUN_FILE, write_run_report
from megatron_ads.runtime.health.activity import Activity
from megatron_ads.runtime.health.peers import PeerMonitor
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.rank_times import RankTimes
from megatron_ads.training.step import StepReport

logger = get_logger(__name__)


class RunLog:
    """Rank 0 writes; the other ranks take part in the measurements that are collective."""

    def __init__(
        self,
        config: SftConfig,
        model: TrainedModel,
        shards: ShardsLayout,
        peers: PeerMonitor,
        activity: Activity,
        *,
        resume_step: int,
    ) -> None:
        self._peers = peers
        self._activity = activity
        self._times = RankTimes(config.runtime, shards.layout, activity)
        self._every = config.train.log_every
        self._flops_per_token = flops_per_token(
            shards.shape,
            config.data.seq_length,
            with_mtp=config.model.mtp_loss_weight > 0,
            lora=Lora.of(config.model),
        )
        self._load = ExpertLoad(model.models) if shards.shape.num_experts else None
        self._writer: MetricsWriter | None = None
        if dist.get_rank() == 0:
            directory = Path(config.log.dir)
            directory.mkdir(parents=True, exist_ok=True)
            run = describe_run(config)
            write_small(directory / RUN_FILE, json.dumps(run, indent=1) + "\n")
            tracked = TrackedRuns(config.log.trackers, directory, run)
            self._writer = MetricsWriter(directory, config.log.tensorboard, resume_step, tracked=tracked)
        self._directory = Path(config.log.dir)
        self._progress = Progress(config.train.steps, resume_step, "SFT")
        self._started = time.monotonic()
        self._restart_rank_times(resume_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
        report = self._directory / REPORT_FILE
        if dist.get_rank() == 0 and report.is_file():
            logger.info("the run so far, as a page: %s", report)

    def begin(self, step: int) -> None:
        """Say that a training step begins: from here to its end, this rank is expected to get on."""
        self._activity.enter_step(step)

    def moved(self) -> None:
        """Say that this rank gets on; a step of a single rank may be long and have no communication."""
        self._activity.moved()

    def step(self, step: int, report: StepReport, learning_rate: float, losses: dict[str, float]) -> None:
        """Record one training step; a collective on the steps that are logged."""
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        if step % self._every == 0:
            ranks = self._times.measure(step, seconds)
            metrics = self._step_metrics(report, learning_rate, seconds)
            self._write(step, metrics | ranks | losses)
        self._progress.update(1, loss=report.loss)
        self._peers.report_step(step)
        self._activity.leave_step(step)
        self._restart_rank_times(step)

    def _restart_rank_times(self, step: int) -> None:
        """Let the work for the step after ``step`` begin here: what the log takes is not a rank's own work."""
        self._times.restart(measured=(step + 1) % self._every == 0)

    def _step_metrics(self, report: StepReport, learning_rate: float, seconds: float) -> dict[str, float]:
        assert report.update is not None
        metrics = {
            "loss": report.loss,
            "grad_norm": report.update.grad_norm,
            "learning_rate": learning_rate,
            "updated": report.update.updated,
            "target_tokens": report.target_tokens,
            "tokens": report.tokens,
            "samples": report.samples,
            "step_seconds": seconds,
            "tokens_per_second": report.tokens / seconds,
            "model_flops_per_second": report.tokens * self._flops_per_token / seconds,
        }
        if self._load is not None:
            metrics["expert_load_max_over_mean"] = self._load.measure()
        return metrics

    def validation(self, step: int, report: StepReport, held_out: HeldOut) -> None:
        """Record an evaluation on the held-out rows; its time does not count as the next step's."""
        losses = _by_task("validation_loss", held_out.task_losses(report.sample_losses))
        metrics = _by_task("task_metric", held_out.task_metrics(report.sample_losses))
        self._write(step, {"validation_loss": report.loss} | losses | metrics)
        self._restart_clock(step)

    def saved(self, step: int, seconds: float) -> None:
        """Record a checkpoint, and bring the report up to it; its time does not count as the next step's."""
        self._write(step, {"checkpoint_seconds": seconds})
        if self._writer is not None:
            write_run_report(self._directory)
        self._restart_clock(step)

    def instance_weights(self, step: int, quantiles: dict[str, float]) -> None:
        """Record the renewed weights of the samples; the time of measuring them does not count as the next step's."""
        self._write(step, quantiles)
        self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        self._started = time.monotonic()
        self._restart_rank_times(step)

    def shares(self, step: int, shares: Mapping[str, float]) -> None:
        """Record the shares of the tasks in the samples drawn from here on."""
        self._write(step, _by_task("task_share", shares))

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, metrics)


def _by_task(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{task}": value for task, value in values.items()}


def describe_run(config: SftConfig) -> dict[str, object]:
    """Return the resolved recipe, and what it runs on and with."""
    return {"recipe": dataclasses.asdict(config), "ranks": dist.get_world_size(), **provenance()}
