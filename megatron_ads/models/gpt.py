"""Megatron-Core's GPT model and multi-token-prediction layer, with what DeepSeek's training needs of them.

Multi-token prediction (MTP): DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from megatron_ads.models.lora import named_adapters


class DeepseekModel(GPTModel):
    """A ``GPTModel`` that runs its MTP layers only where they are trained.

    Megatron-Core 0.16.1 runs them in every pass and so cannot return logits without labels. Here they run in
    training passes with labels and a loss weight above 0; else they are only carried along.
    """

    trains_adapters = False
    """Low-rank adapters are trained and nothing else; some chunks may have none."""

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        """Return the loss of each label ``(B, S)``, or the logits ``(B, S, vocabulary)`` without labels."""
        if self.training and labels is not None and self.config.mtp_num_layers and self.config.mtp_loss_scaling_factor:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV, _ = self.output_layer(
            hidden_states, weight=weight, runtime_gather_output=others["runtime_gather_output"]
        )
        if labels is None:
            return logits_SBV.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits_SBV)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe what a training checkpoint holds of the chunk: all of it, or the adapters if they alone are trained.

        Frozen weights are read again from where they were loaded: a checkpoint of DeepSeek-R1's adapters is
        less than a hundredth of the model's.
        """
        if not self.trains_adapters:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        adapters = [adapter.sharded_factors(prefix + name) for name, adapter in named_adapters(self)]
        return {name: factor for factors in adapters for name, factor in factors.items()}


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
