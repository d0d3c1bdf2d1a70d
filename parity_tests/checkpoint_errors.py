"""Deliberate small errors in what our side is given: one number of the config, or the values of some tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity_tests.checkpoints import V3, altered_copy

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


MSCALE_LEFT_OUT = CheckpointError(config={"rope_scaling": V3["rope_scaling"] | {"mscale_all_dim": 0.0}})
YARN_LEFT_OUT = CheckpointError(config={"rope_scaling": None})
GROUP_LIMITS_OFF = CheckpointError(config={"n_group": 1, "topk_group": 1})
EPSILON_CHANGED = CheckpointError(config={"rms_norm_eps": 1e-5})
GATE_AND_UP_SWAPPED = CheckpointError(weights=_swap_gate_and_up)
INTERLEAVING_FLIPPED = CheckpointError(weights=_flip_interleaving)
SCALING_ROUNDED = CheckpointError(config={"routed_scaling_factor": float(torch.tensor(2.446).bfloat16())})
"""Moonlight's 2.446 becomes 2.453; the 2.5 of DeepSeek-V3 is the same in BF16."""
