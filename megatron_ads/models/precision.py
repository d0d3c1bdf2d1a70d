"""BF16 models whose routing state stays FP32."""

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

_ROUTING_BUFFERS = ("expert_bias", "local_tokens_per_expert")


def wrap_precision(chunks: Sequence[GPTModel]) -> list[torch.nn.Module]:
    """Wrap each chunk to compute in BF16 and return FP32 losses; FP32 chunks are returned as they are.

    Megatron's wrapper also rounds the buffers: a router bias of 0.3711 becomes 0.3711 +- 0.001, and a count of
    tokens per expert sticks at 256. Both are kept FP32 here, before and after loading weights.
    """
    return [_wrap(chunk) if chunk.config.bf16 else chunk for chunk in chunks]


def _wrap(chunk: GPTModel) -> torch.nn.Module:
    kept = [
        (module, name, getattr(module, name))
        for module in chunk.modules()
        for name in _ROUTING_BUFFERS
        if getattr(module, name, None) is not None
    ]
    wrapped = Float16Module(chunk.config, chunk)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return wrapped
