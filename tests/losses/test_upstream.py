"""The formulas against verl's own functions, where it is installed."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ads.config.rl import ImportanceSampling, KlType, LossAggregation, PolicyConfig, PolicyLoss
from megatron_ads.losses.advantages import group_advantages
from megatron_ads.losses.kl import kl_estimate
from megatron_ads.losses.policy import policy_metrics
from tests.losses.policy_batches import MAX_NEW_TOKENS, batches, random_answers, update

_REASON = "verl is not installed. Run `pip install verl` in a copy of this environment: it wants versions of its own."
core_algos: Any = pytest.importorskip("verl.trainer.ppo.core_algos", reason=_REASON)

LENGTHS = (7, 3, 1, 10, 4, 6)
COUNTED = [number for number in range(len(LENGTHS)) if number != 1]
NAMES = {PolicyLoss.grpo: "vanilla", PolicyLoss.gspo: "gspo", PolicyLoss.cispo: "cispo"}
FAR = {"rtol": 1e-6, "atol": 1e-6}


def _padded(values: list[Tensor]) -> Tensor:
    """Return (N, MAX_NEW_TOKENS); torch's own function knows no width."""
    return torch.stack([torch.nn.functional.pad(each, (0, MAX_NEW_TOKENS - len(each))) for each in values])


def _importance_weights(log_ratio: Tensor, mask: Tensor, config: PolicyConfig) -> Tensor | None:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    cap = config.importance_cap
    thresholds: dict[ImportanceSampling, Any] = {
        ImportanceSampling.tis: cap,
        ImportanceSampling.icepop: f"{1 / cap}_{cap}",
    }
    if config.importance_sampling is ImportanceSampling.none:
        return None
    weights: Tensor = compute_rollout_correction_weights(
        log_ratio, mask, rollout_is_threshold=thresholds[config.importance_sampling]
    )[0]
    return weights


@pytest.mark.parametrize("sampling", ImportanceSampling)
@pytest.mark.parametrize("mode", LossAggregation)
@pytest.mark.parametrize("kind", PolicyLoss)
def test_loss_gradient_and_metrics_are_those_of_verl(
    kind: PolicyLoss, mode: LossAggregation, sampling: ImportanceSampling
) -> None:
    from verl.workers.config import ActorConfig

    if kind is PolicyLoss.gspo:
        mode = LossAggregation.seq_mean_token_mean  # verl has no other
    config = PolicyConfig(
        loss=kind,
        loss_agg_mode=mode,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        dual_clip=1.5 if kind is PolicyLoss.grpo else None,
        importance_sampling=sampling,
        importance_cap=1.6,
    )
    theirs = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=1.5,
        loss_agg_mode=mode.value,
    )
    answers = random_answers(LENGTHS)
    ours = update(answers, config, batches(answers, config, rows=[[[0, 1, 2], [3]], [[4, 5], []]], seq_length=24))

    counted = [answers[number] for number in COUNTED]
    mask = _padded([torch.ones(len(each.log_p)) for each in counted])
    old = _padded([each.old for each in counted])
    weights = _importance_weights(old - _padded([each.engine for each in counted]), mask, config)
    loss, metrics = core_algos.get_policy_loss_fn(NAMES[kind])(
        old_log_prob=old,
        log_prob=_padded([each.log_p for each in counted]),
        advantages=mask * torch.tensor([each.advantage for each in counted])[:, None],
        response_mask=mask,
        loss_agg_mode=mode.value,
        config=theirs,
        rollout_is_weights=weights,
    )
    assert ours.loss == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    gradients = torch.autograd.grad(loss, [each.log_p for each in counted])
    for number, gradient in zip(COUNTED, gradients, strict=True):
        torch.testing.assert_close(ours.gradients[number], gradient, **FAR)
    found = policy_metrics(config, ours.totals, ours.per_sample, ours.loss_tokens)
    assert len(metrics) == 3
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KlType)
def test_kl_estimates_are_those_of_verl(kind: KlType) -> None:
    log_p, reference = 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    log_p.requires_grad_()
    ours, theirs = kl_estimate(log_p, reference, kind), core_algos.kl_penalty(log_p, reference, kind.value)
    torch.testing.assert_close(ours, theirs, **FAR)
    pair = [torch.autograd.grad(each.sum(), log_p)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*pair, **FAR)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "compute_grpo_outcome_advantage"),
        ({"norm_adv_by_std": False}, "compute_grpo_outcome_advantage"),
        ({"norm_adv_by_std": False, "leave_one_out": True}, "compute_rloo_outcome_advantage"),
    ],
    ids=str,
)
def test_advantages_are_those_of_verl(settings: dict[str, bool], name: str) -> None:
    draw = np.random.default_rng(0)
    rewards, groups = draw.normal(size=24), draw.permutation(np.repeat(np.arange(6), 4))
    options = {"norm_adv_by_std_in_grpo": settings.get("norm_adv_by_std", True)} if "grpo" in name else {}
    rewards_NT = torch.from_numpy(rewards)[:, None]
    theirs, _ = getattr(core_algos, name)(rewards_NT, torch.ones_like(rewards_NT), groups, **options)
    assert group_advantages(rewards, groups, PolicyConfig(**settings)) == pytest.approx(theirs[:, 0].numpy(), rel=1e-6)
