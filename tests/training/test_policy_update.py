"""An update of the policy on the rollouts of a step: what its loss is made of, in numbers worked out by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch

from megatron_ads.config.recipes import load_job
from megatron_ads.data.batches import ReplicaShare
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.losses.loss import Loss, TokenValues
from megatron_ads.losses.policy import OLD
from megatron_ads.optim.chain import UpdateReport
from megatron_ads.rows import TokenizedRow
from megatron_ads.training import policy_update
from megatron_ads.training.rollout.dump import ScoredStep
from megatron_ads.training.step import StepReport
from tests.training.rollout.test_rollouts import rollout


@dataclass(slots=True)
class Weights:
    """Stands for a model and its reference: what each says of all tokens of an answer."""

    policy: dict[str, float]
    """log p of each token, by the row that is answered."""
    reference: dict[str, float]
    is_reference: bool = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the reference answer."""
        self.is_reference = True
        yield
        self.is_reference = False

    def log_probabilities(self, rows: Sequence[TokenizedRow], *_: Any, **__: Any) -> Any:
        """Stand for ``run_log_probabilities_and_entropies``."""
        said = self.reference if self.is_reference else self.policy
        return ([torch.full((row.predictions,), said[row.id]) for row in rows],) * 2


def _step(batches: Sequence[PackedBatch], *_: Any, loss: Loss, **__: Any) -> StepReport:
    """Stand for ``run_step``, with weights that say what they said before the update."""
    found = [
        loss.compute(
            TokenValues(
                negative_log_p_T=-batch.extra[OLD].view(1, -1),
                mask_T=batch.mask_BS.view(1, -1),
                sample_T=batch.sample_BS.view(-1),
                step_samples=batch.step_samples,
                normalizer=batch.normalizer,
                extra={name: values_BS.view(1, -1) for name, values_BS in batch.extra.items()},
            )
        )
        for batch in batches
    ]
    return StepReport(
        loss=sum(float(each.sum) for each in found) / sum(each.count for each in found),
        loss_tokens=sum(batch.target_count for batch in batches),
        tokens=sum(batch.token_count for batch in batches),
        samples=sum(batch.sample_count for batch in batches),
        stop_requested=False,
        update=UpdateReport(updated=True, grad_norm=1.0, norm_by_kind={}, zero_gradients=0),
        totals={name: sum(float(each.report[name]) for each in found) for name in loss.totals},
        per_sample={name: sum(each.report[name] for each in found).tolist() for name in loss.per_sample},  # type: ignore[union-attr]
    )


def _updated(
    monkeypatch: pytest.MonkeyPatch, found: ScoredStep, weights: Weights, *overrides: str
) -> tuple[StepReport, dict[str, float]]:
    """Return what an update reports; advantages are r - mean unless ``overrides`` say otherwise."""
    monkeypatch.setattr(policy_update, "run_log_probabilities_and_entropies", weights.log_probabilities)
    monkeypatch.setattr(policy_update, "run_step", _step)
    words = ["model.load=x", "policy.norm_adv_by_std=false", "data.seq_length=16", "rollout.max_new_tokens=8"]
    config: Any = load_job("rl/quickstart", [*words, *overrides])
    session = MagicMock()
    session.model.optimizer.updates = 1  # the policy has left its reference
    reference: Any = weights if config.policy.kl_coef else None
    update = policy_update.PolicyUpdate(
        config=config, session=session, share=ReplicaShare(2, 1, 0, 1), reference=reference
    )
    return update.run(found, Mock(current=dict.fromkeys(found.rewards, 1.0)), weights=None)


# The rewards 1, 0, 0 of one group, whose second answer, of three tokens, was cut off; the others have two and one. The
# advantages are r - 1/3 whether it is masked or not; at a ratio of 1 a token's loss is -A.
@pytest.mark.parametrize(
    ("overlong", "mode", "loss", "tokens"),
    [
        ("mask", "token_mean", -(2 * 2 / 3 - 1 * 1 / 3) / 3, 3),  # if the mean were without it: -(2 / 2 - 1 / 2) / 3
        ("mask", "seq_mean_token_mean", -(2 / 3 - 1 / 3) / 2, 3),
        ("keep", "token_mean", -(2 * 2 / 3 - 3 * 1 / 3 - 1 * 1 / 3) / 6, 6),
        ("keep", "seq_mean_token_mean", -(2 / 3 - 1 / 3 - 1 / 3) / 3, 6),
    ],
)
def test_an_answer_that_was_cut_off_and_is_masked_counts_in_its_groups_mean_but_not_in_the_loss(
    monkeypatch: pytest.MonkeyPatch, overlong: str, mode: str, loss: float, tokens: int
) -> None:
    answers = [rollout(0, (7, 8)), replace(rollout(0, (7, 8, 9)), cut_off=True), rollout(0, (9,))]
    found = ScoredStep(rollouts=answers, rewards={"one": np.array([1.0, 0.0, 0.0])})
    weights, settings = Weights({"a": -1.0}, {}), (f"rollout.overlong={overlong}", f"policy.loss_agg_mode={mode}")
    report, metrics = _updated(monkeypatch, found, weights, *settings)
    assert report.loss == metrics["actor/pg_loss"] == pytest.approx(loss, abs=1e-7)
    assert (report.loss_tokens, report.samples) == (tokens, 3)


# Answers of two tokens and of one, worth 1 and 0. log p is -1 everywhere, and by the reference -1.5 for the first and
# -1 for the second: d = 1/2 for two tokens, 0 for one. beta = 1/2.
@pytest.mark.parametrize(
    ("place", "kind", "policy_loss", "kl_loss"),
    [
        # KL = 1/2 + 1/2: R = 1 - 1/2 and 0, so A = 1/4 and -1/4.
        ("reward", "k1", -(2 * 0.25 - 0.25) / 3, None),
        # KL = 1/8 + 1/8: R = 1 - 1/8 and 0, so A = 7/16 and -7/16.
        ("reward", "k2", -(2 * 7 / 16 - 7 / 16) / 3, None),
        # Rewards stay 1 and 0, A = 1/2 and -1/2; the KL is the mean over the three tokens.
        ("loss", "k1", -(2 * 0.5 - 0.5) / 3, 2 * 0.5 / 3),
    ],
)
def test_a_kl_in_the_reward_is_taken_off_before_answers_are_compared_and_is_no_part_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, place: str, kind: str, policy_loss: float, kl_loss: float | None
) -> None:
    answers = [rollout(0, (7, 8)), rollout(0, (9,), name="b")]
    found = ScoredStep(rollouts=answers, rewards={"one": np.array([1.0, 0.0])})
    weights = Weights({"a": -1.0, "b": -1.0}, {"a": -1.5, "b": -1.0})
    settings = (f"policy.kl_in={place}", f"policy.kl_loss_type={kind}", "policy.kl_coef=0.5")
    report, metrics = _updated(monkeypatch, found, weights, *settings)
    assert metrics["actor/pg_loss"] == pytest.approx(policy_loss, abs=1e-7)
    assert metrics.get("actor/kl_loss") == (None if kl_loss is None else pytest.approx(kl_loss))
    assert report.loss == pytest.approx(policy_loss + 0.5 * (kl_loss or 0.0), abs=1e-7)
