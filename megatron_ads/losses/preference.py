"""S-DPO, and DPO, which is S-DPO with one rejected answer.

S-DPO is arXiv:2406.09215, equation 11, DPO arXiv:2305.18290, equation 7. For a prompt x_u with a chosen answer e_p and
rejected answers e_d, and summed log-probabilities of whole answers:

    L = -log sigmoid(-log sum_d exp(beta log pi(e_d | x_u) / ref(e_d | x_u) - beta log pi(e_p | x_u) / ref(e_p | x_u)))

With s_i = beta (log pi(e_i) - log ref(e_i)) of every answer of a set this is the cross-entropy of choosing e_p by a
softmax over the set: L = log sum_i exp(s_i) - s_p. So dL / d log pi(e_i) is a number for each answer,

    c_i = beta (exp(s_i) / sum_j exp(s_j) - [i = p])

An update has two passes, which is exact whatever microbatches, replicas and pipeline stages the answers of a set are
on:

1. ``training.step.run_log_probabilities`` of all answers; :func:`preference_coefficients` of their sums over the answer
   (the reference's sums are computed once, before training).
2. ``run_step`` with the loss :data:`PREFERENCE` on batches with ``Normalize.sample``, loss weight 1 on every answer
   token and what :func:`preference_values` returns as ``extra``: sum_i c_i log pi(e_i) has the gradient of L.

Shape suffixes: N = answers of the update, each a sample of its batches; S = its sets; T = tokens of a microbatch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ads.errors import DataError
from megatron_ads.losses.loss import Loss, LossValues, TokenValues
from megatron_ads.rows import TokenizedRow

COEFFICIENT = "preference_coefficient"
SET_LOSS = "preference_loss"

Floats = NDArray[np.float64]


def preference_coefficients(
    policy_logp_N: Floats, reference_logp_N: Floats, set_N: NDArray[Any], chosen_N: NDArray[Any], beta: float
) -> tuple[Floats, Floats]:
    """Return L of each set, (S,), sets by ascending number, and c_i of each answer, (N,).

    Args:
        policy_logp_N: Nats over all tokens of each answer.
        set_N: The set of each answer.
        chosen_N: Whether it is e_p.

    Raises:
        DataError: If a set has not exactly one chosen answer, or no rejected one.
    """
    numbers_S, place_N = np.unique(set_N, return_inverse=True)
    chosen_N = chosen_N.astype(bool)
    chosen_S, size_S = np.bincount(place_N[chosen_N], minlength=len(numbers_S)), np.bincount(place_N)
    for number, chosen, size in zip(numbers_S, chosen_S, size_S, strict=True):
        if chosen != 1 or size < 2:
            raise DataError(
                f"preference set {number} has {chosen} chosen and {size - chosen} rejected answers. Give it exactly "
                "one chosen answer and at least one rejected."
            )
    score_N = beta * (policy_logp_N.astype(np.float64) - reference_logp_N)
    log_sum_S = np.full(len(numbers_S), -np.inf)
    np.logaddexp.at(log_sum_S, place_N, score_N)
    loss_S = np.empty(len(numbers_S))
    loss_S[place_N[chosen_N]] = log_sum_S[place_N[chosen_N]] - score_N[chosen_N]
    return loss_S, beta * (np.exp(score_N - log_sum_S[place_N]) - chosen_N)


def preference_metrics(
    policy_logp_N: Floats, reference_logp_N: Floats, set_N: NDArray[Any], chosen_N: NDArray[Any], beta: float
) -> dict[str, float]:
    """Return TRL's metrics, means over sets: the answers' implicit rewards s_i, and how often s_p is the highest.

    A set's rejected answers count with their mean, but the margin and accuracy are against the best of them.
    """
    score_N, chosen_N = beta * (policy_logp_N - reference_logp_N), chosen_N.astype(bool)
    sets = [set_N == number for number in np.unique(set_N)]
    chosen_S = np.array([score_N[own & chosen_N].item() for own in sets])
    rejected_S = np.array([score_N[own & ~chosen_N].mean() for own in sets])
    margin_S = chosen_S - np.array([score_N[own & ~chosen_N].max() for own in sets])
    values = {"chosen": chosen_S, "rejected": rejected_S, "margins": margin_S, "accuracies": margin_S > 0}
    return {f"rewards/{name}": float(np.mean(value_S)) for name, value_S in values.items()}


def preference_values(
    rows: Sequence[TokenizedRow], loss_S: Floats, coefficient_N: Floats, set_N: NDArray[Any], chosen_N: NDArray[Any]
) -> dict[str, list[NDArray[np.float32]]]:
    """Return the ``extra`` of the update's batches: the same numbers at every label of an answer.

    Batches with ``Normalize.sample`` divide by N; L is the mean over sets, so both are multiplied by N / S. The loss of
    a set is told once, at its chosen answer.
    """
    scale = len(rows) / len(loss_S)
    place_N = np.unique(set_N, return_inverse=True)[1]
    told_N = np.where(chosen_N.astype(bool), loss_S[place_N], 0.0)
    return {
        name: [np.full(row.predictions, scale * value, np.float32) for row, value in zip(rows, values_N, strict=True)]
        for name, values_N in ((COEFFICIENT, coefficient_N), (SET_LOSS, told_N))
    }


def _compute(values: TokenValues) -> LossValues:
    """Return a sum whose value is that of the sets' losses, and whose gradient is that of sum_i c_i log pi(e_i)."""
    counted_T = values.mask_T != 0
    term = -(values.extra[COEFFICIENT] * torch.where(counted_T, values.negative_log_p_T.float(), 0.0)).sum()
    told = (values.extra[SET_LOSS] * values.mask_T).sum()  # the mask has 1 / tokens of the answer at each of them
    return LossValues(sum=told + term - term.detach(), count=values.normalizer)


PREFERENCE = Loss(compute=_compute)
"""The mean of L over the sets of an update."""
