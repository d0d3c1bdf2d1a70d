"""Deliberate small errors, each of which some test of the ladder must see.

``CheckpointError``: in what our side is given, one number of the config or the values of some tensors.
``CODE_ERRORS``: in the code, as context managers; what they break is put back on leaving.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from parity_tests.checkpoints import QWEN2, V3, altered_copy


@contextmanager
def bias_in_the_weights() -> Iterator[None]:
    """The selection bias is added to the scores that become weights."""
    from megatron.core.transformer.moe import router

    right = router.topk_routing_with_score_function

    def wrong(logits: Tensor, *args: Any, expert_bias: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _, map_TE = right(logits, *args, expert_bias=expert_bias, **kwargs)
        scores_TE = (logits.sigmoid() + (0 if expert_bias is None else expert_bias)) * map_TE
        return scores_TE / scores_TE.sum(-1, keepdim=True) * kwargs["scaling_factor"], map_TE

    with patch.object(router, "topk_routing_with_score_function", wrong):
        yield


@contextmanager
def bias_rounded_to_bf16() -> Iterator[None]:
    """The selection bias loses its FP32 digits, as under a wrapper that rounds every buffer."""
    from megatron.core.transformer.moe import router

    right = router.topk_routing_with_score_function

    def wrong(logits: Tensor, *args: Any, expert_bias: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = None if expert_bias is None else expert_bias.bfloat16().float()
        return right(logits, *args, expert_bias=rounded, **kwargs)

    with patch.object(router, "topk_routing_with_score_function", wrong):
        yield


@contextmanager
def weights_without_gradient() -> Iterator[None]:
    """The routing weights are cut off from autograd: logits stay right, the router no longer learns."""
    from megatron.core.transformer.moe import router

    right = router.topk_routing_with_score_function

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights_TE, map_TE = right(*args, **kwargs)
        return weights_TE.detach(), map_TE

    with patch.object(router, "topk_routing_with_score_function", wrong):
        yield


@contextmanager
def _attend_with(**changes: Callable[[Any], Any]) -> Iterator[None]:
    """Attention gets some of its keyword arguments changed."""
    from megatron_ads.models import attention

    right = attention.attend

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs | {name: change(kwargs[name]) for name, change in changes.items()})

    with patch.object(attention, "attend", wrong):
        yield


def samples_see_each_other() -> AbstractContextManager[None]:
    """Samples that share a packed row attend to each other."""
    return _attend_with(boundaries=lambda _: None)


def softmax_scale_rounded_to_bf16() -> AbstractContextManager[None]:
    """The factor on the attention scores, YaRN's mscale included, is rounded to BF16."""
    return _attend_with(scale=lambda scale: float(torch.tensor(scale).bfloat16()))


def softmax_scale_halved() -> AbstractContextManager[None]:
    """The factor on the attention scores is half of what it should be, about YaRN's mscale squared."""
    return _attend_with(scale=lambda scale: scale / 2)


@contextmanager
def replicated_gradients_not_summed() -> Iterator[None]:
    """Weights that tensor-parallel ranks hold whole keep each rank's own part of the gradient."""
    module = import_module("megatron.core.distributed.finalize_model_grads")  # the package has a function of this name

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with patch.object(module, "_allreduce_non_tensor_model_parallel_grads", nothing):
        yield


@contextmanager
def mtp_halves_swapped() -> Iterator[None]:
    """The MTP projection gets the hidden state first and the embedding second."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    def wrong(layer: Any, hidden_SBC: Tensor, embedding_SBC: Tensor) -> Tensor:
        joined = torch.cat((layer.hnorm(hidden_SBC), layer.enorm(embedding_SBC)), -1)
        return layer.eh_proj(joined)[0]

    with patch.object(MultiTokenPredictionLayer, "_concat_embeddings", wrong):
        yield


@contextmanager
def decay_in_the_gradient() -> Iterator[None]:
    """Weight decay is added to the gradient, as in the original Adam, in place of decoupled (AdamW)."""
    from megatron_ads.optim.adam import GroupStepAdamW

    right = GroupStepAdamW._update

    def wrong(self: Any, group: dict[str, Any], done: int) -> None:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=group["weight_decay"])
        right(self, group | {"weight_decay": 0.0}, done)

    with patch.object(GroupStepAdamW, "_update", wrong):
        yield


CODE_ERRORS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    one.__name__: one
    for one in (
        bias_in_the_weights,
        bias_rounded_to_bf16,
        weights_without_gradient,
        samples_see_each_other,
        softmax_scale_rounded_to_bf16,
        softmax_scale_halved,
        replicated_gradients_not_summed,
        mtp_halves_swapped,
        decay_in_the_gradient,
    )
}


Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointError:
    """One error; unset parts are left right."""

    config: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[Tensors], Tensors] | None = None

    def write(self, right: Path, target: Path) -> Path:
        """Write the checkpoint ``right`` with this error in it."""
        return altered_copy(right, target, config=self.config, weights=self.weights)


def _swap_gate_and_up(tensors: Tensors) -> Tensors:
    others = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return {re.sub("gate_proj|up_proj", lambda match: others[match[0]], name): t for name, t in tensors.items()}


def _flip_interleaving(tensors: Tensors) -> Tensors:
    return {name: _in_halves(name, tensor) for name, tensor in tensors.items()}


def _in_halves(name: str, tensor: Tensor) -> Tensor:
    """Store the rotary channels in halves (0 2 4 .. 1 3 5 ..) where the model takes them in pairs."""
    rope, nope = V3["qk_rope_head_dim"], V3["qk_nope_head_dim"]
    halves = torch.cat([torch.arange(0, rope, 2), torch.arange(1, rope, 2)])
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat([tensor[:-rope], tensor[-rope:][halves]])
    if name.endswith("q_b_proj.weight"):
        heads = tensor.view(V3["num_attention_heads"], nope + rope, -1)
        return torch.cat([heads[:, :nope], heads[:, nope:][:, halves]], dim=1).view(tensor.shape)
    return tensor


def _stack_by_projection(tensors: Tensors) -> Tensors:
    """Store queries, keys and values so that our side, which joins them by query group, gets them one after the other.

    That is what a conversion makes that knows only how gate and up are joined.
    """
    groups, wrong = QWEN2["num_key_value_heads"], dict(tensors)
    for query in [name for name in tensors if ".q_proj." in name]:
        names = [query.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        stacked = torch.cat([tensors[name] for name in names]).unflatten(0, (groups, -1))
        sizes = [tensors[name].size(0) // groups for name in names]
        parts = stacked.split(sizes, dim=1)
        wrong |= {name: part.flatten(0, 1) for name, part in zip(names, parts, strict=True)}
    return wrong


def _without_biases(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(t) if name.endswith(".bias") else t for name, t in tensors.items()}


STACKED_BY_PROJECTION = CheckpointError(weights=_stack_by_projection)
BIASES_LEFT_OUT = CheckpointError(weights=_without_biases)
LLAMA3_LEFT_OUT = CheckpointError(config={"rope_scaling": None})
MSCALE_LEFT_OUT = CheckpointError(config={"rope_scaling": V3["rope_scaling"] | {"mscale_all_dim": 0.0}})
YARN_LEFT_OUT = CheckpointError(config={"rope_scaling": None})
GROUP_LIMITS_OFF = CheckpointError(config={"n_group": 1, "topk_group": 1})
EPSILON_CHANGED = CheckpointError(config={"rms_norm_eps": 1e-5})
GATE_AND_UP_SWAPPED = CheckpointError(weights=_swap_gate_and_up)
INTERLEAVING_FLIPPED = CheckpointError(weights=_flip_interleaving)
SCALING_ROUNDED = CheckpointError(config={"routed_scaling_factor": float(torch.tensor(2.446).bfloat16())})
"""Moonlight's 2.446 becomes 2.453; the 2.5 of DeepSeek-V3 is the same in BF16."""
