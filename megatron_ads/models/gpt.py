"""Megatron-Core's GPT model, able to leave its multi-token-prediction layers out of a pass, and weights untrained."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
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


def begin_gradients_at_embedding(chunk: GPTModel) -> None:
    """Have gradients flow through every layer of a chunk whose embedding is frozen.

    Layers that are computed again in the backward pass get gradients only if their input wants one, in megatron-core
    0.16.1 and in torch: without this, a frozen embedding silently stops the training of its whole pipeline stage.
    """
    if chunk.pre_process or chunk.mtp_process:
        chunk.embedding.register_forward_hook(_want_gradient)


def _want_gradient(_module: Any, _inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
