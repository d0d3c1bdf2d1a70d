"""Estimators of the KL divergence against numbers worked out by hand, and in expectation against the divergence."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ads.config.rl import KlType
from megatron_ads.losses.kl import kl_estimate, rewards_with_kl

LN2 = math.log(2)


# pi/ref = 2: d = ln 2. k1 = d = 0.6931, k2 = d^2 / 2 = 0.2402, k3 = 1/2 + 0.6931 - 1 = 0.1931.
# By log pi: 1; d; 1 - ref/pi = 1/2.
@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [(KlType.k1, LN2, 1.0), (KlType.k2, LN2**2 / 2, LN2), (KlType.k3, LN2 - 0.5, 0.5)],
)
def test_an_estimate_and_its_gradient(kind: KlType, value: float, gradient: float) -> None:
    log_p = torch.tensor([-1.0], requires_grad=True)
    found = kl_estimate(log_p, log_p.detach() - LN2, kind)
    found.sum().backward()
    assert found.item() == pytest.approx(value)
    assert log_p.grad is not None
    assert log_p.grad.item() == pytest.approx(gradient)
    assert kl_estimate(log_p, log_p, kind).item() == 0


def test_k3_of_a_token_that_the_reference_much_prefers_is_limited() -> None:
    log_p = torch.tensor([-100.0, -5.0], requires_grad=True)  # exp(100) overflows; exp(5) - 5 - 1 = 142
    found = kl_estimate(log_p, torch.zeros(2), KlType.k3)
    found.sum().backward()
    assert found.tolist() == [10, 10]
    assert log_p.grad is not None
    assert log_p.grad.tolist() == [0, 0]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("kind", KlType)
def test_the_gradient_in_expectation_is_that_of_the_divergence_named(kind: KlType) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 6, dtype=torch.float64, generator=draw)
    logits.requires_grad_()
    log_pi, log_ref = logits.log_softmax(-1), reference.log_softmax(-1)

    def gradient(value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        return found

    estimate = (log_pi.exp().detach() * kl_estimate(log_pi, log_ref, kind)).sum()
    to_reference, from_reference = _divergence(log_pi, log_ref), _divergence(log_ref, log_pi)
    wanted = {
        KlType.k1: torch.zeros(6, dtype=torch.float64),
        KlType.k2: gradient(to_reference),
        KlType.k3: gradient(from_reference),
    }
    torch.testing.assert_close(gradient(estimate), wanted[kind], rtol=1e-9, atol=1e-12)
    assert (estimate.item() == pytest.approx(to_reference.item(), rel=1e-9)) == (kind is not KlType.k2)


def test_the_divergence_of_an_answer_is_taken_from_its_reward() -> None:
    found = rewards_with_kl(np.array([1.0, float("nan"), 0.5]), np.array([2.0, 1.0, -1.0]), 0.1)
    assert found == pytest.approx([0.8, float("nan"), 0.6], nan_ok=True)
