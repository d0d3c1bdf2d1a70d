"""``model.train_only: new_tokens``: train the rows of some tokens, and keep every other weight to the bit.

Embedding and output layer have one gradient buffer for all rows. After the reduction of each step the gradients of the
other rows are set to 0: Adam's moments of them stay 0, and without weight decay so does the update. Source: the
advertiser paper, section 3.5, phase 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.names import TOKEN_TABLES
from megatron_ads.models.weights import named_weights


def train_rows_alone(models: Sequence[GPTModel], ids: range, spec: LayerSpec) -> None:
    """Have every step leave gradients to the rows of ``ids`` alone. Call it once the gradient buffers are there."""
    kept: list[tuple[Tensor, slice]] = []
    rank = parallel_state.get_tensor_model_parallel_rank()
    for weight in named_weights(models, spec):
        if weight.canonical[0] in TOKEN_TABLES:
            rows = weight.tensor.size(0)  # of this rank: the vocabulary is divided over the tensor-parallel ranks
            first, end = (min(max(number - rank * rows, 0), rows) for number in (ids.start, ids.stop))
            kept += [(weight.tensor, slice(0, first)), (weight.tensor, slice(end, rows))]
    for config in {id(model.config): model.config for model in models}.values():
        config.finalize_model_grads_func = partial(_finalize, config.finalize_model_grads_func, kept)


def _finalize(
    finalize: Callable[..., None], kept: Sequence[tuple[Any, slice]], *arguments: Any, **keywords: Any
) -> None:
    finalize(*arguments, **keywords)
    for weight, rows in kept:
        weight.main_grad[rows].zero_()
