"""What transformers computes for a checkpoint: logits, layer outputs, routing, gradients, generated tokens.

Shape suffixes: B = rows, S = tokens of a row, C = hidden width, T = B * S, K = experts per token, E = experts.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from transformers import logging as transformers_logging

from conversion.names import parameters
from megatron_ads.architecture import read_model_shape

_CLASSES = {"deepseek_v2": DeepseekV2ForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM}


@dataclass(frozen=True, slots=True)
class Routing:
    """What one router did with every token."""

    experts_TK: Tensor
    """Sorted by number."""
    weights_TE: Tensor
    """Zero where an expert was not chosen."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    logits: Tensor
    """(B, S, vocabulary)."""
    layers: list[Tensor]
    """Output of each decoder layer, (B, S, C)."""
    routing: list[Routing]
    """Of each MoE layer."""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the checkpoint with transformers, eager attention, and refuse weights that it would make up."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model, report = _CLASSES[kind].from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    return model.eval()


@torch.no_grad()
def forward(folder: Path, tokens_BS: Tensor, dtype: torch.dtype = torch.float32) -> Pass:
    """Run one pass and keep what every layer and every router gave."""
    model = load(folder, dtype)
    with _recorded(model) as (layers, routing):
        logits = model(tokens_BS).logits
    return Pass(logits.float(), layers, routing)


@contextmanager
def _recorded(model: Any) -> Iterator[tuple[list[Tensor], list[Routing]]]:
    layers: list[Tensor] = []
    routing: list[Routing] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda _m, _i, output: layers.append(output.float())))
        if hasattr(layer.mlp, "gate"):
            hooks.append(
                layer.mlp.gate.register_forward_hook(lambda m, _i, output: routing.append(_routing(m, output)))
            )
    yield layers, routing
    for hook in hooks:
        hook.remove()


def _routing(router: Any, output: Any) -> Routing:
    logits_TE, weights_TK, experts_TK = output
    weights_TE = torch.zeros(logits_TE.shape).scatter(1, experts_TK, weights_TK.float())
    return Routing(experts_TK.sort(dim=1).values, weights_TE)


def gradients(folder: Path, rows: Sequence[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Return the summed loss and, by canonical name, the gradient of its mean per target token.

    Every sample of a packed row is run alone, as if it had been a row of its own.
    """
    model = load(folder)
    targets = sum(int(row["mask"].count_nonzero()) for row in rows)
    total = torch.zeros(())
    for row in rows:
        total = total + sum(_sample_losses(model, row), torch.zeros(()))
    (total / targets).backward()
    shape = read_model_shape(folder)
    found = {}
    for name, parameter in parameters(shape).items():
        if not name.startswith("mtp.") and not name.endswith("expert_bias"):
            found[name] = torch.cat([hf_view(model, part.name, grad=True) for part in parameter.parts])
    return float(total.detach()), found


def _sample_losses(model: Any, row: dict[str, Any]) -> Iterator[Tensor]:
    starts = row["boundaries"].tolist()
    for begin, end in pairwise(starts):
        tokens, labels, mask = (row[name][..., begin:end] for name in ("tokens", "labels", "mask"))
        logits_SV = model(tokens).logits[0]
        yield (cross_entropy(logits_SV, labels.flatten(), reduction="none") * mask.flatten()).sum()


def hf_view(model: Any, hf_name: str, *, grad: bool) -> Tensor:
    """Return a tensor of the checkpoint, or its gradient, where the loaded model keeps it (experts are stacked)."""
    if ".experts." not in hf_name or "shared_experts" in hf_name:
        return _value(model.get_parameter(hf_name), grad)
    prefix, _, rest = hf_name.partition(".experts.")
    number, projection, _ = rest.split(".")
    experts = model.get_submodule(f"{prefix}.experts")
    if projection == "down_proj":
        return _value(experts.down_proj, grad)[int(number)]
    gate, up = _value(experts.gate_up_proj, grad)[int(number)].chunk(2)
    return gate if projection == "gate_proj" else up


def _value(parameter: torch.nn.Parameter, grad: bool) -> Tensor:
    if not grad:
        return parameter.detach()
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


@torch.no_grad()
def greedy_tokens(folder: Path, prompt_BS: Tensor, count: int, *, cache: bool) -> list[int]:
    """Return the ``count`` tokens that transformers generates behind the one prompt."""
    model = load(folder)
    output = model.generate(
        prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=cache,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, prompt_BS.size(1) :].tolist()
