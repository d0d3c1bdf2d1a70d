"""Estimators of KL(pi || ref) from the tokens that pi drew (http://joschu.net/blog/kl-approx.html).

With d = log pi(o_t) - log ref(o_t) of a token o_t drawn from pi:

    estimator                 value in expectation           gradient, and what it is in expectation
    k1  d                     KL(pi || ref)                  grad log pi: 0, so in a loss it holds nothing back
    k2  d^2 / 2               KL(pi || ref) to second order  d grad log pi: of KL(pi || ref)
    k3  exp(-d) + d - 1       KL(pi || ref), never negative  (1 - ref/pi) grad log pi: of KL(ref || pi)

In the reward no gradient is taken, and k1 and k3 are both unbiased there.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.config.rl import KlType


def kl_estimate(log_p: Tensor, reference_log_p: Tensor, kind: KlType) -> Tensor:
    """Return an estimate of KL(pi || ref) in nats for each token, in the shape of ``log_p``, with its gradient.

    k3 is limited to 10, where its gradient ends. Source: ``kl_penalty`` of verl 0.9.1, trainer/ppo/core_algos.py,
    and DeepSeekMath, arXiv:2402.03300, equation 4.
    """
    d = log_p - reference_log_p
    if kind is KlType.k1:
        return d
    if kind is KlType.k2:
        return d.square() / 2
    d = d.clamp(-20, 20)  # exp(-d) stays finite
    return (torch.exp(-d) + d - 1).clamp(max=10)


def rewards_with_kl(rewards_N: NDArray[Any], kl_N: NDArray[Any], kl_coef: float) -> NDArray[Any]:
    """Return R_i = r_i - beta sum_t KL_it, to be compared within groups afterwards; (N,). NaN stays NaN.

    Args:
        kl_N: The sum of ``kl_estimate`` over the tokens of each answer.

    Source: ``apply_kl_penalty`` of verl 0.9.1, trainer/ppo/ray_trainer.py, summed over an answer.
    """
    return rewards_N - kl_coef * kl_N
