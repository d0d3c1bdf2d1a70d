"""Entropy against numbers worked out by hand; of real models under several layouts in tests/training/test_step.py."""

import math

import pytest
import torch
from torch import Tensor

from megatron_ads.losses import entropy
from megatron_ads.losses.entropy import token_entropy
from parity_tests.harness.ranks import run_ranks


def _logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return (5 * torch.randn(7, 12, generator=torch.Generator().manual_seed(0))).to(dtype)


def test_entropy_is_in_nats() -> None:
    # Uniform over four: ln 4. p = 1/4 and 3/4: ln 4 / 4 + 3/4 ln(4/3) = 0.5623351. One certain token: 0.
    logits = torch.tensor([[7.0, 7, 7, 7], [0.0, math.log(3), -200, -200], [900.0, -900, 0, 0]])
    found = token_entropy(logits)
    assert found.tolist() == pytest.approx([math.log(4), 0.5623351, 0])
    assert not token_entropy(logits.requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_taken_a_few_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "_TOKENS_AT_ONCE", 3)
    logits = _logits(dtype)
    found = token_entropy(logits)
    wanted = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, _logits(dtype))


def _of_part() -> Tensor:
    import torch.distributed as dist

    return token_entropy(_logits().chunk(2, -1)[dist.get_rank()], dist.group.WORLD)


def test_ranks_with_parts_of_the_vocabulary_get_the_entropy_of_the_whole() -> None:
    for found in run_ranks(2, _of_part):
        torch.testing.assert_close(found, token_entropy(_logits()), rtol=1e-5, atol=1e-6)
