"""What replaces Megatron-Core's waiting functions returns their values, bit for bit, and asks the device for none."""

import importlib
import inspect
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ads.runtime import host_syncs

host_syncs.install()


def _replaced(module: str, name: str) -> tuple[Any, Any]:
    """Return the function that is used now, and Megatron's."""
    used = getattr(importlib.import_module(f"megatron.core.transformer.{module}"), name)
    assert used is not inspect.unwrap(used), f"{name} is not replaced"
    return used, inspect.unwrap(used)


class _CountReads(TorchDispatchMode):
    """Counts values that the host reads from a tensor."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def _boundaries(rng: random.Random, tokens: int) -> Tensor:
    inner = sorted(rng.sample(range(1, tokens), rng.randrange(0, 9)))
    return torch.tensor([0, *inner, tokens], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_samples_are_rolled_as_megatron_rolls_them_without_reading_their_boundaries(dtype: torch.dtype) -> None:
    ours, theirs = _replaced("multi_token_prediction", "_roll_tensor_packed_seq")
    rng = random.Random(0)
    for _ in range(50):
        packed = SimpleNamespace(cu_seqlens_q=_boundaries(rng, tokens=40))
        row = torch.randint(1, 1000, (1, 40)).to(dtype)
        expected, expected_sum = theirs(row, -1, -1, packed)
        with _CountReads() as counted:
            rolled, rolled_sum = ours(row, -1, -1, packed)
        assert counted.reads == 0
        assert torch.equal(rolled, expected) and torch.equal(rolled_sum, expected_sum)


@pytest.mark.parametrize("sizes", [[3, 0, 5, 2, 4, 1], [0, 0, 7, 0, 0, 0], [0] * 6], ids=str)
def test_chunks_are_sorted_as_megatron_sorts_them_forward_and_backward(sizes: list[int]) -> None:
    ours, theirs = _replaced("moe.token_dispatcher", "sort_chunks_by_idxs")
    order = torch.arange(6).reshape(2, 3).T.ravel()  # by expert, from by rank
    generator = torch.Generator().manual_seed(0)
    found = []
    for sort in (ours, theirs):
        generator.manual_seed(0)
        tokens = torch.randn(sum(sizes), 4, generator=generator).requires_grad_()
        weights = torch.rand(sum(sizes), generator=generator).requires_grad_()
        sorted_tokens, sorted_weights = sort(tokens, torch.tensor(sizes), order, probs=weights)
        (sorted_tokens * torch.arange(sum(sizes))[:, None] + sorted_weights[:, None].square()).sum().backward()
        found.append((sorted_tokens, sorted_weights, tokens.grad, weights.grad))
    for mine, megatrons in zip(*found, strict=True):
        assert torch.equal(mine, megatrons)
    assert ours(torch.zeros(sum(sizes), 4), torch.tensor(sizes), order)[1] is None
