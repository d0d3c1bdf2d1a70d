"""The norm of gradients is right at any size, and a gradient that FP32 cannot hold is no update."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ads.optim.chain import OptimizerChain, UpdateReport
from megatron_ads.optim.members import gradient_statistics


@pytest.mark.parametrize("shape", [(7,), (1 << 18,), (3, 100_003), (100_000_000,)])
def test_a_norm_is_off_by_less_than_1e_7_at_any_size(shape: tuple[int, ...]) -> None:
    gradient = torch.full(shape, 0.1)
    expected = float(gradient.flatten()[0].double()) * math.sqrt(gradient.numel())
    assert math.sqrt(float(gradient_statistics([gradient])[0])) == pytest.approx(expected, rel=1e-12)
    if gradient.numel() == 100_000_000:  # the negative twin: torch's own norm, so that a sound one shows
        assert abs(float(gradient.norm()) / expected - 1) > 1e-7


def test_finite_gradients_whose_squares_fp32_cannot_hold_have_a_finite_norm() -> None:
    squares, not_finite, zeros = gradient_statistics([torch.tensor([3e22, 0.0]), torch.tensor([4e22])]).tolist()
    assert (squares**0.5, not_finite, zeros) == (pytest.approx(5e22), 0, 1)
    assert gradient_statistics([torch.tensor([1.0, math.nan, math.inf])])[1] == 2


class _Member:
    """A member with one gradient, which records what is done to it."""

    kind, updates = "dense", 0

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def prepare_gradients(self) -> None: ...

    def reduce_statistics(self) -> Tensor:
        return gradient_statistics([self.gradient])

    def scale_gradients(self, factor: float) -> None:
        self.gradient.mul_(factor)

    def update(self, learning_rate: float) -> None:
        self.updates += 1


@pytest.mark.parametrize(
    ("values", "clip", "updated"),
    [
        ([3.0, 4.0], 1.0, True),
        ([3e22, 4e22], 1.0, True),  # clipped, they are small
        ([3e22, 4e22], 0.0, False),  # their squares, AdamW's second moment, would be infinite
        ([3e38, 3e38], 1.0, False),  # 1 / norm is not in FP32's normal range
        ([math.inf, 1.0], 1.0, False),
        ([math.nan, 1.0], 0.0, False),
    ],
)
def test_an_update_is_made_only_of_gradients_that_adam_can_use(values: list[float], clip: float, updated: bool) -> None:
    member: Any = _Member(torch.tensor(values))
    chunks: Any = [SimpleNamespace(start_param_sync=lambda: None)]
    report: UpdateReport = OptimizerChain([member], chunks, clip_grad=clip).step(0.1)
    assert (report.updated, member.updates) == (updated, int(updated))
    if updated:
        torch.testing.assert_close(member.gradient, torch.tensor([0.6, 0.8]))
    else:
        torch.testing.assert_close(member.gradient, torch.tensor(values), equal_nan=True)
