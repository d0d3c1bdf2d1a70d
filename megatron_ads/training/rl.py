"""Reinforcement learning: what every rank does, from joining the job to exported weights.

One step: prompts are drawn and answered by the current weights, the answers are judged by rewards, by a teacher or by
both, the policy is updated on them, and the engines get the new weights. With ``rollout.max_staleness`` the answers of
later steps are generated meanwhile.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ads.config.rl import RlConfig, RolloutMode, validate
from megatron_ads.observability.log import get_logger
from megatron_ads.rewards.failures import RewardHistory
from megatron_ads.rewards.registry import open_rewards
from megatron_ads.rewards.weights import RewardWeights
from megatron_ads.runtime.device import device
from megatron_ads.runtime.garbage import collected_together
from megatron_ads.runtime.health.rank_record import ExitStatus
from megatron_ads.training.build import TrainedModel
from megatron_ads.training.checkpoint_errors import raised_on_all_ranks
from megatron_ads.training.policy_update import PolicyUpdate
from megatron_ads.training.reference import ReferenceWeights
from megatron_ads.training.rollout.answering import Answering, open_answering
from megatron_ads.training.rollout.collect import JobRewards
from megatron_ads.training.rollout.dump import ScoredStep, read_recorded, step_settings
from megatron_ads.training.rollout.metrics import PhaseTimes, of_rewards, of_step
from megatron_ads.training.rollout.overlong import is_masked, shaped
from megatron_ads.training.rollout.prompts import Prompts, PromptStream, open_prompts
from megatron_ads.training.rollout.teacher import open_job_teacher
from megatron_ads.training.session import Membership, Session, join, start_from
from megatron_ads.training.stopping import StopRequest
from megatron_ads.training.streams import share_of, tokenizer_of

logger = get_logger(__name__)


def run(config: RlConfig, stop: StopRequest) -> ExitStatus:
    """Join the job and train; leave rollouts, checkpoints, metrics and, after the last step, ``<log.dir>/export``.

    Raises:
        MegatronAdsError: For anything the user can mend; the message says what and how.
    """
    source, shards = start_from(config)
    validate(config, shards.layout.world, source.shape)
    with join(config, source, shards) as membership:
        # Broken rows and unknown rewards are reported before the weights are read.
        rollout, tokenizer = config.rollout, tokenizer_of(source, config.data.template_arguments)
        prompts = open_prompts(
            config.data,
            tokenizer,
            max_new_tokens=rollout.max_new_tokens,
            probe_rows=rollout.probe_rows,
            valid_names=rollout.valid_names,
        )
        with ExitStack() as opened:
            rewards = opened.enter_context(_open_rewards(config))
            teacher = opened.enter_context(open_job_teacher(config, tokenizer))
            position = Position(prompts.stream, RewardWeights(config.rewards), [], rewards.history)
            session, update = _begin(config, membership, position, stop)
            opened.enter_context(closing(session.log))
            opened.enter_context(session.checkpointer)
            answering = None
            if rollout.mode is not RolloutMode.train_only:
                answering = opened.enter_context(
                    open_answering(config, session, prompts, rewards, teacher, tokenizer, position.weights)
                )
            job = RlJob(
                config=config,
                session=session,
                prompts=prompts,
                reward_weights=position.reward_weights,
                reward_history=rewards.history,
                answering=answering,
                update=update,
            )
            stopped = train(job)
        return session.end(stopped=stopped, export=update is not None)


def _begin(
    config: RlConfig, membership: Membership, position: "Position", stop: StopRequest
) -> tuple[Session, PolicyUpdate | None]:
    """Start or continue the session; return what updates its weights too, None if nothing is trained."""
    trains = config.rollout.mode is not RolloutMode.rollout_only
    reference = list[ReferenceWeights]()

    def keep(model: TrainedModel) -> None:
        if trains and config.policy.kl_coef > 0:
            reference.append(ReferenceWeights(model))

    session = Session.resumed(
        config,
        membership,
        position,
        stop,
        name="RL",
        updates_per_step=config.policy.minibatches if trains else 0,
        before_load=keep,
    )
    if not trains:
        return session, None
    share = share_of(config, membership.shards.layout)
    return session, PolicyUpdate(config=config, session=session, share=share, reference=next(iter(reference), None))


@dataclass(frozen=True, slots=True)
class Position:
    """Where a job is in its prompts, how much each reward counts by now, what the latest weights are called, and which
    rewards have had values."""

    stream: PromptStream
    """Behind the steps that are done, however many are generated."""
    reward_weights: RewardWeights
    weights: list[str]
    """As in ``Answering``: rollouts on file are used if they are by one of them."""
    reward_history: RewardHistory

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "prompts": self.stream.state_dict(),
            "reward_weights": self.reward_weights.state_dict(),
            "weights": list(self.weights),
            "reward_history": self.reward_history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.stream.load_state_dict(state["prompts"])
        self.reward_weights.load_state_dict(state["reward_weights"])
        self.weights[:] = state.get("weights", [])  # older checkpoints have none, here and below
        self.reward_history.load_state_dict(state.get("reward_history", []))


@dataclass(frozen=True, kw_only=True, slots=True)
class RlJob:
    """A session, and where its rollouts come from and go to."""

    config: RlConfig
    session: Session
    prompts: Prompts
    reward_weights: RewardWeights
    reward_history: RewardHistory
    answering: Answering | None
    """None: rollouts are read from ``rollout.dump``."""
    update: PolicyUpdate | None
    """None: nothing is trained."""
    times: PhaseTimes = field(default_factory=PhaseTimes)

    @property
    def weights(self) -> str | None:
        """Name of the current weights; None in a job without engines, whose names another job gave."""
        return self.answering.weights[-1] if self.answering is not None else None

    def rollouts_of(self, step: int) -> ScoredStep:
        """Return what a step is trained on, its rewards shaped, on every rank; a collective."""
        found = self._rewarded(step)
        return replace(found, rewards=shaped(found.rewards, found.rollouts, self.config.rollout))

    def _rewarded(self, step: int) -> ScoredStep:
        if self.answering is not None:
            return self.answering.collect(step, self.times)
        with raised_on_all_ranks():
            names = [reward.name for reward in self.config.rewards.use]
            folder, by_teacher = Path(self.config.rollout.dump or ""), self.config.teacher.is_there
            settings = step_settings(self.config)
            return read_recorded(folder, step, self.prompts.rows, names, settings, by_teacher=by_teacher)

    def warn_of_nothing_to_learn(self, found: ScoredStep, metrics: Mapping[str, float]) -> None:
        """Say so where every answer of a step is worth as much as the others to its prompt, or none is judged.

        A teacher tells tokens apart all the same.
        """
        prompts = self.config.train.global_batch_size
        flat = metrics.get("rollout/groups_without_variance") == prompts and not self.config.teacher.is_there
        if not flat or self.update is None or dist.get_rank() != 0:
            return
        if (mean := metrics.get("critic/rewards/mean")) is None:
            tasks = ", ".join(sorted({rollout.row.task for rollout in found.rollouts}))
            logger.warning(
                "step %d teaches nothing: no reward in rewards.use judges answers to its prompts, of task %s. Name one "
                "that does, or other rows in data.sources",
                self.session.step + 1,
                tasks,
            )
            return
        if all(is_masked(rollout, self.config.rollout) for rollout in found.rollouts):
            logger.warning(
                "step %d teaches nothing: all its answers were cut off, and rollout.overlong is mask. Raise "
                "rollout.max_new_tokens, or begin with weights that answer in less",
                self.session.step + 1,
            )
            return
        logger.warning(
            "step %d teaches nothing: the answers to each of its %d prompts are all worth the same (mean reward "
            "%.4g). If that goes on, begin with weights that get some right, or take other prompts or rewards",
            self.session.step + 1,
            prompts,
            mean,
        )


def train(job: RlJob) -> bool:
    """Step until the last step, or until some rank is asked to stop; return whether it was stopped."""
    session, answering, stopped = job.session, job.answering, False
    evaluate_every = job.config.train.evaluate_every if job.prompts.held_out else None  # all may be too long
    with collected_together(session.config.runtime.gc_interval) as collect_garbage:
        while not (stopped or session.is_finished):
            stopped = _step(job)
            if answering is not None and session.is_due(evaluate_every):
                _evaluate(job, answering)
            session.save_if_due(stopped=stopped)
            collect_garbage(session.step)
    return stopped


def _step(job: RlJob) -> bool:
    """Run the next step; return whether some rank was asked to stop."""
    session, times, activity = job.session, job.times, job.session.membership.activity
    activity.phase = f"rollouts of step {session.step + 1}"  # ranks generate for as long as they need
    found = job.rollouts_of(session.step + 1)
    job.reward_history.observe(found.rewards)  # also of a step from file
    job.reward_weights.observe(found.rewards, np.array([rollout.group for rollout in found.rollouts]))
    metrics = of_step(found, job.reward_weights.current, job.config.rollout)
    if job.answering is not None:
        metrics |= job.answering.staleness(found)
    job.warn_of_nothing_to_learn(found, metrics)
    activity.enter_step(session.step + 1)  # from here to its end, this rank is expected to make progress
    if job.update is None:
        stops = _on_any_rank(session.stop.received is not None)
        session.finish_step(None, metrics | times.take())
        return stops
    metrics |= {"learning_rate": job.update.learning_rate}
    with times.measured("update"):
        report, of_update = job.update.run(found, job.reward_weights, weights=job.weights)
    metrics |= {f"reward_weight/{name}": weight for name, weight in job.reward_weights.current.items()}
    activity.leave_step(session.step + 1)
    if job.answering is not None:
        job.answering.rest(session.step + 2, times)
        with times.measured("sync"):
            metrics |= job.answering.follow()
    session.finish_step(report, metrics | of_update | times.take())
    return report.stop_requested


def _evaluate(job: RlJob, answering: Answering) -> None:
    """Record the mean reward of greedy answers to the held-out prompts."""
    session = job.session
    session.membership.activity.phase = f"evaluation after step {session.step}"
    found = of_rewards("validation/reward", answering.judge_held_out(), job.reward_weights.current)
    found["validation/reward"] = found.pop("validation/reward/mean", float("nan"))
    session.log.record(session.step, found)


@contextmanager
def _open_rewards(config: RlConfig) -> Iterator[JobRewards]:
    """Yield the rewards of a recipe; a collective.

    Raises:
        ConfigError: On every rank, if one is unknown, or has other settings.
    """
    with raised_on_all_ranks():
        rewards = open_rewards(config.rewards) if dist.get_rank() == 0 else None
    with ExitStack() as opened:
        if rewards is not None:
            opened.enter_context(closing(rewards))
        yield JobRewards(rewards, config.runtime.load_timeout_seconds)


def _on_any_rank(holds: bool) -> bool:
    table = torch.tensor(float(holds), device=device())
    dist.all_reduce(table)
    return bool(table)
