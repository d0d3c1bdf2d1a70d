"""Preference training, DPO and S-DPO: what every rank does, from joining the job to exported weights.

One step: prompts are drawn, each a set of a chosen answer and rejected ones; two passes make the update exact, whatever
microbatches, replicas and stages the answers of a set are on (see ``losses/preference.py``): log-probabilities of all
answers under the current weights, from which each answer gets a coefficient, then one update with these.

Shape suffixes: S = sets of a step, N = their answers.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.model import Precision
from megatron_ads.config.preference import PreferenceConfig, validate
from megatron_ads.config.training import Normalize
from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.data.preferences import Answers, PreferenceStream, ReferencedSets, open_preferences
from megatron_ads.errors import ConversionError
from megatron_ads.losses.preference import (
    PREFERENCE,
    preference_coefficients,
    preference_metrics,
    preference_values,
)
from megatron_ads.runtime.garbage import collected_together
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.training.reference import ReferenceWeights
from megatron_ads.training.session import Session, join, start_from
from megatron_ads.training.step import StepReport, run_log_probabilities, run_step
from megatron_ads.training.stopping import StopRequest
from megatron_ads.training.streams import share_of, tokenizer_of

_TOLERANCE = {Precision.fp32: 1e-4, Precision.bf16: 2e-2}
"""Of the first loss, in nats: two passes over the same weights."""


def run(config: PreferenceConfig, stop: StopRequest) -> ExitStatus:
    """Join the job and train; leave checkpoints, metrics and, after the last step, ``<log.dir>/export``.

    Raises:
        MegatronAdsError: For anything the user can mend; the message says what and how.
    """
    source, shards = start_from(config)
    validate(config, shards.layout.world, source.shape)
    with join(config, source, shards) as membership:
        # A broken row is reported before the weights are read.
        training, held_out = open_preferences(
            config.data,
            config.preference,
            tokenizer_of(source, config.data.template_arguments),
            per_step=config.train.global_batch_size,
        )
        reference = list[ReferenceWeights]()
        session = Session.resumed(
            config,
            membership,
            training,
            stop,
            name="preference",
            before_load=lambda model: reference.append(ReferenceWeights(model)),
        )
        job = PreferenceJob(
            config=config,
            session=session,
            share=share_of(config, shards.layout),
            reference=reference[0],
            training=training,
            held_out=held_out,
        )
        with closing(session.log), session.checkpointer:
            stopped = train(job)
        return session.end(stopped=stopped)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceJob:
    """A session, the sets it trains on and is evaluated on, and the weights they are compared by."""

    config: PreferenceConfig
    session: Session
    share: ReplicaShare
    reference: ReferenceWeights
    training: PreferenceStream
    held_out: ReferencedSets


def train(job: PreferenceJob) -> bool:
    """Step until the last step, or until some rank is asked to stop; return whether it was stopped."""
    session, stopped = job.session, False
    with collected_together(session.config.runtime.gc_interval) as collect_garbage:
        while not (stopped or session.is_finished):
            stopped = _step(job)
            if job.held_out.sets and session.is_due(job.config.train.evaluate_every):
                _evaluate(job)
            session.save_if_due(stopped=stopped)
            collect_garbage(session.step)
    return stopped


def _step(job: PreferenceJob) -> bool:
    """Run the next step; return whether some rank was asked to stop."""
    session, model, sets = job.session, job.session.model, job.training.sets
    if not sets.are_known(*job.training.upcoming(1)):
        left = job.config.train.max_steps - session.step
        _compute_reference(job, sets, job.training.upcoming(min(job.config.preference.reference_steps, left)))
    session.membership.activity.enter_step(session.step + 1)  # from here to its end, this rank must make progress
    numbers, learning_rate = job.training.next_step(), model.schedule.at(model.optimizer.updates)
    found = _objective(job, sets, numbers)
    if model.optimizer.updates == 0:
        require_first_loss(found, job.config.model.precision)
    report = _update(job, found, learning_rate)
    session.finish_step(report, {"learning_rate": learning_rate} | found.metrics)
    return report.stop_requested


def _compute_reference(job: PreferenceJob, sets: ReferencedSets, portions: Iterable[Sequence[int]]) -> None:
    """Fill in what is not known yet of some sets, by number, in the very batches that a step has."""
    session, started = job.session, time.monotonic()
    session.membership.activity.phase = f"reference log-probabilities after step {session.step}"
    with job.reference.in_place():
        for numbers in portions:
            if not sets.are_known(numbers):
                sets.fill(numbers, _log_probabilities(job, sets.answers_of(numbers)))
    session.log.record(session.step, {"reference_seconds": time.monotonic() - started})


def _log_probabilities(job: PreferenceJob, answers: Answers) -> NDArray[np.float64]:
    """Return what the model says of each answer, in nats over all of its tokens, (N,)."""
    data, session = job.config.data, job.session
    found = run_log_probabilities(
        answers.rows,
        job.share,
        session.model.chunks,
        seq_length=data.seq_length,
        packing=data.packing,
        before_microbatch=session.membership.activity.moved,
    )
    pairs = zip(found, answers.rows, strict=True)
    return np.array([values.double().numpy()[row.loss_weights[1:] != 0].sum() for values, row in pairs])


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What a step minimises."""

    answers: Answers
    preference_S: NDArray[np.float64]
    """The preference loss of each set, without its weight."""
    loss_S: NDArray[np.float64]
    """All of the loss of each set."""
    coefficient_N: NDArray[np.float64]
    """Its derivative by the log-probability of each answer."""
    metrics: dict[str, float]


def _objective(job: PreferenceJob, sets: ReferencedSets, numbers: Sequence[int]) -> Objective:
    settings, answers = job.config.preference, sets.answers_of(numbers)
    set_N, chosen_N = answers.set_N, answers.chosen_N
    policy_N, reference_N = _log_probabilities(job, answers), sets.reference_of(numbers)
    preference_S, coefficient_N = preference_coefficients(policy_N, reference_N, set_N, chosen_N, settings.beta)
    metrics = preference_metrics(policy_N, reference_N, set_N, chosen_N, settings.beta)
    metrics |= {"logps/chosen": policy_N[chosen_N].mean(), "logps/rejected": policy_N[~chosen_N].mean()}
    loss_S = preference_S
    if settings.sft_weight:
        tokens_N = np.array([row.target_count for row in answers.rows])
        nll_S = -policy_N[chosen_N] / tokens_N[chosen_N]
        loss_S = loss_S + settings.sft_weight * nll_S
        coefficient_N = coefficient_N - settings.sft_weight * chosen_N / tokens_N
        metrics["nll_loss"] = nll_S.mean()
    return Objective(
        answers=answers,
        preference_S=preference_S,
        loss_S=loss_S * answers.weight_S,
        coefficient_N=coefficient_N * answers.weight_S[set_N],
        metrics=metrics,
    )


def require_first_loss(found: Objective, precision: Precision) -> None:
    """Refuse a first step whose policy is not its own reference.

    Raises:
        ConversionError: On every rank.
    """
    loss, expected = found.preference_S.mean(), np.log(np.bincount(found.answers.set_N)).mean()
    tolerance = _TOLERANCE[precision]
    if not abs(loss - expected) <= tolerance:
        raise ConversionError(
            f"before the first update the policy is its own reference, so that the loss is log(1 + rejected answers) = "
            f"{expected:.6g}, but it is {loss:.6g}, more than {tolerance:g} away: the forward pass does not repeat "
            "itself. Set train.deterministic, or look for what is random in the model."
        )


def _update(job: PreferenceJob, found: Objective, learning_rate: float) -> StepReport:
    data, model, answers = job.config.data, job.session.model, found.answers
    batches = batches_of_all(
        answers.rows,
        job.share,
        seq_length=data.seq_length,
        packing=data.packing,
        normalize=Normalize.sample,
        extra=preference_values(answers.rows, found.loss_S, found.coefficient_N, answers.set_N, answers.chosen_N),
    )
    return run_step(
        batches,
        model.chunks,
        model.optimizer,
        learning_rate=learning_rate,
        loss=PREFERENCE,
        stop_requested=job.session.stop.received is not None,
        before_microbatch=job.session.membership.activity.moved,
    )


def _evaluate(job: PreferenceJob) -> None:
    """Measure the held-out sets."""
    count, size = len(job.held_out.sets), job.config.train.global_batch_size
    portions = [range(start, min(start + size, count)) for start in range(0, count, size)]
    if not all(map(job.held_out.are_known, portions)):
        _compute_reference(job, job.held_out, portions)
    found = [_objective(job, job.held_out, numbers) for numbers in portions]
    means = {
        name: sum(len(numbers) * each.metrics[name] for numbers, each in zip(portions, found, strict=True)) / count
        for name in found[0].metrics
    }
    loss = sum(each.loss_S.sum() for each in found) / count
    job.session.log.record(
        job.session.step, {"validation_loss": loss} | {f"validation_{name}": value for name, value in means.items()}
    )
