"""What transformers computes for a checkpoint: logits, layer outputs, routing, gradients, generated tokens.

Shape suffixes: B = rows, S = tokens of a row, C = hidden width, T = B * S, K = experts per token, E = experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conversion.names import parameters
from megatron_ads.architecture import read_model_shape
from megatron_ads.parity.reference import load_model
from parity_tests.machines import CPU_FP32, Machine
from parity_tests.passes import Pass, Routing


def load(folder: Path, machine: Machine = CPU_FP32) -> Any:
    """Load the checkpoint with transformers, eager attention; a weight that it would make up is an error."""
    return load_model(folder, machine.dtype, attention="eager").to(machine.device)


@torch.no_grad()
def forward(folder: Path, tokens_BS: Tensor, machine: Machine = CPU_FP32) -> Pass:
    """Run one pass and keep what every layer and every router gave."""
    model = load(folder, machine)
    with _recorded(model) as (layers, routing):
        logits = model(tokens_BS.to(machine.device)).logits
    return Pass(logits.float().cpu(), layers, routing)


@contextmanager
def _recorded(model: Any) -> Iterator[tuple[list[Tensor], list[Routing]]]:
    layers: list[Tensor] = []
    routing: list[Routing] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda _m, _i, output: layers.append(output.float().cpu())))
        if hasattr(layer.mlp, "gate"):
            hooks.append(
                layer.mlp.gate.register_forward_hook(lambda m, _i, output: routing.append(_routing(m, output)))
            )
    yield layers, routing
    for hook in hooks:
        hook.remove()


def _routing(router: Any, output: Any) -> Routing:
    logits_TE, weights_TK, experts_TK = output
    weights_TE = logits_TE.new_zeros(logits_TE.shape, dtype=torch.float32).scatter(1, experts_TK, weights_TK.float())
    return Routing(experts_TK.sort(dim=1).values.cpu(), weights_TE.cpu())


def gradients(
    folder: Path, rows: Sequence[dict[str, Any]], machine: Machine = CPU_FP32
) -> tuple[float, dict[str, Tensor]]:
    """Return the summed loss and, by canonical name, the gradient of its mean per target token.

    Every sample of a packed row is run alone, as if it had been a row of its own.
    """
    model = load(folder, machine)
    targets = sum(int(row["mask"].count_nonzero()) for row in rows)
    total = torch.zeros((), device=machine.device)
    for row in rows:
        total = total + sum(_sample_losses(model, on_device(row, machine)), torch.zeros_like(total))
    (total / targets).backward()
    shape = read_model_shape(folder)
    found = {}
    for name, parameter in parameters(shape).items():
        if not name.startswith("mtp.") and not name.endswith("expert_bias"):
            views = [hf_view(model, part.name, grad=True) for part in parameter.parts]
            found[name] = by_group(views, parameter.groups).float().cpu()
    return float(total.detach()), found


def by_group(tensors: Sequence[Tensor], groups: int) -> Tensor:
    """Stack tensors on dim 0, each cut into ``groups`` pieces: the first pieces of all, then the second ones."""
    pieces = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
    return torch.cat(pieces, dim=1).flatten(0, 1)


def on_device(row: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Return the row on the machine's device."""
    return {name: value.to(machine.device) for name, value in row.items()}


def _sample_losses(model: Any, row: dict[str, Any]) -> Iterator[Tensor]:
    starts = row["boundaries"].tolist()
    for begin, end in pairwise(starts):
        tokens, labels, mask = (row[name][..., begin:end] for name in ("tokens", "labels", "mask"))
        logits_SV = model(tokens).logits[0]
        yield (cross_entropy(logits_SV.float(), labels.flatten(), reduction="none") * mask.flatten()).sum()


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
def greedy_tokens(
    folder: Path, prompt_BS: Tensor, count: int, machine: Machine = CPU_FP32, *, use_cache: bool
) -> list[int]:
    """Return the ``count`` tokens that transformers generates behind the one prompt."""
    model = load(folder, machine)
    prompt_BS = prompt_BS.to(machine.device)
    output = model.generate(
        prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, prompt_BS.size(1) :].tolist()
