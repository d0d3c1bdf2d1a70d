"""Reasoning SFT: what every rank does, from joining the job to exported weights."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megatron_ads.config.run import SftConfig, validate
from megatron_ads.config.training import ReweightConfig
from megatron_ads.data.batches import BatchStream, HeldOut
from megatron_ads.data.prepared.prepare import prepared_directory
from megatron_ads.observability.log import get_logger
from megatron_ads.runtime.garbage import collected_together
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.training.session import Session, join, start_from
from megatron_ads.training.step import run_evaluation, run_pass, run_step
from megatron_ads.training.stopping import StopRequest
from megatron_ads.training.streams import open_streams

logger = get_logger(__name__)


def run(config: SftConfig, stop: StopRequest) -> ExitStatus:
    """Join the job and train; leave checkpoints, metrics and, after the last step, ``<log.dir>/export``.

    Raises:
        MegatronAdsError: For anything the user can mend; the message says what and how.
    """
    source, shards = start_from(config)
    validate(config, shards.layout.world, source.shape)
    with join(config, source, shards) as membership:
        # A broken row is reported before the weights are read.
        training, held_out = open_streams(
            config.data,
            config.train,
            config.loss,
            config.reweight,
            source,
            shards.layout,
            directory=prepared_directory(config.data, Path(config.log.dir)),
        )
        session = Session.resumed(config, membership, training, stop, name="SFT")
        with closing(session.log), session.checkpointer:
            stopped = train(SftJob(session=session, reweight=config.reweight, training=training, held_out=held_out))
        return session.end(stopped=stopped)


@dataclass(frozen=True, kw_only=True, slots=True)
class SftJob:
    """A session, and the rows it trains on and is evaluated on."""

    session: Session
    reweight: ReweightConfig
    training: BatchStream
    held_out: HeldOut


def train(job: SftJob) -> bool:
    """Step until the last step, or until some rank is asked to stop; return whether it was stopped."""
    session, evaluate_every = job.session, job.session.config.train.evaluate_every
    if session.step == 0 and job.reweight.exact:
        _renew_instance_weights(job)
    stopped = False
    with collected_together(session.config.runtime.gc_interval) as collect_garbage:
        while not (stopped or session.is_finished):
            stopped = _step(job)
            if job.training.weights_are_due:
                _renew_instance_weights(job)
            if job.held_out.batches and session.is_due(evaluate_every):
                _evaluate(job)
            session.save_if_due(stopped=stopped)
            collect_garbage(session.step)
    return stopped


def _step(job: SftJob) -> bool:
    """Run the next step; return whether some rank was asked to stop."""
    session, model, activity = job.session, job.session.model, job.session.membership.activity
    learning_rate = model.schedule.at(model.optimizer.updates)
    activity.enter_step(session.step + 1)  # from here to its end, this rank is expected to make progress
    report = run_step(
        job.training.next_step(),
        model.chunks,
        model.optimizer,
        learning_rate=learning_rate,
        stop_requested=session.stop.received is not None,
        before_microbatch=activity.moved,  # a step of a single rank may be long and have no communication
    )
    task_losses = _by_task("loss", job.training.observe(report.sample_losses))
    session.finish_step(report, {"learning_rate": learning_rate} | task_losses)
    return report.stop_requested


def _renew_instance_weights(job: SftJob) -> None:
    session, pass_losses = job.session, None
    if job.reweight.exact:
        logger.info("step %d: measuring the perplexity of every training row", session.step)
        pass_losses = run_pass(job.training.all_rows(), session.model.chunks)
    session.log.record(session.step, job.training.renew_weights(pass_losses))


def _evaluate(job: SftJob) -> None:
    """Measure the held-out rows, and let the tasks' shares follow."""
    session = job.session
    evaluation = run_evaluation(job.held_out.batches, session.model.chunks)
    losses = job.held_out.task_losses(evaluation.sample_losses)
    metrics = job.held_out.task_metrics(evaluation.sample_losses)
    session.log.record(
        session.step,
        {"validation_loss": evaluation.loss} | _by_task("validation_loss", losses) | _by_task("task_metric", metrics),
    )
    if job.reweight.tasks:
        shares = job.training.adapt(metrics, alpha=job.reweight.alpha)
        session.log.record(session.step, _by_task("task_share", shares))


def _by_task(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{task}": value for task, value in values.items()}
