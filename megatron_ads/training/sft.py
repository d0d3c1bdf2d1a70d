"""Reasoning SFT: what every rank does, from joining the job to exported weights."""

from pathlib import Path

import torch.distributed as dist

from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource, open_source
from megatron_ads.config.sft import SftConfig, validate
from megatron_ads.data.batches import BatchStream
from megatron_ads.data.held_out import HeldOut
from megatron_ads.observability.log import world_size
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.activity import Activity
from megatron_ads.runtime.device import device, set_threads
from megatron_ads.runtime.exit_status import ExitStatus
from megatron_ads.runtime.hang_watch import HangWatch
from megatron_ads.runtime.hangs import name_failed_communication
from megatron_ads.runtime.rank_record import write_record
from megatron_ads.runtime.seeds import seed_everything
from megatron_ads.runtime.watchdog import Loss, PeerMonitor
from megatron_ads.training.build import TrainedModel, build_model, lay_out
from megatron_ads.training.export import export_shards
from megatron_ads.training.outcome import Outcome, write_outcome
from megatron_ads.training.position import Position
from megatron_ads.training.rows import open_streams
from megatron_ads.training.run_log import RunLog
from megatron_ads.training.signals import StopRequest
from megatron_ads.training.step import run_evaluation, run_step
from megatron_ads.training.topology import preflight


def run(config: SftConfig, stop: StopRequest) -> ExitStatus:
    """Join the job and train; leave checkpoints, metrics and, after the last step, ``<log.dir>/export``.

    Raises:
        MegatronAdsError: For anything the user can mend; the message says what and how.
    """
    source = open_source(Path(config.model.load))
    shards = lay_out(config, source, world_size())
    validate(config, shards.layout.world, source.shape)
    set_threads(config.runtime.threads)
    process_groups.start(
        shards.layout, timeout_seconds=config.runtime.timeout_seconds, create_gloo_process_groups=False
    )
    activity = Activity(on_gpu=device().type == "cuda")
    hangs = HangWatch(
        activity,
        shards.layout,
        dist.get_rank(),
        timeout_seconds=config.runtime.timeout_seconds,
        directory=Path(config.log.dir),
        on_hang=_record_hang,
    )
    try:
        with (
            PeerMonitor(shards.layout, on_loss=_record_loss, hangs=hangs) as peers,
            name_failed_communication(shards.layout, activity),
        ):
            return _run_together(config, source, shards, peers, activity, stop)
    finally:
        process_groups.stop()


def _record_loss(loss: Loss) -> None:
    write_record(dist.get_rank(), ExitStatus.PEER_LOST, str(loss))


def _record_hang(headline: str) -> None:
    write_record(dist.get_rank(), ExitStatus.HUNG, headline)


def _run_together(
    config: SftConfig,
    source: WeightSource,
    shards: ShardsLayout,
    peers: PeerMonitor,
    activity: Activity,
    stop: StopRequest,
) -> ExitStatus:
    """Build, step, save, export, while the ranks watch over each other."""
    seed_everything(config.train.seed, config.train.deterministic)
    model = build_model(config, source, shards)
    preflight(config, model.optimizer, shards)
    training, validation = open_streams(config, source, shards.layout)
    position = Position.resumed(config, model, training, shards.layout, source)
    with RunLog(config, model, shards, peers, activity, resume_step=position.step) as log:
        stopped = train(config, model, training, validation, position, log, stop)
    if not stopped:
        export_shards(Path(config.log.dir) / "export", model.models, model.spec, source, shards)
    if dist.get_rank() == 0:
        write_outcome(Path(config.log.dir), Outcome.STOPPED if stopped else Outcome.FINISHED, position.step)
    return ExitStatus.STOPPED if stopped else ExitStatus.DONE


def train(
    config: SftConfig,
    model: TrainedModel,
    training: BatchStream,
    validation: HeldOut,
    position: Position,
    log: RunLog,
    stop: StopRequest,
) -> bool:
    """Step until the last step, or until some rank is told to stop; return whether it was stopped."""
    while position.step < config.train.steps:
        learning_rate = model.schedule.at(model.optimizer.updates)
        log.begin(position.step + 1)
        report = run_step(
            training.next_step(),
            model.chunks,
            model.optimizer,
            learning_rate=learning_rate,
            stop_requested=stop.received is not None,
            before_microbatch=log.moved,
        )
        position.step += 1
        log.step(position.step, report, learning_rate, training.observe(report.sample_losses))
        if validation.batches and position.is_due(config.train.evaluate_every):
            evaluation = run_evaluation(validation.batches, model.chunks)
            log.validation(position.step, evaluation, validation)
            if config.reweight.tasks:
                metrics = validation.task_metrics(evaluation.sample_losses)
                log.shares(position.step, training.adapt(metrics, alpha=config.reweight.alpha))
        if (
            report.stop_requested
            or position.is_due(config.checkpoint.save_every)
            or position.step == config.train.steps
        ):
            log.saved(position.step, position.save())
        if report.stop_requested:
            return True
    return False
