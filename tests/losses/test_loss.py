"""Cross-entropy of one microbatch against numbers worked out by hand, and names that a loss may not report."""

import pytest
import torch

from megatron_ads.losses.loss import CROSS_ENTROPY, SAMPLE_LOSSES, Loss, TokenValues


def _values() -> TokenValues:
    """Two of the three samples of a step; a prompt token, and padding whose value must not count."""
    return TokenValues(
        negative_log_p_T=torch.tensor([[1.0, 2.0, 4.0, 8.0, 100.0]], requires_grad=True),
        mask_T=torch.tensor([[0.0, 1.0, 0.5, 2.0, 0.0]]),
        sample_T=torch.tensor([2, 2, 2, 0, 0]),
        step_samples=3,
        normalizer=7,
    )


def test_the_sum_is_weighted_and_the_losses_of_samples_are_not() -> None:
    found = CROSS_ENTROPY.compute(_values())
    assert found.sum.item() == 1 * 2 + 0.5 * 4 + 2 * 8
    assert found.count == 7
    assert found.report.keys() == {*CROSS_ENTROPY.totals, *CROSS_ENTROPY.per_sample}
    assert found.report[SAMPLE_LOSSES].tolist() == [8.0, 0.0, 2.0 + 4.0]


def test_the_gradient_of_a_token_is_its_weight() -> None:
    values = _values()
    CROSS_ENTROPY.compute(values).sum.backward()
    assert values.negative_log_p_T.grad is not None
    assert values.negative_log_p_T.grad.tolist() == [[0.0, 1.0, 0.5, 2.0, 0.0]]


@pytest.mark.parametrize("reports", [{"totals": ("tokens",)}, {"per_sample": ("loss_sum",)}, {"totals": ("a", "a")}])
def test_a_report_whose_name_is_taken_is_refused(reports: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match="would overwrite"):
        Loss(compute=CROSS_ENTROPY.compute, **reports)
