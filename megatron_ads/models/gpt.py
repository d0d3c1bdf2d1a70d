"""Megatron-Core's GPT model, able to leave its multi-token-prediction layers out of a pass."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor


class DeepseekModel(GPTModel):
    """A ``GPTModel`` that runs its MTP layers only where they are trained.

    Megatron-Core 0.16.1 runs them in every pass and so cannot return logits without labels. Here they run in
    training passes with labels and a loss weight above 0; else they are only carried along.
    """

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
