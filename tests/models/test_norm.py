"""The norm against its definition, worked out by hand and differentiated by autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_ads.models.specs import RMSNorm


class _Config:
    use_cpu_initialization, sequence_parallel, params_dtype = True, True, torch.float32


def _norm(weights: list[float], eps: float) -> RMSNorm:
    norm = RMSNorm(_Config(), len(weights), eps=eps)  # type: ignore[arg-type]
    norm.weight.data.copy_(torch.tensor(weights))
    return norm


def test_norm_equals_its_definition() -> None:
    # mean of squares (4 + 4 + 4 + 2) / 4 = 3.5, plus 0.5: divided by 2
    x = torch.tensor([2.0, 2.0, -2.0, 2.0**0.5])
    expected = torch.tensor([1.0, 2.0, -3.0, 2 * 2.0**0.5])
    torch.testing.assert_close(_norm([1.0, 2.0, 3.0, 4.0], eps=0.5)(x), expected)


def test_gradients_are_those_of_the_definition_under_autograd() -> None:
    norm = _norm([1.0, -2.0, 3.0, 0.5, 1.5], eps=0.1)
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))

    def definition() -> Tensor:
        return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()

    for ours, plain in zip(
        *(torch.autograd.grad(f, (x, norm.weight), grad) for f in (norm(x), definition())), strict=True
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept_and_the_mean_is_fp32(dtype: torch.dtype) -> None:
    # 4096 squares of 1: a BF16 sum would stick at 256
    norm = RMSNorm(_Config(), 4096, eps=0.0).to(dtype)  # type: ignore[arg-type]
    assert norm(torch.ones(1, 4096, dtype=dtype)).eq(1).all()
    assert norm(torch.ones(1, 4096, dtype=dtype)).dtype is dtype
    assert norm.weight.sequence_parallel is True


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)], ids=str)
def test_torchs_norm_which_gpus_use_is_the_same(dtype: torch.dtype, tolerance: float) -> None:
    norm = _norm([1.0, -2.0, 3.0, 0.5, 1.5], eps=0.1).to(dtype)
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    torchs = rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    torch.testing.assert_close(torchs, norm(x), rtol=tolerance, atol=tolerance)
    assert torchs.dtype is dtype
