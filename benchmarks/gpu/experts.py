"""Routed experts by themselves at DeepSeek-R1's widths, on even and uneven tokens, with memory full of NaN.

Shape suffixes: E = experts, T = tokens of the experts, sorted by expert, H = hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Record
from benchmarks.gpu.stacks import STACKS, one_rank
from benchmarks.gpu.timing import LIMITS, fill_free_memory_with_nan, host_waits, milliseconds
from megatron_ads.runtime.device import device


@dataclass(frozen=True, slots=True)
class _Experts:
    """A module of experts and what goes into it."""

    module: Any
    tokens_TH: Tensor
    weights_T: Tensor
    grad_TH: Tensor

    def run(self, counts_E: Tensor) -> list[Tensor]:
        """Return output, and gradients of tokens, routing weights and both expert weights."""
        output, _ = self.module(self.tokens_TH, counts_E, self.weights_T)
        inputs = (self.tokens_TH, self.weights_T, self.module.weight1, self.module.weight2)
        return [output, *torch.autograd.grad(output, inputs, self.grad_TH)]


def experts(record: Record) -> None:
    """Run the experts of one rank on balanced and unbalanced tokens, some experts without any, after filling memory
    with NaN."""
    module, hidden, inner = _build_experts(record.dry_run)
    count, tokens = module.num_local_experts, 64 if record.dry_run else 32768
    even = [tokens // count] * count
    ragged = [0, 1, 0, *even[3:]]
    ragged[-1] += tokens - sum(ragged)
    cases = {
        "balanced": even,
        "three experts with 0 or 1 token": ragged,
        "one expert has all tokens": [0] * (count - 1) + [tokens],
        "no tokens": [0] * count,
    }
    for name, counts in cases.items():
        with record.attempt(name):
            _expert_case(record, name, _with_tokens(module, sum(counts), hidden), counts)
    flops = 3 * 2 * tokens * 3 * hidden * inner
    full = _with_tokens(module, tokens, hidden)
    for name in ("balanced", "three experts with 0 or 1 token"):
        with record.attempt(f"time, {name}"):
            counts_E = torch.tensor(cases[name], device=device())
            spent = milliseconds(lambda counts_E=counts_E: full.run(counts_E))  # type: ignore[misc]
            rate = flops / spent * 1e3
            said = f"{name}: {spent:.1f} ms forward and backward, {rate / 1e12:.0f} TFLOP/s"
            record.figure(f"{name}: flops_per_second", rate, said)
            record.figure(f"{name}: host_waits", host_waits(lambda counts_E=counts_E: full.run(counts_E)))  # type: ignore[misc]


def _build_experts(tiny: bool) -> tuple[Any, int, int]:
    stack = STACKS["plain"].sized(tiny=tiny)
    one_rank()
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ads.models.experts import GroupedExperts

    shape = stack.shape
    module = GroupedExperts(shape.num_experts, stack.megatron_config(), ProcessGroupCollection.use_mpu_process_groups())
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=shape.hidden_size**-0.5)
    return module, shape.hidden_size, shape.expert_ffn_size


def _with_tokens(module: Any, tokens: int, hidden: int) -> _Experts:
    x, grad = (torch.randn(tokens, hidden, device=device()).to(torch.bfloat16) for _ in range(2))
    return _Experts(module, x.requires_grad_(), torch.rand(tokens, device=device()).requires_grad_(), grad)


def _expert_case(record: Record, name: str, given: _Experts, counts: list[int]) -> None:
    weights = (given.module.weight1, given.module.weight2)
    shapes = [tuple(tensor.shape) for tensor in (*weights, *weights, given.tokens_TH, given.tokens_TH)]
    fill_free_memory_with_nan(shapes, torch.bfloat16)
    found = given.run(torch.tensor(counts, device=device()))
    empty = torch.tensor(counts, device=device()) == 0
    for part, gradient in zip(("weight1", "weight2"), found[3:], strict=True):
        worst = float(gradient[empty].abs().max()) if bool(empty.any()) else 0.0
        record.check(worst == 0.0, f"{name}: experts without tokens get a gradient of {worst} in {part}, not 0")
    if not sum(counts):
        return
    names = ("output", "gradient of tokens", "gradient of routing weights", "gradient of weight1", "of weight2")
    errors = dict(zip(names, _expert_errors(found, given, counts), strict=True))
    for part, error in errors.items():
        record.figure(f"{name}: error of the {part}", error)
        record.check(error < LIMITS[torch.bfloat16], f"{name}: the {part} is off by {error:.1e}")


def _expert_errors(found: list[Tensor], given: _Experts, counts: list[int]) -> list[float]:
    """Return relative errors against a loop over the experts in FP32."""
    squares = torch.zeros(len(found), 2, dtype=torch.float64, device=device())  # of differences, and of what is wanted
    for expert, tokens in _segments(counts):
        inputs = [given.tokens_TH[tokens], given.weights_T[tokens]]
        inputs += [weight[expert] for weight in (given.module.weight1, given.module.weight2)]
        x, weight, w1, w2 = (each.detach().float().requires_grad_() for each in inputs)
        gate, up = (x @ w1.t()).chunk(2, dim=-1)
        output = (torch.nn.functional.silu(gate) * up * weight[:, None]) @ w2.t()
        wanted = [output, *torch.autograd.grad(output, (x, weight, w1, w2), given.grad_TH[tokens].float())]
        parts = [*(each[tokens] for each in found[:3]), *(each[expert] for each in found[3:])]
        for row, (got, want) in zip(squares, zip(parts, wanted, strict=True), strict=True):
            row[0] += (got.detach().double() - want.detach().double()).square().sum()
            row[1] += want.detach().double().square().sum()
    return [float(row[0].sqrt() / row[1].sqrt()) for row in squares]


def _segments(counts: list[int]) -> Iterator[tuple[int, slice]]:
    for expert, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if count:
            yield expert, slice(end - count, end)
