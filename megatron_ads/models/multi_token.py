"""The multi-token-prediction layer (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor


class MultiTokenLayer(MultiTokenPredictionLayer):
    """Megatron-Core's layer, able to recompute its activations on packed rows.

    megatron-core 0.16.1 passes the sample boundaries through autograd's ``save_for_backward``, which takes only
    tensors, and dies with a TypeError.
    """

    def _checkpointed_forward(
        self, forward_func: Callable[..., Tensor], *, hidden_states: Tensor, decoder_input: Tensor, **others: Any
    ) -> Tensor:
        def run(hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
            return forward_func(hidden_states=hidden_states, decoder_input=decoder_input, **others)

        return tensor_parallel.checkpoint(run, False, hidden_states, decoder_input)
