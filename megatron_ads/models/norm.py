"""The root-mean-square norm of every layer built without Transformer Engine."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in FP32 whatever the dtype of ``x``.

    Built as Megatron-Core builds a norm. Under sequence parallelism each tensor-parallel rank sees a part of the
    tokens, so the weight is marked for Megatron to sum its gradient over those ranks; its own torch norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, in its shape and dtype."""
        normal = torch.nn.functional.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight * normal.to(x.dtype)
