"""How evenly the router spreads tokens over the experts of each layer."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.distributed import all_reduce


class ExpertLoad:
    """Counts the tokens each routed expert gets, from when it is made until ``measure``.

    Megatron-Core's own counters exist only with a router bias, and are cleared before a step can be reported.
    Shape suffixes: L = layers of the whole model with MTP, E = routed experts.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        """Watch the routers of this rank's chunks, wrapped or not; ranks without any take part all the same."""
        config = chunks[0].config
        layers = config.num_layers + (config.mtp_num_layers or 0)
        device = torch.device("cpu") if not torch.cuda.is_available() else torch.cuda.current_device()
        self._tokens_LE = torch.zeros(layers, config.num_moe_experts or 1, device=device)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        # Without gradients it is an evaluation, or the first of two passes of a recomputed layer.
        if torch.is_grad_enabled():
            self._tokens_LE[router.layer_number - 1] += output[1].sum(0)

    def measure(self) -> float:
        """Return the busiest expert's tokens over the average expert's, averaged over layers; then start again.

        1.0 is a perfect balance, the number of experts over those chosen per token the worst. A collective over the
        whole job: every rank calls it, and gets the same number (1.0 when no token was routed).
        """
        all_reduce(self._tokens_LE)
        routed_LE = self._tokens_LE[self._tokens_LE.sum(1) > 0]
        self._tokens_LE = torch.zeros_like(self._tokens_LE)
        if not len(routed_LE):
            return 1.0
        return float((routed_LE.amax(1) / routed_LE.mean(1)).mean())
