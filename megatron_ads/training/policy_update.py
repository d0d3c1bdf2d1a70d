"""The update of a policy on the rollouts of one step: log-probabilities, advantages, then one pass over them.

Shape suffixes: N = rollouts of the step.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ads.config.model import Precision
from megatron_ads.config.rl import Combine, KlPlace, LossAggregation, RlConfig, RouterReplay
from megatron_ads.data.batches import ReplicaShare, batches_of_all
from megatron_ads.data.packed_batch import PLACE, PackedBatch, places
from megatron_ads.errors import ConversionError
from megatron_ads.losses.advantages import group_advantages, teacher_advantages
from megatron_ads.losses.kl import kl_estimate, rewards_with_kl
from megatron_ads.losses.policy import (
    ADVANTAGES,
    ENGINE,
    OLD,
    REFERENCE,
    answer_weight,
    normalize_of,
    policy_loss,
    policy_metrics,
)
from megatron_ads.rewards.weights import RewardWeights
from megatron_ads.rows import TokenizedRow
from megatron_ads.training.policy_rows import minibatches, on_labels, policy_row
from megatron_ads.training.reference import ReferenceWeights
from megatron_ads.training.reward_gradients import reward_inner_products
from megatron_ads.training.rollout.dump import ScoredStep
from megatron_ads.training.rollout.overlong import is_masked
from megatron_ads.training.router_replay import ExpertChoices
from megatron_ads.training.session import Session
from megatron_ads.training.step import Routing, StepReport, run_log_probabilities_and_entropies, run_step

_TOLERANCE = {Precision.fp32: 1e-4, Precision.bf16: 2e-2}
"""Of log-probabilities that must be equal, in nats, the mean over tokens: two passes over the same weights."""

Values = list[NDArray[np.float32]]
"""Of each rollout, a number for each token of its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyUpdate:
    """Updates of one job; all methods are collectives."""

    config: RlConfig
    session: Session
    share: ReplicaShare
    reference: ReferenceWeights | None
    """Where ``policy.kl_coef`` is above 0."""

    def run(
        self, found: ScoredStep, reward_weights: RewardWeights, *, weights: str | None
    ) -> tuple[StepReport, dict[str, float]]:
        """Update the weights ``policy.minibatches`` times; return what the step did, and its metrics by verl's names.

        With POPO, ``reward_weights`` follow the gradients first. The rewards are those that the recipe has shaped.
        ``weights`` is the name of the current ones, as ``Rollout.weights`` has it; None where a job cannot know by
        which its rollouts were made.

        Raises:
            ConversionError: On every rank, if log-probabilities differ that must be equal.
        """
        rows = [policy_row(rollout, self._loss_weight(found, place)) for place, rollout in enumerate(found.rollouts)]
        portions = minibatches(found.rollouts, self.config.policy.minibatches)
        engine = [np.array(rollout.log_probabilities, dtype=np.float32) for rollout in found.rollouts]
        records, replays = self._routings(rows, portions)
        old, entropies = self._log_probabilities(rows, [*map(len, engine)], portions, records)
        self._require_agreement(found, engine, old, weights)
        reference = self._of_reference(rows, portions, old)
        rewards = self._with_kl(found, old, reference)
        values = {ENGINE: engine, OLD: old, REFERENCE: reference or old}
        products = self._inner_products(found, rows, values, rewards)
        reward_weights.update(products)
        values[ADVANTAGES] = [
            of_rewards + of_teacher
            for of_rewards, of_teacher in zip(
                self._advantages(found, rewards, reward_weights.current), self._of_teacher(found, old), strict=True
            )
        ]
        reports, metrics = list[StepReport](), list[dict[str, float]]()
        for portion, replay in zip(portions, replays, strict=True):
            part = {name: each[portion.start : portion.stop] for name, each in values.items()}
            reports.append(report := self._update(rows[portion.start : portion.stop], part, replay))
            metrics.append(policy_metrics(self.config.policy, report.totals, report.per_sample, report.loss_tokens))
            if len(reports) == 1:
                self._require_ratio_of_one(metrics[0])
        of_answers = {
            "rollout/logprob_abs_diff": _mean_difference(engine, old),
            "actor/entropy": float(np.concatenate(entropies).astype(np.float64).mean()),
        }
        of_products = {f"reward_inner_product/{name}": product for name, product in products.items()}
        return _together(reports), _means(metrics) | of_answers | of_products

    def _routings(
        self, rows: Sequence[TokenizedRow], portions: Sequence[range]
    ) -> tuple[Sequence[Routing], Sequence[Routing]]:
        """Return how tokens are routed in the pass over each portion, and in the update on it."""
        if self.config.policy.router_replay is RouterReplay.disabled:
            return [nullcontext] * len(portions), [nullcontext] * len(portions)
        models = self.session.model.models
        choices = [ExpertChoices(models, rows[portion.start : portion.stop]) for portion in portions]
        return [each.recorded for each in choices], [each.replayed for each in choices]

    def _inner_products(
        self,
        found: ScoredStep,
        rows: Sequence[TokenizedRow],
        values: Mapping[str, Values],
        rewards: Mapping[str, NDArray[np.float64]],
    ) -> dict[str, float]:
        """Return POPO's I_k by reward; nothing where the rewards are combined otherwise."""
        if self.config.rewards.combine is not Combine.popo:
            return {}

        def batches_of(name: str) -> list[PackedBatch]:
            alone = self._advantages(found, {name: rewards[name]}, {name: 1.0})
            return self._batches(rows, {**values, ADVANTAGES: alone})

        session = self.session
        return reward_inner_products(
            [*rewards],
            batches_of,
            session.model,
            policy_loss(self.config.policy),
            before_microbatch=session.membership.activity.moved,
        )

    def _batches(self, rows: Sequence[TokenizedRow], values: Mapping[str, Values]) -> list[PackedBatch]:
        """Return this rank's microbatches of an update on ``rows``."""
        return batches_of_all(
            rows,
            self.share,
            seq_length=self.config.data.seq_length,
            packing=self.config.data.packing,
            normalize=normalize_of(self.config.policy.loss_agg_mode),
            extra={PLACE: places(rows)}
            | {name: [*map(on_labels, rows, of_answers)] for name, of_answers in values.items()},
        )

    def _update(self, rows: Sequence[TokenizedRow], values: Mapping[str, Values], routing: Routing) -> StepReport:
        model = self.session.model
        return run_step(
            self._batches(rows, values),
            model.chunks,
            model.optimizer,
            learning_rate=self.learning_rate,
            loss=policy_loss(self.config.policy),
            stop_requested=self.session.stop.received is not None,
            before_microbatch=self.session.membership.activity.moved,
            routing=routing,
        )

    @property
    def learning_rate(self) -> float:
        """Of the next update: it follows the steps, however many updates each has."""
        model = self.session.model
        return model.schedule.at(model.optimizer.updates // self.config.policy.minibatches)

    def _log_probabilities(
        self,
        rows: Sequence[TokenizedRow],
        lengths: Sequence[int],
        portions: Sequence[range],
        routings: Sequence[Routing] = (),
    ) -> tuple[Values, Values]:
        """Return the model's log-probabilities and entropies of the answers, in the very batches that are trained on.

        ``lengths`` are those of the answers, in tokens; without ``routings``, one for each portion, the router chooses.
        """
        data, session = self.config.data, self.session
        found, entropies = list[torch.Tensor](), list[torch.Tensor]()
        for portion, routing in zip(portions, routings or [nullcontext] * len(portions), strict=True):
            log_p, entropy = run_log_probabilities_and_entropies(
                rows[portion.start : portion.stop],
                self.share,
                session.model.chunks,
                seq_length=data.seq_length,
                packing=data.packing,
                before_microbatch=session.membership.activity.moved,
                routing=routing,
            )
            found, entropies = found + log_p, entropies + entropy
        of_answers = [
            [values.numpy()[-length:] for length, values in zip(lengths, each, strict=True)]
            for each in (found, entropies)
        ]
        return of_answers[0], of_answers[1]

    def _of_reference(self, rows: Sequence[TokenizedRow], portions: Sequence[range], old: Values) -> Values | None:
        """Return what the initial weights say of the answers; at the first step, it must be what the policy says."""
        if self.reference is None:
            return None
        with self.reference.in_place():
            found, _ = self._log_probabilities(rows, [*map(len, old)], portions)
        if self.session.model.optimizer.updates == 0:
            difference, tolerance = _mean_difference(old, found), _TOLERANCE[self.config.model.precision]
            if not difference <= tolerance:
                raise ConversionError(
                    f"before the first update the policy is its own reference, but their log-probabilities differ by "
                    f"{difference:.4g} nats a token, more than {tolerance:g}: the forward pass does not repeat itself. "
                    "Set train.deterministic, or look for what is random in the model."
                )
        return found

    def _require_agreement(self, found: ScoredStep, engine: Values, old: Values, weights: str | None) -> None:
        """Refuse answers by the current weights of which the engine says something else than the trainer.

        Those by older weights differ in any case.
        """
        current = [place for place, rollout in enumerate(found.rollouts) if rollout.weights == weights]
        if not current:
            return
        difference = _mean_difference([engine[place] for place in current], [old[place] for place in current])
        # Never of a difference that is not a number.
        if not difference <= self.config.rollout.max_logprob_diff:
            raise ConversionError(
                f"at step {self.session.step + 1}, engine and trainer differ by {difference:.4g} nats a token on the "
                f"answers, above rollout.max_logprob_diff = {self.config.rollout.max_logprob_diff:g}: the engine does "
                "not hold the trained weights, or computes something else. Compare their number formats; if such a "
                "difference is to be expected, raise the limit and set policy.importance_sampling, which corrects it."
            )

    def _require_ratio_of_one(self, metrics: Mapping[str, float]) -> None:
        """Refuse a first update whose pass over the answers differs from the one before it."""
        tolerance = _TOLERANCE[self.config.model.precision]
        ratio, kl = metrics["actor/ratio"], metrics["actor/ppo_kl"]
        if not (abs(ratio - 1) <= tolerance and abs(kl) <= tolerance) and metrics["actor/max_ratio"]:
            raise ConversionError(
                f"the first update of step {self.session.step + 1} began with a mean ratio of {ratio:.6g} and a KL "
                f"estimate of {kl:.3g} between the policy and itself, which must be 1 and 0 within {tolerance:g}: the "
                "training pass computes something else than the pass for old log-probabilities. Set "
                "train.deterministic, or look for what is random in the model."
            )

    def _with_kl(self, found: ScoredStep, old: Values, reference: Values | None) -> dict[str, NDArray[np.float64]]:
        """Return the rewards, less the distance to the reference where the recipe takes that off."""
        policy = self.config.policy
        if reference is None or policy.kl_in is not KlPlace.reward:
            return found.rewards
        pairs = zip(old, reference, strict=True)
        kl_N = np.array(
            [
                float(kl_estimate(torch.from_numpy(p), torch.from_numpy(ref), policy.kl_loss_type).sum())
                for p, ref in pairs
            ]
        )
        return {name: rewards_with_kl(values_N, kl_N, policy.kl_coef) for name, values_N in found.rewards.items()}

    def _advantages(
        self, found: ScoredStep, rewards: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]
    ) -> Values:
        """Return A = sum_k w_k A_k of each answer, at each of its tokens."""
        group_N = np.array([rollout.group for rollout in found.rollouts])
        advantages_N = np.zeros(len(group_N))
        for name, values_N in rewards.items():
            advantages_N += weights[name] * group_advantages(values_N, group_N, self.config.policy)
        return [
            np.full(len(rollout.answer_tokens), value, dtype=np.float32)
            for rollout, value in zip(found.rollouts, advantages_N, strict=True)
        ]

    def _of_teacher(self, found: ScoredStep, old: Values) -> Values:
        """Return what the teacher adds to the advantage of each token; 0 without one."""
        coefficient = self.config.teacher.kl_coef
        return [
            teacher_advantages(rollout.teacher_log_probabilities, log_p, coefficient)
            for rollout, log_p in zip(found.rollouts, old, strict=True)
        ]

    def _loss_weight(self, found: ScoredStep, place: int) -> float:
        """Return the weight of each token of an answer; 0 for one that is masked, or that nothing has judged."""
        rollout, settings = found.rollouts[place], self.config.rollout
        rewarded = any(not np.isnan(values_N[place]) for values_N in found.rewards.values())
        if is_masked(rollout, settings) or not (rewarded or rollout.teacher_log_probabilities is not None):
            return 0.0
        mode: LossAggregation = self.config.policy.loss_agg_mode
        return rollout.row.weight * answer_weight(mode, len(rollout.answer_tokens), settings.max_new_tokens)


def _mean_difference(left: Values, right: Values) -> float:
    """Return the mean over all tokens of the absolute difference."""
    return float(np.abs(np.concatenate(left).astype(np.float64) - np.concatenate(right)).mean())


def _together(reports: Sequence[StepReport]) -> StepReport:
    """Return the report of a step of several updates; it counts as updated if all of them were."""
    updates = [report.update for report in reports if report.update is not None]
    return replace(
        reports[-1],
        loss=sum(report.loss for report in reports) / len(reports),
        loss_tokens=sum(report.loss_tokens for report in reports),
        tokens=sum(report.tokens for report in reports),
        samples=sum(report.samples for report in reports),
        stop_requested=any(report.stop_requested for report in reports),
        update=replace(updates[-1], updated=all(update.updated for update in updates)),
    )


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}
