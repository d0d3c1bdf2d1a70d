"""Reasoning SFT: what every rank does, from joining the job to exported weights."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource, open_source
from megatron_ads.config.sft import SftConfig, validate
from megatron_ads.data.batches import BatchStream
from megatron_ads.data.held_out import HeldOut
from megatron_ads.observability.log import get_logger, world_size
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import device, set_threads
from megatron_ads.runtime.health.activity import Activity, name_failed_communication
from megatron_ads.runtime.health.peers import Loss, PeerMonitor
from megatron_ads.runtime.health.rank_record import ExitStatus, write_record
from megatron_ads.runtime.health.watch import HangWatch
from megatron_ads.runtime.seeds import seed_everything
from megatron_ads.training.build import TrainedModel, build_model, lay_out
from megatron_ads.training.export import export_shards
from megatron_ads.training.outcome import Outcome, write_outcome
from megatron_ads.training.position import Position
from megatron_ads.training.rows import open_streams
from megatron_ads.training.run_log import RunLog
from megatron_ads.training.signals import StopRequest
from megatron_ads.training.step import run_evaluation, run_pass, run_step
from megatron_ads.training.topology import preflight

logger = get_logger(__name__)


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
    training, validation = open_streams(config, source, shards.layout)  # a broken row is told before weights are read
    model = build_model(config, source, shards)
    preflight(config, model.optimizer, shards)
    position = Position.resumed(config, model, training, shards.layout, source)
    with RunLog(config, model, shards, peers, activity, resume_step=position.step) as log:
        job = Job(config=config, model=model, training=training, validation=validation, position=position, log=log)
        stopped = train(job, stop)
    if not stopped:
        export_shards(Path(config.log.dir) / "export", model.models, model.spec, source, shards)
    if dist.get_rank() == 0:
        write_outcome(Path(config.log.dir), Outcome.STOPPED if stopped else Outcome.FINISHED, position.step)
    return ExitStatus.STOPPED if stopped else ExitStatus.DONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the steps of a job work on."""

    config: SftConfig
    model: TrainedModel
    training: BatchStream
    validation: HeldOut
    position: Position
    log: RunLog


def train(job: Job, stop: StopRequest) -> bool:
    """Step until the last step, or until some rank is told to stop; return whether it was stopped."""
    config, position = job.config, job.position
    if position.step == 0 and config.reweight.exact:
        _renew_instance_weights(job)
    while position.step < config.train.steps:
        stopped = _step(job, stop)
        if job.training.weights_are_due:
            _renew_instance_weights(job)
        if job.validation.batches and position.is_due(config.train.evaluate_every):
            _evaluate(job)
        if stopped or position.is_due(config.checkpoint.save_every) or position.step == config.train.steps:
            job.log.saved(position.step, position.save())
        if stopped:
            return True
    return False


def _step(job: Job, stop: StopRequest) -> bool:
    """Run the next step; return whether some rank was told to stop."""
    model, position, log = job.model, job.position, job.log
    learning_rate = model.schedule.at(model.optimizer.updates)
    log.begin(position.step + 1)
    report = run_step(
        job.training.next_step(),
        model.chunks,
        model.optimizer,
        learning_rate=learning_rate,
        stop_requested=stop.received is not None,
        before_microbatch=log.moved,
    )
    position.step += 1
    log.step(position.step, report, learning_rate, job.training.observe(report.sample_losses))
    return report.stop_requested


def _renew_instance_weights(job: Job) -> None:
    pass_losses = None
    if job.config.reweight.exact:
        logger.info("step %d: measuring the perplexity of every training row", job.position.step)
        pass_losses = run_pass(job.training.all_rows(), job.model.chunks)
    job.log.instance_weights(job.position.step, job.training.renew_weights(pass_losses))


def _evaluate(job: Job) -> None:
    """Measure the held-out rows, and let the tasks' shares follow."""
    evaluation = run_evaluation(job.validation.batches, job.model.chunks)
    job.log.validation(job.position.step, evaluation, job.validation)
    if job.config.reweight.tasks:
        metrics = job.validation.task_metrics(evaluation.sample_losses)
        job.log.shares(job.position.step, job.training.adapt(metrics, alpha=job.config.reweight.alpha))
