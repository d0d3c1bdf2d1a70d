"""The root-mean-square norm of every layer built without Transformer Engine."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.linalg import vecdot, vector_norm


class RMSNorm(torch.nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in FP32 whatever the dtype of ``x``.

    Built as Megatron-Core builds a norm. Under sequence parallelism each tensor-parallel rank sees a part of the
    tokens, so the weight is marked for Megatron to sum its gradient over those ranks; its own torch norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, in its shape and dtype."""
        return _Normalise.apply(x, self.weight, self.eps)


class _Normalise(torch.autograd.Function):
    """The norm in two passes over ``x``, and its gradient in four; torch's takes twice as many on a CPU.

    With n = x r, r = 1 / sqrt(mean(x^2) + eps) and g = weight * dy: dx = r (g - n mean(g n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean_square = vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1))
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        inner = grad.float() * weight
        mean = vecdot(inner, normal).div_(x.size(-1)).unsqueeze(-1)
        return torch.addcmul(inner, normal, mean, value=-1).mul_(scale).to(x.dtype), weight_grad, None
