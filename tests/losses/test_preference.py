"""S-DPO and DPO: numbers worked out by hand, and an update in two passes against autograd through the formula."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ads.config.training import Normalize
from megatron_ads.data.packed_batch import PackedBatch
from megatron_ads.errors import DataError
from megatron_ads.losses.loss import TokenValues
from megatron_ads.losses.preference import (
    PREFERENCE,
    preference_coefficients,
    preference_metrics,
    preference_values,
)
from megatron_ads.rows import TokenizedRow

# Set 7, beta 1/2: log pi - log ref = 1, 0, -1, so s = 0.5, 0, -0.5 and sum exp(s) = 1.64872 + 1 + 0.60653 = 3.25525.
# The first is chosen: L = log 3.25525 - 0.5 = 0.68027; c = (1.64872, 1, 0.60653) / 3.25525 / 2 - (1/2, 0, 0).
# Set 3 is DPO: s = 0 and -0.5, the second is chosen: L = -log sigmoid(-0.5) = log(1 + exp(0.5)) = 0.97408;
# c = sigmoid(0.5) / 2 (1, -1).
POLICY = np.array([-1.0, -2, -4, -3, -5])
REFERENCE = np.array([-2.0, -2, -4, -2, -4])
SETS = np.array([7, 7, 3, 7, 3])
CHOSEN = np.array([1, 0, 0, 0, 1])


def test_the_loss_of_a_set_and_the_coefficient_of_an_answer() -> None:
    loss, coefficient = preference_coefficients(POLICY, REFERENCE, SETS, CHOSEN, 0.5)
    assert loss == pytest.approx([0.97408, 0.68027], rel=1e-5)
    half = 1 / (1 + math.exp(-0.5)) / 2
    total = 2 * 3.25525
    assert coefficient == pytest.approx([1.64872 / total - 0.5, 1 / total, half, 0.60653 / total, -half], rel=1e-5)


def test_metrics_are_means_over_sets() -> None:
    assert preference_metrics(POLICY, REFERENCE, SETS, CHOSEN, 0.5) == {
        "rewards/chosen": (0.5 - 0.5) / 2,
        "rewards/rejected": pytest.approx(((0 - 0.5) / 2 + 0) / 2),
        "rewards/margins": (0.5 - 0.5) / 2,  # 0.5 - 0 and -0.5 - 0
        "rewards/accuracies": 0.5,
    }


def test_scores_far_apart_stay_finite() -> None:
    loss, coefficient = preference_coefficients(
        np.array([-2000.0, 0.0]), np.zeros(2), np.zeros(2), np.array([True, False]), 1.0
    )
    assert loss.tolist() == [2000]
    assert coefficient.tolist() == [-1, 1]


@pytest.mark.parametrize(("chosen", "said"), [([1, 1, 0], "2 chosen and 1"), ([0, 0, 0], "0 chosen and 3")])
def test_a_set_without_one_chosen_answer_is_refused(chosen: Sequence[int], said: str) -> None:
    with pytest.raises(DataError, match=f"preference set 4 has {said} rejected"):
        preference_coefficients(np.zeros(3), np.zeros(3), np.full(3, 4), np.array(chosen), 0.1)
    with pytest.raises(DataError, match="preference set 4 has 1 chosen and 0 rejected"):
        preference_coefficients(np.zeros(1), np.zeros(1), np.full(1, 4), np.ones(1), 0.1)


ONE_MICROBATCH = [[[0, 1, 2], [3, 4]]]
THREE_MICROBATCHES = [[[3], [2]], [[4, 1], []], [[0], []]]  # sets are spread over them


def _reference_loss(log_p: Sequence[Tensor], beta: float) -> Tensor:
    """-log sigmoid(-log sum_d exp(...)), as the paper writes it, by autograd; the mean over sets."""
    scores = [beta * (each.sum() - ref) for each, ref in zip(log_p, REFERENCE, strict=True)]
    losses = []
    for number in np.unique(SETS):
        own = np.flatnonzero(number == SETS)
        (chosen,) = (place for place in own if CHOSEN[place])
        differences = torch.stack([scores[place] - scores[chosen] for place in own if place != chosen])
        losses.append(-torch.nn.functional.logsigmoid(-differences.exp().sum().log()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("rows", [ONE_MICROBATCH, THREE_MICROBATCHES])
def test_two_passes_have_the_gradient_of_the_formula_in_any_microbatches(
    rows: list[list[list[int]]],
) -> None:
    draw = torch.Generator().manual_seed(0)
    log_p = [(-torch.rand(length, generator=draw)).requires_grad_() for length in (3, 2, 6, 1, 4)]
    samples = []
    for each in log_p:
        tokens, weights = np.zeros((2, len(each) + 3))
        weights[3:] = 1
        samples.append(TokenizedRow("r", "test", tokens.astype(np.int32), weights.astype(np.float32)))
    policy = np.array([each.double().sum().item() for each in log_p])
    loss, coefficient = preference_coefficients(policy, REFERENCE, SETS, CHOSEN, 0.5)
    extra = preference_values(samples, loss, coefficient, SETS, CHOSEN)
    total, count = torch.zeros(()), 0
    for micro in rows:
        batch = PackedBatch.of(samples, micro, seq_length=20, normalize=Normalize.sample, extra=extra)
        log_p_BS = torch.full(batch.tokens_BS.shape, -9.0)
        for number in (number for row in micro for number in row):
            log_p_BS[(batch.sample_BS == number) & (batch.mask_BS != 0)] = log_p[number]
        values = TokenValues(
            negative_log_p_T=-log_p_BS.view(1, -1),
            mask_T=batch.mask_BS.view(1, -1),
            sample_T=batch.sample_BS.view(-1),
            step_samples=len(samples),
            normalizer=batch.normalizer,
            extra={name: values_BS.view(1, -1) for name, values_BS in batch.extra.items()},
        )
        found = PREFERENCE.compute(values)
        total, count = total + found.sum, count + found.count
    wanted = _reference_loss(log_p, 0.5)
    assert (total / count).item() == pytest.approx(wanted.item(), rel=1e-6)
    for gradient, expected in zip(
        torch.autograd.grad(total / count, log_p), torch.autograd.grad(wanted, log_p), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
