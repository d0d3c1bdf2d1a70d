"""Multi-head latent attention with replicated down-projections, whose gradients are right under tensor parallelism."""

from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear


class LatentAttention(MLASelfAttention):
    """Megatron-Core's latent attention with every rank holding the two down-projections whole.

    Megatron's torch layers divide them over the tensor-parallel ranks, and megatron-core 0.16.1 then loses part of
    the gradient: the position part of the key is the same for all heads, so its gradient is a sum over the heads of
    all ranks, but gathering it passes back each rank's own part only. Replicated, as Transformer Engine has them,
    they work on this rank's tokens (sequence parallelism), and the gather of the key sums.
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, config.q_lora_rank, config)
        down = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config.hidden_size, down, config)


class ReplicatedLinear(torch.nn.Module):
    """A bias-free linear that every tensor-parallel rank holds whole and applies to its own tokens."""

    def __init__(self, inputs: int, outputs: int, config: MLATransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        # Megatron sums the gradients of marked parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state", None)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the product with the weight, and no bias."""
        return linear(x, self.weight), None

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
