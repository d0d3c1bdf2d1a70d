"""Advantages: how much better an answer is than the other answers to its prompt, or a token is to a teacher.

Shape suffixes: N = answers of the step; G = answers of one group that have a reward; T = tokens of one answer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import PolicyConfig

_EPSILON = 1e-6


def group_advantages(rewards_N: NDArray[Any], group_N: NDArray[Any], config: PolicyConfig) -> NDArray[np.float64]:
    """Return A_i of each answer, (N,).

    With mean and std of the G rewards of a group:

        A_i = r_i - mean                                  Dr. GRPO, arXiv:2503.20783
        A_i = (r_i - mean) / (std + 1e-6)                 ``norm_adv_by_std``: GRPO, arXiv:2402.03300, section 4.1.2
        A_i = r_i - sum_{j != i} r_j / (G - 1)            ``leave_one_out``: RLOO, arXiv:2402.14740
            = G / (G - 1) (r_i - mean)                    and with ``norm_adv_by_std`` this, divided likewise

    std is the unbiased one, with G - 1, and 1e-6 is verl's (``compute_grpo_outcome_advantage`` of 0.9.1,
    trainer/ppo/core_algos.py); TRL 1.16 has the same std and 1e-4. An answer whose reward is NaN is not in its group;
    its advantage is 0. So are those of a group without variance, and that of a single answer, which verl gives its
    reward.
    """
    advantages_N = np.zeros(len(rewards_N))
    for _, members in _groups(rewards_N, group_N):
        rewards_G = rewards_N[members].astype(np.float64)
        if not _varies(rewards_G):
            continue
        differences_G = rewards_G - rewards_G.mean()
        if config.leave_one_out:
            differences_G *= len(rewards_G) / (len(rewards_G) - 1)
        if config.norm_adv_by_std:
            differences_G /= rewards_G.std(ddof=1) + _EPSILON
        advantages_N[members] = differences_G
    return advantages_N


def teacher_advantages(
    teacher_log_p_T: Sequence[float] | None, old_log_p_T: NDArray[np.float32], kl_coef: float
) -> NDArray[np.float32]:
    """Return A_t of each token of an answer, (T,), by a teacher; 0 where it has said nothing.

    With pi_T the teacher, and pi_old the policy that answered:

        A_t = beta (log pi_T(o_t | o_<t) - log pi_old(o_t | o_<t))

    The gradient of -sum_t A_t log pi(o_t) is then, in expectation over o_t and at pi = pi_old, that of

        beta sum_t KL(pi(. | o_<t) || pi_T(. | o_<t))

    at the policy's own prefixes: generalised knowledge distillation on the student's answers alone (lambda = 1) by the
    reverse KL (arXiv:2306.13649, section 3). As there, no gradient goes through the drawing of the prefixes, that is,
    a token is not charged with the divergence of those behind it, as it is in MiniLLM (arXiv:2306.08543, equation 2).
    Source: "On-Policy Distillation", thinkingmachines.ai/blog/on-policy-distillation.

    Args:
        teacher_log_p_T: log pi_T, in nats; None: there is no teacher, or it failed for this answer.
        old_log_p_T: log pi_old, in nats.
        kl_coef: beta.
    """
    if teacher_log_p_T is None:
        return np.zeros_like(old_log_p_T)
    return np.float32(kl_coef) * (np.array(teacher_log_p_T, dtype=np.float32) - old_log_p_T)


def without_variance(rewards_N: NDArray[Any], group_N: NDArray[Any]) -> list[int]:
    """Return the numbers of the groups that teach nothing, ascending: all rewards equal, or fewer than two of them."""
    return [group for group, members in _groups(rewards_N, group_N) if not _varies(rewards_N[members])]


def _groups(rewards_N: NDArray[Any], group_N: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield each group's number, and the places of its answers that have a reward."""
    for group in np.unique(group_N):
        yield int(group), np.flatnonzero((group_N == group) & ~np.isnan(rewards_N))


def _varies(rewards_G: NDArray[Any]) -> bool:
    return len(rewards_G) > 1 and bool(rewards_G.min() < rewards_G.max())
