"""Attention within samples against a plain computation in double precision, forward and backward."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ads.models.attention import (
    BLOCK,
    LONGEST_BLOCKED,
    _attend_varlen,
    attend,
    make_heads,
)

TOLERANCE = 2e-5
"""FP32 against FP64, values and gradients up to 10."""
SCALE = 0.2


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(scale Q K^T) V in FP64, with a mask that says who may see whom."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (sample[:, None] == sample) & torch.ones(len(sample), len(sample)).tril().bool()
    scores = SCALE * query.double() @ key.double().transpose(2, 3)
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ value.double()


def _results(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    output_grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, output_grad)]


def _error(lengths: tuple[int, ...], *, width: int = 12, value_width: int = 8, seen_as: tuple[int, ...] = ()) -> float:
    total = sum(lengths)
    inputs = _random(1, 2, total, width), _random(1, 2, total, width, seed=1), _random(1, 2, total, value_width, seed=2)
    boundaries = torch.tensor((0, *(seen_as or lengths))).cumsum(0).to(torch.int32)
    ours = _results(attend(*inputs, scale=SCALE, boundaries=boundaries), inputs)
    plain = _results(_plain(*inputs, lengths), inputs)
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    "lengths",
    [(5,), (1, 1, 3), (BLOCK,), (BLOCK + 1, 2), (BLOCK - 1, 2 * BLOCK + 7), (LONGEST_BLOCKED + 3, 4)],
    ids=str,
)
def test_packed_attention_equals_a_masked_softmax(lengths: tuple[int, ...]) -> None:
    assert _error(lengths) < TOLERANCE


def test_values_as_wide_as_keys_are_served_too() -> None:
    assert _error((9, 30), width=8, value_width=8) < TOLERANCE


def test_a_boundary_in_the_wrong_place_is_seen() -> None:
    assert _error((5, 4), seen_as=(6, 3)) > 1000 * TOLERANCE


def test_rows_without_boundaries_are_one_sample_each() -> None:
    inputs = _random(3, 2, 20, 12), _random(3, 2, 20, 12, seed=1), _random(3, 2, 20, 8, seed=2)
    ours = attend(*inputs, scale=SCALE)
    assert float((ours - _plain(*inputs, (20,))).detach().abs().max()) < TOLERANCE


@pytest.mark.parametrize("longest", [0, 10_000], ids=["torch kernel", "blocks"])
def test_both_kernels_give_the_same(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ads.models.attention.LONGEST_BLOCKED", longest)
    assert _error((200, 30)) < TOLERANCE


def test_heads_are_rotated_by_the_angle_of_their_position() -> None:
    # one head, two plain channels, one pair with positions; position 1 turns by 90 degrees: (1, 0) -> (0, 1)
    query = torch.tensor([[7.0, 8.0, 1.0, 0.0], [7.0, 8.0, 1.0, 0.0]]).view(2, 1, 1, 4)
    key_value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).view(2, 1, 1, 3)
    key_position = torch.tensor([[0.0, 2.0], [0.0, 2.0]]).view(2, 1, 2)
    turns = torch.polar(torch.ones(2), torch.tensor([0.0, math.pi / 2])).view(2, 1, 1)
    q, k, v = make_heads(query, key_value, key_position, turns)
    torch.testing.assert_close(q[0, 0], torch.tensor([[7.0, 8.0, 1.0, 0.0], [7.0, 8.0, 0.0, 1.0]]))
    torch.testing.assert_close(k[0, 0], torch.tensor([[1.0, 2.0, 0.0, 2.0], [4.0, 5.0, -2.0, 0.0]]))
    torch.testing.assert_close(v[0, 0], torch.tensor([[3.0], [6.0]]))


def test_the_kernel_of_gpus_is_told_the_longest_sample_and_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(q: Tensor, k: Tensor, v: Tensor, *where: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
        starts_q, starts_k, longest_q, longest_k = where
        assert starts_q is starts_k is boundaries and (longest_q, longest_k, window_size) == (4, 4, (-1, 0))
        assert v.shape == q.shape  # the kernel takes heads of one width
        return v

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    boundaries = torch.tensor([0, 3, 7, 8], dtype=torch.int32, device="meta")  # whose values cannot be read
    heads = [torch.empty(1, 2, 8, width, device="meta") for width in (12, 12, 8)]
    assert _attend_varlen(*heads, SCALE, boundaries, 4).shape == (1, 2, 8, 8)
