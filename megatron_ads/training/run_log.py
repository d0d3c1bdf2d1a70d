"""What a run leaves to look at: metrics of every step, progress, and what exactly was run."""

import dataclasses
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from conversion.atomic_file import write_small
from conversion.rank_files import ShardsLayout
from megatron_ads.config.model import Precision
from megatron_ads.config.run import RunConfig
from megatron_ads.config.training import RuntimeConfig
from megatron_ads.layout import ParallelLayout
from megatron_ads.models.experts import ExpertLoad
from megatron_ads.models.flops import flops_per_token
from megatron_ads.models.parts import Lora
from megatron_ads.observability.log import get_logger
from megatron_ads.observability.metrics import MetricsWriter
from megatron_ads.observability.provenance import provenance
from megatron_ads.observability.stragglers import StragglerWatch
from megatron_ads.observability.trackers import TrackedRuns
from megatron_ads.planning.hardware import CARDS
from megatron_ads.progress import Progress
from megatron_ads.reporting.run_report import REPORT_FILE, RUN_FILE, write_run_report
from megatron_ads.runtime.device import device, peak_memory_bytes
from megatron_ads.runtime.health.activity import Activity
from megatron_ads.runtime.health.peers import PeerMonitor
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_errors import failed_log_named
from megatron_ads.training.step import StepReport

logger = get_logger(__name__)

_PROGRESS = {"critic/rewards/mean": "reward", "teacher/reverse_kl": "reverse_kl"}
"""What tells of a policy's progress, next to the loss, and what it is called there."""


class RunLog:
    """Rank 0 writes; the other ranks take part in the measurements that are collective."""

    def __init__(
        self,
        config: RunConfig,
        model: TrainedModel,
        shards: ShardsLayout,
        peers: PeerMonitor,
        activity: Activity,
        *,
        name: str,
        resume_step: int,
    ) -> None:
        """Open the files and write down what is run; ``name`` is that of the kind of job. A collective."""
        self._peers = peers
        self._activity = activity
        self._times = RankTimes(config.runtime, shards.layout, activity)
        self._every = config.train.log_every
        with_mtp, lora = config.model.mtp_loss_weight > 0, Lora.of(config.model)
        self._flops_per_token = flops_per_token(shards.shape, config.data.seq_length, with_mtp=with_mtp, lora=lora)
        self._peak_flops_per_second = _peak_flops_per_second(config.model.precision)
        self._load = ExpertLoad(model.models) if shards.shape.num_experts else None
        self._writer: MetricsWriter | None = None
        self._directory = directory = Path(config.log.dir)
        if dist.get_rank() == 0:
            with failed_log_named(directory):
                directory.mkdir(parents=True, exist_ok=True)
                run = {"recipe": dataclasses.asdict(config), "ranks": dist.get_world_size(), **provenance()}
                write_small(directory / RUN_FILE, json.dumps(run, indent=1) + "\n")
                tracked = TrackedRuns(config.log.trackers, directory, run)
                self._writer = MetricsWriter(directory, config.log.tensorboard, resume_step, tracked=tracked)
        self._progress = Progress(config.train.max_steps, resume_step, name)
        self._started: float
        self._restart_clock(resume_step)

    def close(self) -> None:
        """Flush what is written, and say where the report is."""
        self._progress.close()
        if self._writer is not None:
            with failed_log_named(self._directory):
                self._writer.close()
        report = self._directory / REPORT_FILE
        if dist.get_rank() == 0 and report.is_file():
            logger.info("the run so far, as a page: %s", report)

    def step(self, step: int, report: StepReport | None, metrics: Mapping[str, float]) -> None:
        """Record one step, and what its job knows of it besides; a collective on the steps that are logged.

        ``report`` is None if nothing was trained.
        """
        ended = time.monotonic()
        seconds = ended - self._started
        if step % self._every == 0:
            ranks = self._times.measure(step, seconds)
            trained = {"step_seconds": seconds} if report is None else self._step_metrics(report, seconds)
            self._write(step, trained | ranks | dict(metrics))
        shown = {} if report is None else {"loss": report.loss}
        shown |= {called: metrics[name] for name, called in _PROGRESS.items() if name in metrics}
        self._progress.update(1, **shown)
        self._peers.report_step(step)
        self._activity.leave_step(step)
        self._restart_clock(step)
        self._started = ended  # what the log takes is the next step's, but not a rank's own work

    def _step_metrics(self, report: StepReport, seconds: float) -> dict[str, float]:
        assert report.update is not None
        flops_per_second = report.tokens * self._flops_per_token / seconds / dist.get_world_size()
        metrics = {
            "loss": report.loss,
            "grad_norm": report.update.grad_norm,
            "skipped_update": not report.update.updated,
            "loss_tokens": report.loss_tokens,
            "tokens": report.tokens,
            "samples": report.samples,
            "step_seconds": seconds,
            "tokens_per_second": report.tokens / seconds,
            "tflops_per_gpu": flops_per_second / 1e12,
        }
        if self._peak_flops_per_second is not None:
            metrics["mfu"] = flops_per_second / self._peak_flops_per_second
        if self._load is not None:
            metrics["expert_load_max_over_mean"] = self._load.measure()
        return metrics

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what was measured between two steps; its time does not count as the next step's."""
        self._write(step, metrics)
        self._restart_clock(step)

    def saved(self, step: int, seconds: float) -> None:
        """Record a checkpoint, and bring the report up to it; its time does not count as the next step's."""
        self._write(step, {"checkpoint_seconds": seconds})
        if self._writer is not None:
            with failed_log_named(self._directory):
                write_run_report(self._directory)
        self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        """Let the step after ``step`` begin here."""
        self._started = time.monotonic()
        self._times.restart(measured=(step + 1) % self._every == 0)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            with failed_log_named(self._directory):
                self._writer.write(step, metrics)


def _peak_flops_per_second(precision: Precision) -> float | None:
    """Return the dense BF16 peak of this rank's GPU; None for another precision, or a GPU that the table lacks."""
    if not torch.cuda.is_available() or precision is not Precision.bf16:
        return None
    words = torch.cuda.get_device_name(device()).lower().replace("-", " ").split()
    if not {"pcie", "nvl", "mig"}.isdisjoint(words):  # the table has whole cards, in their fastest form
        return None
    return next((card.flops_per_second for card in CARDS.values() if card.name in words), None)


class RankTimes:
    """A clock on every rank; rank 0 compares them."""

    def __init__(self, config: RuntimeConfig, layout: ParallelLayout, activity: Activity) -> None:
        """Tell rank 0 where the ranks run; a collective."""
        hosts = [""] * layout.world
        dist.all_gather_object(hosts, socket.gethostname())
        stages = [layout.coordinates(rank).pp for rank in range(layout.world)]
        self._stragglers = StragglerWatch(stages, hosts, factor=config.straggler_factor, steps=config.straggler_steps)
        self._activity = activity
        self._started = time.monotonic()

    def restart(self, *, measured: bool) -> None:
        """Begin the next step here; ``measured`` says whether ``measure`` will be called at its end."""
        self._started = time.monotonic()
        self._activity.stalls.restart(measured=measured)

    def measure(self, step: int, step_seconds: float) -> dict[str, float]:
        """Return the metrics that compare the ranks; one collective."""
        own_seconds = time.monotonic() - self._started - self._activity.stalls.seconds()
        table = torch.zeros(2, dist.get_world_size(), dtype=torch.float64, device=device())
        table[:, dist.get_rank()] = torch.tensor((peak_memory_bytes(), own_seconds), dtype=torch.float64)
        dist.all_reduce(table)
        memory, seconds = table.tolist()
        metrics = {"max_memory_allocated": max(memory)}
        slowest = self._stragglers.observe(step, seconds, step_seconds) if dist.get_rank() == 0 else None
        if slowest is not None:
            metrics |= {
                "slowest_rank": slowest.rank,
                "slowest_rank_seconds": slowest.seconds,
                "slowest_rank_over_median": slowest.over_median,
            }
        return metrics
