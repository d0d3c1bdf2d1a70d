"""The loss of multi-token prediction (arXiv:2412.19437, equations 24 and 25), the same in every Megatron-Core.

Each target token counts the same, in every microbatch and under every layout: the losses are summed, and their gradient
is divided by the tokens of the step like that of the main loss. Megatron-Core 0.16 does so too. From 0.17 on it
multiplies each microbatch's by (targets / targets that have a successor), by which short samples would weigh more.
"""

from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from torch import Tensor


def add_mtp_losses(model: Any, hidden_SBH: Tensor, labels_BS: Tensor, mask_BS: Tensor | None, packed: Any) -> Tensor:
    """Return the decoder's output, in whose backward pass the MTP losses take part.

    Args:
        model: The chunk with the output layer.
        hidden_SBH: Outputs of the decoder and of each MTP layer, one behind the other on dim 0.
        mask_BS: Which labels count; None: all. MTP layer k looks at the label k places further, in the same sample.
        packed: Megatron's ``PackedSeqParams``, or None.
    """
    layers = model.config.mtp_num_layers
    output, *predictions = hidden_SBH.chunk(1 + layers)
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    mask_BS = torch.ones_like(labels_BS) if mask_BS is None else mask_BS
    for prediction in predictions:
        labels_BS, mask_BS = (
            roll_tensor(each, shifts=-1, dims=-1, cp_group=model.cp_group, packed_seq_params=packed)[0]
            for each in (labels_BS, mask_BS)
        )
        logits_SBV, _ = model.output_layer(prediction, weight=weight)
        losses_BS = mask_BS * model.compute_language_model_loss(labels_BS, logits_SBV)
        output = MTPLossAutoScaler.apply(output, losses_BS * (model.config.mtp_loss_scaling_factor / layers))
    return output
