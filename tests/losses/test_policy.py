"""Policy losses: numbers worked out by hand, a plain autograd reference, and nothing depends on the microbatches."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ads.config.rl import ImportanceSampling, KlPlace, KlType, LossAggregation, PolicyConfig, PolicyLoss
from megatron_ads.losses.advantages import teacher_advantages
from megatron_ads.losses.policy import policy_loss, policy_metrics
from tests.losses.policy_batches import MAX_NEW_TOKENS, Answer, batches, random_answers, update

LN2, LN_1_5 = math.log(2), math.log(1.5)
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}


def _answer(ratios: Sequence[float], advantage: float, **others: Sequence[float]) -> Answer:
    """Return an answer of tokens with log pi = -1 and given ratios to the old policy, and of others to it."""
    log_p = torch.full((len(ratios),), -1.0)
    old = log_p - torch.tensor(ratios).log()
    reference = log_p - torch.tensor(others.get("to_reference", [1.0] * len(ratios))).log()
    engine = old - torch.tensor(others.get("old_to_engine", [1.0] * len(ratios))).log()
    return Answer(log_p.requires_grad_(), old, reference, engine, advantage)


def _sums(answers: Sequence[Answer], **settings: Any) -> tuple[dict[str, float], list[float]]:
    """Return the totals of one update with token-mean, and sum_t dl_t / d log pi of each token, in order."""
    config = PolicyConfig(**settings)
    (values,) = batches(answers, config, rows=[[list(range(len(answers)))]], seq_length=16)
    found = update(answers, config, [values])
    gradients = torch.cat(found.gradients) * values.normalizer
    return found.totals | found.per_sample, gradients.tolist()  # type: ignore[return-value]


def _answers() -> list[Answer]:
    return [_answer([1.0, 1.5, 0.5], 2.0), _answer([2.0, 0.5], -1.0)]


def test_grpo_clips_the_ratio_of_each_token() -> None:
    # A = 2: rho 1 -> -2; 1.5 -> clipped, -2 x 1.3 = -2.6; 0.5 -> -1, as 0.8 is not the minimum of rho A and clip A.
    # A = -1: rho 2 -> max(2, 1.3) = 2, the way back is never clipped; 0.5 -> max(0.5, 0.8) = 0.8, clipped.
    totals, gradients = _sums(_answers(), **CLIP)
    assert totals == {
        "pg_loss": pytest.approx(-2 - 2.6 - 1 + 2 + 0.8),
        "pg_clipfrac": 2,
        "pg_clipfrac_lower": 0,
        "ppo_kl": pytest.approx(-(0 + LN_1_5 - LN2 + LN2 - LN2)),  # -sum log rho
        "ratio": pytest.approx(1 + 1.5 + 0.5 + 2 + 0.5),
        "answers": 2,
        "max_ratio": pytest.approx([1.5, 2.0]),
    }
    assert gradients == pytest.approx([-2, 0, -1, 2, 0])  # -A rho where it is not clipped


def test_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    # As above, but rho 2 with A = -1 -> min(2, 1.5); A > 0 is not concerned.
    totals, gradients = _sums(_answers(), dual_clip=1.5, **CLIP)
    assert totals["pg_loss"] == pytest.approx(-2 - 2.6 - 1 + 1.5 + 0.8)
    assert (totals["pg_clipfrac"], totals["pg_clipfrac_lower"]) == (2, 1)
    assert gradients == pytest.approx([-2, 0, -1, 0, 0])


def test_gspo_clips_the_geometric_mean_of_an_answer() -> None:
    # s = (1 x 1.5 x 0.5)^(1/3) = 0.9085603 and (2 x 0.5)^(1/2) = 1, neither clipped; tokens: -2 x 0.90856, and 1.
    totals, gradients = _sums(_answers(), loss=PolicyLoss.gspo, **CLIP)
    assert totals["pg_loss"] == pytest.approx(3 * -2 * 0.9085603 + 2 * 1)
    assert totals["max_ratio"] == pytest.approx([0.9085603, 1])
    assert totals["pg_clipfrac"] == 0
    assert gradients == pytest.approx([-2 * 0.9085603] * 3 + [1] * 2)
    # s = 1.5 and A > 0: the whole answer is clipped at 1.3.
    totals, gradients = _sums([_answer([3.0, 0.75], 1.0)], loss=PolicyLoss.gspo, **CLIP)
    assert (totals["pg_loss"], totals["pg_clipfrac"]) == (pytest.approx(-2 * 1.3), 2)
    assert gradients == [0, 0]


def test_cispo_clips_the_weight_of_a_token_and_keeps_its_gradient() -> None:
    # -clip(rho) A log pi with log pi = -1: clip 1, 1.3, 0.8 times 2, and 1.3, 0.8 times -1.
    totals, gradients = _sums(_answers(), loss=PolicyLoss.cispo, **CLIP)
    assert totals["pg_loss"] == pytest.approx(2 + 2.6 + 1.6 - 1.3 - 0.8)
    assert totals["pg_clipfrac"] == 4
    assert gradients == pytest.approx([-2, -2.6, -1.6, 1.3, 0.8])


# pi_old / pi_engine = 1, 3, 0.4 with a cap of 2; l = -1 for each token.
@pytest.mark.parametrize(
    ("kind", "weights"), [(ImportanceSampling.tis, [1, 2, 0.4]), (ImportanceSampling.icepop, [1, 0, 0])]
)
def test_tokens_are_weighed_by_what_the_trainer_gives_them_over_what_the_engine_did(
    kind: ImportanceSampling, weights: list[float]
) -> None:
    answers = [_answer([1.0] * 3, 1.0, old_to_engine=[1.0, 3.0, 0.4])]
    totals, gradients = _sums(answers, importance_sampling=kind, importance_cap=2.0)
    assert totals["pg_loss"] == pytest.approx(-sum(weights))
    assert totals["importance_weight"] == pytest.approx(sum(weights))
    assert gradients == pytest.approx([-weight for weight in weights])


def test_kl_in_the_loss_is_weighed_by_beta() -> None:
    # pi / ref = 2: k2 = ln2^2 / 2 for each token, gradient ln 2, beside A = 1 and rho = 1.
    answers = [_answer([1.0, 1.0], 1.0, to_reference=[2.0, 2.0])]
    settings: dict[str, Any] = {"kl_coef": 0.5, "kl_loss_type": KlType.k2}
    totals, gradients = _sums(answers, **settings)
    assert (totals["pg_loss"], totals["kl_loss"]) == (pytest.approx(-2), pytest.approx(LN2**2))
    assert gradients == pytest.approx([-1 + 0.5 * LN2] * 2)
    totals, gradients = _sums(answers, kl_in=KlPlace.reward, **settings)
    assert "kl_loss" not in totals
    assert gradients == pytest.approx([-1] * 2)


# rho = 1, so l = -A: answers of 2 tokens with A = 1 and of 4 with A = 2; a third has no weight.
@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (LossAggregation.token_mean, -(2 * 1 + 4 * 2) / 6),
        (LossAggregation.seq_mean_token_sum, -(2 * 1 + 4 * 2) / 2),
        (LossAggregation.seq_mean_token_mean, -(1 + 2) / 2),
        (LossAggregation.seq_mean_token_sum_norm, -(2 * 1 + 4 * 2) / MAX_NEW_TOKENS / 2),
    ],
)
def test_the_mean_is_over_the_tokens_or_the_answers_of_the_update(mode: LossAggregation, wanted: float) -> None:
    config = PolicyConfig(loss_agg_mode=mode)
    masked = Answer(*[torch.full((3,), -1.0, requires_grad=True), *torch.full((3, 3), -1.0)], 9.0, counts=False)
    answers = [_answer([1.0] * 2, 1.0), _answer([1.0] * 4, 2.0), masked]
    for rows in ([[[0, 1, 2]]], [[[1]], [[0]], [[2]]]):  # one microbatch, or three
        found = update(answers, config, batches(answers, config, rows=rows, seq_length=16))
        metrics = policy_metrics(config, found.totals, found.per_sample, found.loss_tokens)
        assert found.loss == pytest.approx(wanted)
        assert metrics["actor/pg_loss"] == pytest.approx(wanted)
        assert metrics["actor/ratio"] == metrics["actor/max_ratio"] == 1


def _reference_loss(answers: Sequence[Answer], config: PolicyConfig) -> Tensor:
    """Compute the loss of an update token by token, from the papers' formulas."""
    counted = [answer for answer in answers if answer.counts]
    losses = [_reference_tokens(answer, config) for answer in counted]
    match config.loss_agg_mode:
        case LossAggregation.token_mean:
            return torch.cat(losses).mean()
        case LossAggregation.seq_mean_token_sum:
            return torch.stack([each.sum() for each in losses]).mean()
        case LossAggregation.seq_mean_token_mean:
            return torch.stack([each.mean() for each in losses]).mean()
    return torch.stack([each.sum() / MAX_NEW_TOKENS for each in losses]).mean()


def _reference_tokens(answer: Answer, config: PolicyConfig) -> Tensor:
    low, high, a = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high, answer.advantage
    losses = []
    for t in range(len(answer.log_p)):
        log_p = answer.log_p[t]
        rho = torch.exp(log_p - answer.old[t])
        if config.loss is PolicyLoss.gspo:
            s = (answer.log_p - answer.old).mean().exp().detach()
            rho = s * torch.exp(log_p) / torch.exp(log_p).detach()
        bounded = min(max(rho, torch.tensor(low)), torch.tensor(high))
        if config.loss is PolicyLoss.cispo:
            gain = bounded.detach() * a * log_p
        else:
            gain = min(rho * a, bounded * a)
            if config.dual_clip is not None and a < 0:
                gain = max(gain, torch.tensor(config.dual_clip * a))
        r = torch.exp(answer.old[t] - answer.engine[t]).item()
        if config.importance_sampling is ImportanceSampling.tis:
            gain = gain * min(r, config.importance_cap)
        elif config.importance_sampling is ImportanceSampling.icepop:
            gain = gain * (r if 1 / config.importance_cap <= r <= config.importance_cap else 0)
        d = log_p - answer.reference[t]
        kl = {KlType.k1: d, KlType.k2: d**2 / 2, KlType.k3: torch.exp(-d) - 1 + d}[config.kl_loss_type]
        losses.append(config.kl_coef * kl - gain)
    return torch.stack(losses)


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo-dual-tis": {"dual_clip": 1.2, "importance_sampling": ImportanceSampling.tis, "importance_cap": 1.3},
    "gspo-k1-icepop": {
        "loss": PolicyLoss.gspo, "kl_coef": 0.3, "kl_loss_type": KlType.k1,
        "importance_sampling": ImportanceSampling.icepop, "importance_cap": 1.5,
    },
    "cispo-k2": {"loss": PolicyLoss.cispo, "kl_coef": 0.3, "kl_loss_type": KlType.k2},
    "grpo-k3": {"kl_coef": 0.3},
}  # fmt: skip
ONE_MICROBATCH = [[[0, 1, 2], [3, 4]]]
THREE_MICROBATCHES = [[[4, 1], []], [[3], []], [[2, 0], []]]


@pytest.mark.parametrize("mode", LossAggregation)
@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_are_those_of_a_plain_reference_in_any_microbatches(
    name: str, mode: LossAggregation
) -> None:
    config = PolicyConfig(loss_agg_mode=mode, **CLIP, **VARIANTS[name])
    answers = random_answers([7, 3, 1, 9, 4])
    wanted = _reference_loss(answers, config)
    gradients = torch.autograd.grad(wanted, [answer.log_p for answer in answers if answer.counts])
    for rows in (ONE_MICROBATCH, THREE_MICROBATCHES):
        found = update(answers, config, batches(answers, config, rows=rows, seq_length=24))
        assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
        assert not found.gradients[1].any()
        for gradient, expected in zip(found.gradients[:1] + found.gradients[2:], gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_teacher_s_advantages_give_the_gradient_of_the_reverse_kl_at_the_policy_s_own_prefixes() -> None:
    # All answers of two tokens over a vocabulary of three, each as often as the policy writes it: the expectation of
    # the estimator. Autograd through beta (KL of the first token + sum_v sg(pi(v)) KL of the second behind v).
    beta, draw = 0.7, torch.Generator().manual_seed(3)
    first, second = (torch.randn(*shape, generator=draw).requires_grad_() for shape in ((3,), (3, 3)))
    teacher_first, teacher_second = (torch.randn(*shape, generator=draw).log_softmax(-1) for shape in ((3,), (3, 3)))
    log_first, log_second = first.log_softmax(-1), second.log_softmax(-1)
    divergences = (log_second.exp() * (log_second - teacher_second)).sum(-1)
    divergence = (log_first.exp() * (log_first - teacher_first)).sum() + log_first.exp().detach() @ divergences
    wanted = torch.autograd.grad(beta * divergence, [first, second], retain_graph=True)

    answers, shares = [], []
    for v, w in itertools.product(range(3), repeat=2):
        log_p = torch.stack([log_first[v], log_second[v, w]])
        teacher = [teacher_first[v].item(), teacher_second[v, w].item()]
        advantage = teacher_advantages(teacher, log_p.detach().numpy(), beta)
        answers.append(Answer(log_p, *[log_p.detach()] * 3, advantage))
        shares.append(log_p.detach().sum().exp())
    config = PolicyConfig(loss_agg_mode=LossAggregation.seq_mean_token_sum)
    found = update(answers, config, batches(answers, config, rows=[[[*range(9)]]], seq_length=40))
    # The loss is the mean over 9 answers; here each counts by its probability.
    expected = sum(
        9 * share * (gradient @ answer.log_p)
        for share, gradient, answer in zip(shares, found.gradients, answers, strict=True)
    )
    for gradient, exact in zip(torch.autograd.grad(expected, [first, second]), wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_a_loss_announces_what_it_reports() -> None:
    for settings in VARIANTS.values():
        config, answers = PolicyConfig(**settings), random_answers([2, 2])
        loss = policy_loss(config)
        (values,) = batches(answers, config, rows=[[[0, 1]]], seq_length=8)
        assert loss.compute(values).report.keys() == {*loss.totals, *loss.per_sample}
