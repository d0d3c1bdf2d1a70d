"""Policy losses of reinforcement learning: GRPO, GSPO and CISPO, with KL and a correction of the engine's numbers.

Shape suffixes: T = tokens of one microbatch; N = answers of the update, each a sample of the batch.

With m_t the weight of answer token t (0 elsewhere) and C the normaliser of the update, over all its microbatches and
replicas, ``L = 1/C sum_t m_t (w_t l_t + beta KL_t)``. In the papers' letters, rho_t = pi(o_t) / pi_old(o_t),
clip(x) = x limited to [1 - epsilon_low, 1 + epsilon_high], sg = without gradient:

    GRPO    l_t = -min(rho_t A, clip(rho_t) A)              arXiv:2402.03300, equation 3
            and where A < 0, with ``dual_clip`` c > 1:
            l_t = -max(min(rho_t A, clip(rho_t) A), c A)    arXiv:1912.09729, equation 5
    GSPO    as GRPO without c, with s_t in place of rho_t:  arXiv:2507.18071, equations 5 and 14
            s = exp(1/|o| sum_t log rho_t),  s_t = sg(s) pi(o_t) / sg(pi(o_t))
            (with seq-mean-token-mean, the paper's objective; other modes weigh the same gradients otherwise)
    CISPO   l_t = -sg(clip(rho_t)) A log pi(o_t)            arXiv:2506.13585, equation 4

    none    w_t = 1
    tis     w_t = min(r_t, C_is), r_t = pi_old(o_t) / pi_engine(o_t)
    icepop  w_t = r_t if 1/C_is <= r_t <= C_is, else 0      (the token still counts in C)

KL_t is in kl.py, and only here if ``kl_in`` is loss. log rho_t is limited to [-20, 20].
Source: ``compute_policy_loss_vanilla``, ``_gspo`` and ``_cispo`` of verl 0.9.1, trainer/ppo/core_algos.py.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_ads.config.rl import ImportanceSampling, KlPlace, LossAggregation, PolicyConfig, PolicyLoss
from megatron_ads.config.training import Normalize
from megatron_ads.losses.kl import kl_estimate
from megatron_ads.losses.loss import Loss, LossValues, TokenValues

ADVANTAGES = "advantages"
OLD = "old_log_p"
"""The trainer's log-probabilities before the first update on these answers."""
REFERENCE = "reference_log_p"
"""Needed if ``kl_coef`` is above 0 and ``kl_in`` is loss."""
ENGINE = "engine_log_p"
"""Needed if ``importance_sampling`` is not none."""

_TOTALS = ("pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "ratio", "answers")
_MAX_RATIO = "max_ratio"


def normalize_of(mode: LossAggregation) -> Normalize:
    """Return what the batches of ``mode`` are normalised by: the answer tokens of the update, or its answers."""
    return Normalize.token if mode is LossAggregation.token_mean else Normalize.sample


def answer_weight(mode: LossAggregation, answer_tokens: int, max_new_tokens: int) -> float:
    """Return the loss weight of each token of an answer, so that batches normalised by ``normalize_of(mode)`` give

        token-mean               1 / (tokens of all answers)  sum_it l_it
        seq-mean-token-sum       1/N sum_i               sum_t l_it
        seq-mean-token-mean      1/N sum_i 1/|o_i|       sum_t l_it
        seq-mean-token-sum-norm  1/N sum_i 1/max_new_tokens sum_t l_it

    with N the answers of the update that have a weight. Source: ``agg_loss`` of verl 0.9.1, trainer/ppo/core_algos.py,
    with its normalisers of the global batch.
    """
    if mode is LossAggregation.seq_mean_token_sum:
        return float(answer_tokens)  # a batch divides it by as much
    if mode is LossAggregation.seq_mean_token_sum_norm:
        return answer_tokens / max_new_tokens
    return 1.0


def policy_loss(config: PolicyConfig) -> Loss:
    """Return the objective of an update on rollouts.

    Totals, each a sum that :func:`policy_metrics` divides: ``pg_loss`` and ``kl_loss`` (weighted like the loss, without
    beta), ``pg_clipfrac``, ``pg_clipfrac_lower``, ``ppo_kl``, ``ratio``, ``importance_weight`` (answer tokens),
    ``answers`` (their number). ``kl_loss`` and ``importance_weight`` are there if the settings have them.
    Of each answer: ``max_ratio``.
    """
    totals = [*_TOTALS]
    if _has_kl(config):
        totals.append("kl_loss")
    if config.importance_sampling is not ImportanceSampling.none:
        totals.append("importance_weight")
    return Loss(compute=partial(_compute, config=config), totals=tuple(totals), per_sample=(_MAX_RATIO,))


def policy_metrics(
    config: PolicyConfig, totals: Mapping[str, float], per_sample: Mapping[str, Sequence[float]], loss_tokens: int
) -> dict[str, float]:
    """Return the metrics of an update by verl's names, from the ``StepReport`` of :func:`policy_loss`."""
    tokens, answers = max(loss_tokens, 1), max(totals["answers"], 1.0)
    normalizer = tokens if normalize_of(config.loss_agg_mode) is Normalize.token else answers
    weighted = {"pg_loss", "kl_loss"}
    means = {name: total / (normalizer if name in weighted else tokens) for name, total in totals.items()}
    del means["answers"]
    return {f"actor/{name}": value for name, value in means.items()} | {
        "actor/max_ratio": max(per_sample[_MAX_RATIO], default=0.0)
    }


def _has_kl(config: PolicyConfig) -> bool:
    return config.kl_coef > 0 and config.kl_in is KlPlace.loss


def _compute(values: TokenValues, *, config: PolicyConfig) -> LossValues:
    mask_T = values.mask_T
    counted_T = mask_T != 0
    log_p_T = -values.negative_log_p_T.float()
    # Elsewhere there may be no log-probability of another policy.
    log_rho_T = torch.where(counted_T, log_p_T - values.extra[OLD], 0.0)
    ratio_T = _ratio(log_p_T, log_rho_T, counted_T, values, config)
    loss_T, clipped_T, clipped_lower_T = _clipped_loss(ratio_T, log_p_T, values.extra[ADVANTAGES], config)
    per_token = {
        "pg_clipfrac": clipped_T, "pg_clipfrac_lower": clipped_lower_T, "ppo_kl": -log_rho_T.clamp(-20, 20),
        "ratio": ratio_T,
    }  # fmt: skip
    if config.importance_sampling is not ImportanceSampling.none:
        weight_T = _importance_weight(torch.where(counted_T, values.extra[OLD] - values.extra[ENGINE], 0.0), config)
        loss_T, per_token["importance_weight"] = weight_T * loss_T, weight_T
    report = {name: (each_T.detach() * counted_T).sum() for name, each_T in per_token.items()}
    total = (mask_T * loss_T).sum()
    report["pg_loss"] = total.detach()
    if _has_kl(config):
        reference_T = torch.where(counted_T, values.extra[REFERENCE], log_p_T.detach())
        kl_sum = (mask_T * kl_estimate(log_p_T, reference_T, config.kl_loss_type)).sum()
        report["kl_loss"], total = kl_sum.detach(), total + config.kl_coef * kl_sum
    report |= _of_answers(ratio_T.detach() * counted_T, counted_T, values)
    return LossValues(sum=total, count=values.normalizer, report=report)


def _ratio(log_p_T: Tensor, log_rho_T: Tensor, counted_T: Tensor, values: TokenValues, config: PolicyConfig) -> Tensor:
    """Return rho_t, or s_t of GSPO, (1, T), with the gradient."""
    if config.loss is PolicyLoss.gspo:
        # No sample is split over microbatches. FP64: on a GPU the order of the sum varies.
        sums_N = torch.zeros(2, values.step_samples, dtype=torch.float64, device=log_p_T.device)
        sums_N.index_add_(1, values.sample_T, torch.cat([log_rho_T.detach(), counted_T]).double())
        log_s_N = (sums_N[0] / sums_N[1].clamp(min=1)).float()
        log_rho_T = log_p_T - log_p_T.detach() + log_s_N[values.sample_T]
    return log_rho_T.clamp(-20, 20).exp()


def _clipped_loss(
    ratio_T: Tensor, log_p_T: Tensor, advantage_T: Tensor, config: PolicyConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return l_t, and where it is clipped and where by ``dual_clip``; (1, T) each."""
    clip_T = ratio_T.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    nowhere_T = torch.zeros_like(ratio_T, dtype=torch.bool)
    if config.loss is PolicyLoss.cispo:
        return -clip_T.detach() * advantage_T * log_p_T, clip_T != ratio_T, nowhere_T
    plain_T, limited_T = -ratio_T * advantage_T, -clip_T * advantage_T
    loss_T, clipped_T = torch.maximum(plain_T, limited_T), limited_T > plain_T
    if config.dual_clip is None:
        return loss_T, clipped_T, nowhere_T
    most_T = -config.dual_clip * advantage_T
    lower_T = (advantage_T < 0) & (loss_T > most_T)
    return torch.where(lower_T, most_T, loss_T), clipped_T, lower_T


def _importance_weight(log_r_T: Tensor, config: PolicyConfig) -> Tensor:
    """Return w_t, (1, T), without gradient."""
    r_T, cap = log_r_T.clamp(-20, 20).exp(), config.importance_cap
    if config.importance_sampling is ImportanceSampling.tis:
        return r_T.clamp(max=cap)
    return torch.where((r_T >= 1 / cap) & (r_T <= cap), r_T, 0.0)


def _of_answers(ratio_T: Tensor, counted_T: Tensor, values: TokenValues) -> dict[str, Tensor]:
    """Return the largest ratio of each answer, (N,), 0 where another microbatch has it; and how many are here."""
    largest_2N = ratio_T.new_zeros(2, values.step_samples)
    largest_2N.scatter_reduce_(1, values.sample_T.expand(2, -1), torch.cat([ratio_T, counted_T]), "amax")
    return {_MAX_RATIO: largest_2N[0], "answers": largest_2N[1].sum()}
