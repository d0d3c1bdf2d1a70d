"""A linear layer that every tensor-parallel rank holds whole."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear


class ReplicatedLinear(torch.nn.Module):
    """A bias-free linear that a tensor-parallel rank applies to its own tokens, as sequence parallelism gives it."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        # Megatron sums the gradients of marked parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state", None)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the weight."""
        return linear(x, self.weight)

    def get_extra_state(self) -> None:
        """Keep the empty entry that every linear of Megatron-Core has in a checkpoint."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore it."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe the weight to a distributed checkpoint: the same on every tensor-parallel rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )
