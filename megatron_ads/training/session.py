"""What every training job does around its loop: join the ranks, watch them, build, resume, log, save, stop, export."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch.distributed as dist

from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource, open_source
from megatron_ads.config.run import RunConfig, require_trainable
from megatron_ads.layout import world_size
from megatron_ads.observability.provenance import git_revision, package_versions
from megatron_ads.observability.trackers import require_installed
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import device, seed_everything, set_threads
from megatron_ads.runtime.health.activity import Activity, name_failed_communication
from megatron_ads.runtime.health.peers import LostPeer, PeerMonitor
from megatron_ads.runtime.health.rank_record import ExitStatus, write_record
from megatron_ads.runtime.health.watch import HangWatch
from megatron_ads.runtime.preflight import Record, check_records, gather_records
from megatron_ads.training.build import TrainedModel, build_model, lay_out
from megatron_ads.training.checkpointer import Checkpointer, DataPosition
from megatron_ads.training.export import export_shards
from megatron_ads.training.run_log import RunLog
from megatron_ads.training.stopping import Outcome, StopRequest, write_outcome


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
    shards = lay_out(config.layout, source, world_size())
    require_trainable(shards.layout)
    return source, shards


@contextmanager
def join(config: RunConfig, source: WeightSource, shards: ShardsLayout) -> Iterator[Membership]:
    """Join the process groups; inside the context, the ranks watch over each other."""
    timeout = config.runtime.timeout_seconds
    set_threads(config.runtime.threads)
    process_groups.start(shards.layout, timeout_seconds=timeout, create_gloo_process_groups=False)
    activity = Activity(on_gpu=device().type == "cuda")
    hangs = HangWatch(
        activity,
        shards.layout,
        dist.get_rank(),
        timeout_seconds=timeout,
        directory=Path(config.log.dir),
        on_hang=_record_hang,
    )
    try:
        with (
            PeerMonitor(shards.layout, on_loss=_record_loss, hangs=hangs) as peers,
            name_failed_communication(shards.layout, activity),
        ):
            seed_everything(config.train.seed, config.train.deterministic)
            yield Membership(source=source, shards=shards, peers=peers, activity=activity)
    finally:
        process_groups.stop()


def _record_loss(loss: LostPeer) -> None:
    write_record(dist.get_rank(), ExitStatus.PEER_LOST, str(loss))


def _record_hang(headline: str) -> None:
    write_record(dist.get_rank(), ExitStatus.HUNG, headline)


@dataclass(kw_only=True, slots=True)
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

    @classmethod
    def resumed(
        cls, config: RunConfig, membership: Membership, data: DataPosition, stop: StopRequest, *, name: str
    ) -> Self:
        """Build the model, compare the ranks and start where the latest complete checkpoint ends; a collective.

        Args:
            data: Saved with every checkpoint, and restored from it.
            name: Of this kind of job, for the display of its progress.

        Raises:
            MegatronAdsError: For anything the user can mend; the message says what and how.
        """
        source, shards = membership.source, membership.shards
        model = build_model(config.model, config.optim, config.train, source, shards)
        preflight(config, model.optimizer, shards)
        checkpointer = Checkpointer(
            settings=config.checkpoint, model=model, data=data, layout=shards.layout, side_files=source.side_folder
        )
        step = checkpointer.load_latest(last_step=config.train.max_steps)
        log = RunLog(config, model, shards, membership.peers, membership.activity, name=name, resume_step=step)
        return cls(
            config=config,
            membership=membership,
            model=model,
            checkpointer=checkpointer,
            log=log,
            stop=stop,
            step=step,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.config.train.max_steps

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens ``every`` so many steps happens now."""
        return every is not None and self.step % every == 0

    def save_if_due(self, *, stopped: bool) -> None:
        """Write a checkpoint every ``checkpoint.save_every`` steps, after the last step, and before stopping."""
        if stopped or self.is_due(self.config.checkpoint.save_every) or self.is_finished:
            self.log.saved(self.step, self.checkpointer.save(self.step))

    def end(self, *, stopped: bool) -> ExitStatus:
        """Export the weights to ``<log.dir>/export`` unless stopped, and record how the job ended; a collective."""
        folder, of_job = Path(self.config.log.dir), self.membership
        if not stopped:
            export_shards(folder / "export", self.model.models, self.model.spec, of_job.source, of_job.shards)
        if dist.get_rank() == 0:
            write_outcome(folder, Outcome.STOPPED if stopped else Outcome.FINISHED, self.step)
        return ExitStatus.STOPPED if stopped else ExitStatus.DONE


def preflight(config: RunConfig, optimizer: OptimizerChain, shards: ShardsLayout) -> None:
    """Compare optimizer members, parameter groups, recipe and software over all ranks; every rank must call it.

    Raises:
        TopologyError: Naming the ranks that differ or did not come, in under 10 s.
    """
    check_records(gather_records(describe_rank(config, optimizer, shards)))


def describe_rank(config: RunConfig, optimizer: OptimizerChain, shards: ShardsLayout) -> Record:
    """Return what this rank is about to do, to be compared with the others."""
    described = json.dumps([asdict(config), asdict(shards.shape), shards.placement.string], sort_keys=True)
    return Record(
        rank=dist.get_rank(),
        coordinates=shards.layout.coordinates(dist.get_rank()),
        members={member.kind: member.group_keys() for member in optimizer.members},
        versions={name: found or "absent" for name, found in package_versions().items()},
        config_digest=hashlib.sha256(described.encode()).hexdigest()[:12],
        code_revision=git_revision(Path(__file__).parent) or "unknown",
    )
