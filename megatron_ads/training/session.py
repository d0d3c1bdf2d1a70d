"""What every training job does around its loop: join the ranks, watch them, build, resume, log, save, stop, export."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from conversion.convert import lay_out
from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource, open_source
from megatron_ads.config.run import RunConfig, require_trainable
from megatron_ads.layout import world_size
from megatron_ads.observability.log import get_logger
from megatron_ads.observability.provenance import git_revision, package_versions
from megatron_ads.observability.trackers import require_installed
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import device, seed_everything, set_threads
from megatron_ads.runtime.health.activity import Activity, name_failed_communication
from megatron_ads.runtime.health.peers import PeerMonitor
from megatron_ads.runtime.health.rank_record import FOLDER_VARIABLE, ExitStatus, write_record
from megatron_ads.runtime.health.watch import HangWatch
from megatron_ads.runtime.preflight import Record, check_records, gather_records
from megatron_ads.training.build import TrainedModel, build_model
from megatron_ads.training.checkpoint_errors import failed_log_named, raised_on_all_ranks
from megatron_ads.training.checkpointer import Checkpointer, DataPosition
from megatron_ads.training.divergence import SkippedUpdates, require_finite
from megatron_ads.training.export import export_shards
from megatron_ads.training.folder_lock import folders_of, hold
from megatron_ads.training.run_log import RunLog
from megatron_ads.training.step import StepReport
from megatron_ads.training.stopping import Outcome, StopRequest, write_outcome

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """One rank among the others of the job: where its weights come from, what it owns, and who watches it."""

    source: WeightSource
    shards: ShardsLayout
    peers: PeerMonitor
    activity: Activity


def start_from(config: RunConfig) -> tuple[WeightSource, ShardsLayout]:
    """Open the weights that the job starts from, and lay them out over its ranks.

    Raises:
        ConfigError, ConversionError: If there are no such weights, the layout does not fit them, or a tracker is not
            installed.
    """
    require_installed(config.log.trackers)
    source = open_source(Path(config.model.load))
    shards = lay_out(source.shape, config.layout, world_size())
    require_trainable(shards.layout, source.shape)
    return source, shards


@contextmanager
def join(config: RunConfig, source: WeightSource, shards: ShardsLayout) -> Iterator[Membership]:
    """Join the process groups; inside the context, the ranks watch over each other and hold the job's folders.

    Raises:
        MegatronAdsError: On every rank, if another job holds one of the folders.
    """
    timeout = config.runtime.timeout_seconds
    set_threads(config.runtime.threads)
    process_groups.start(
        shards.layout,
        timeout_seconds=timeout,
        embedding_ranks=shards.placement.embedding_ranks,
        create_gloo_process_groups=False,
    )
    activity = Activity(on_gpu=device().type == "cuda")
    rank = dist.get_rank()
    hangs = HangWatch(
        activity,
        shards.layout,
        rank,
        timeout_seconds=timeout,
        directory=Path(config.log.dir),
        on_hang=lambda headline: write_record(rank, ExitStatus.HUNG, headline),
    )
    try:
        with (
            PeerMonitor(
                shards.layout,
                on_loss=lambda loss: write_record(rank, ExitStatus.PEER_LOST, str(loss)),
                hangs=hangs,
            ) as peers,
            name_failed_communication(shards.layout, activity),
            ExitStack() as held,
        ):
            seed_everything(config.train.seed, config.train.deterministic)
            if FOLDER_VARIABLE not in os.environ:  # a launcher that asks for records holds the folders for its ranks
                with raised_on_all_ranks():
                    if rank == 0:
                        held.enter_context(hold(folders_of(config), os.environ))
            yield Membership(source=source, shards=shards, peers=peers, activity=activity)
    finally:
        process_groups.stop()


@dataclass(slots=True)
class Session:
    """A job between two steps: the model, how many steps are done, and what saves and records them."""

    config: RunConfig
    membership: Membership
    model: TrainedModel
    checkpointer: Checkpointer
    log: RunLog
    stop: StopRequest
    step: int
    """Steps done, those before the job was resumed included."""
    skips: SkippedUpdates
    updates_per_step: int

    @classmethod
    def resumed(
        cls,
        config: RunConfig,
        membership: Membership,
        data: DataPosition,
        stop: StopRequest,
        *,
        name: str,
        updates_per_step: int = 1,
        before_load: Callable[[TrainedModel], None] = lambda model: None,
    ) -> Self:
        """Build the model, compare the ranks and start where the latest complete checkpoint ends; a collective.

        ``data`` is saved with every checkpoint and restored from it; ``name`` is shown with the progress.
        ``before_load`` is given the model while it has the weights of ``model.load``.

        Raises:
            MegatronAdsError: For anything the user can mend; the message says what and how.
        """
        source, shards = membership.source, membership.shards
        patience = config.runtime.load_timeout_seconds
        model = build_model(config.model, config.optim, config.train, source, shards, load_timeout_seconds=patience)
        before_load(model)
        preflight(config, model.optimizer, shards)
        checkpointer = Checkpointer(
            settings=config.checkpoint,
            model=model,
            data=data,
            layout=shards.layout,
            side_files=source.side_folder,
            job=described_settings(config),
        )
        step = checkpointer.load_latest(last_step=config.train.max_steps)
        process_groups.wait_for_all("load the checkpoint", patience)
        log = RunLog(config, model, shards, membership.peers, membership.activity, name=name, resume_step=step)
        skips = SkippedUpdates(maximum=max(1, min(config.train.max_skipped_updates, config.train.max_steps // 2)))
        return cls(config, membership, model, checkpointer, log, stop, step, skips, updates_per_step)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.train.max_steps

    def finish_step(self, report: StepReport | None, metrics: Mapping[str, float]) -> None:
        """Count one step and record it, with what its job knows of it besides; a collective.

        ``report`` is None if nothing was trained.

        Raises:
            DivergedError: On every rank, if too many consecutive updates were skipped.
        """
        self.step += 1
        self.log.step(self.step, report, metrics)
        if report is not None:
            self.skips.observe(self.step, report)

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens ``every`` so many steps happens now."""
        return every is not None and self.step % every == 0

    def save_if_due(self, *, stopped: bool) -> None:
        """Write a checkpoint every ``checkpoint.save_every`` steps, after the last step, and before stopping.

        Where the latest update was skipped, the regular one is left out: the update before may have spoilt the weights,
        and older checkpoints must not make room for them.

        Raises:
            DivergedError: If the weights are not all finite; nothing is saved then.
        """
        due = self.is_due(self.config.checkpoint.save_every) and not self.skips.consecutive
        if stopped or due or self.is_finished:
            require_finite(self.model.models)
            self.log.saved(self.step, self.checkpointer.save(self.step))

    def end(self, *, stopped: bool, export: bool = True) -> ExitStatus:
        """Export the weights to ``<log.dir>/export`` unless stopped, and record how the job ended; a collective.

        ``export`` is False where nothing was trained.

        Raises:
            DivergedError: If the weights are not all finite.
        """
        folder, of_job = Path(self.config.log.dir), self.membership
        planned = self.step * self.updates_per_step
        skipped = planned - self.model.optimizer.updates
        if skipped > 0 and dist.get_rank() == 0:  # below 0: fewer updates are planned now than before the job continued
            logger.warning("%d of %d updates were skipped", skipped, planned)
        if export and not stopped:
            require_finite(self.model.models)
            with failed_log_named(folder):
                export_shards(folder / "export", self.model.models, self.model.spec, of_job.source, of_job.shards)
        if dist.get_rank() == 0:
            with failed_log_named(folder):
                write_outcome(folder, Outcome.STOPPED if stopped else Outcome.FINISHED, self.step)
        return ExitStatus.STOPPED if stopped else ExitStatus.DONE


def described_settings(config: RunConfig) -> dict[str, Any]:
    """Return what decides the course of a job, by dotted name, as plain values: all but where and how it is watched."""
    plain = json.loads(json.dumps(asdict(config)))
    return dict(_leaves({name: plain[name] for name in plain if name not in ("checkpoint", "log", "runtime")}, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def preflight(config: RunConfig, optimizer: OptimizerChain, shards: ShardsLayout) -> None:
    """Compare optimizer members, parameter groups, recipe and software over all ranks; every rank must call it.

    Raises:
        TopologyError: Naming the ranks that differ, at once, or did not come within a minute.
    """
    described = json.dumps([asdict(config), asdict(shards.shape), shards.placement.string], sort_keys=True)
    own = Record(
        rank=dist.get_rank(),
        coordinates=shards.layout.coordinates(dist.get_rank()),
        members={member.kind: member.group_keys() for member in optimizer.members},
        versions={name: found or "absent" for name, found in package_versions().items()},
        config_digest=hashlib.sha256(described.encode()).hexdigest()[:12],
        code_revision=git_revision(Path(__file__).parent) or "unknown",
    )
    check_records(gather_records(own))
