"""Norms, rotations, activations and the loss at DeepSeek-R1's widths, next to what torch and Megatron-Core have."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.record import Record
from benchmarks.gpu.stacks import STACKS, Stack, one_rank
from benchmarks.gpu.timing import LIMITS, milliseconds, peak_bytes, relative_error
from megatron_ads.runtime.device import device


def pointwise(record: Record) -> None:
    """Time what is no matrix product, next to what torch or Megatron-Core has for it."""
    stack = STACKS["plain"].sized(tiny=record.dry_run)
    one_rank()
    for name, (work, reference) in _pointwise_work(stack, record.dry_run).items():
        with record.attempt(name):
            found = work()
            if reference is not None:
                error = max(relative_error(a, b) for a, b in zip(found, reference(), strict=True))
                record.figure(f"{name}: error", error)
                record.check(error < LIMITS[torch.bfloat16], f"{name}: is off by {error:.1e}")
            del found
            taken, spent = peak_bytes(work), milliseconds(work)
            gigabytes = "" if taken is None else f", {taken / 1e9:.2f} GB"
            record.figure(f"{name}: ms", spent, f"{name}: {spent:.2f} ms{gigabytes}")
            record.figure(f"{name}: peak_bytes", taken)


Differentiated = Callable[[], Sequence[Tensor]]


def _pointwise_work(stack: Stack, tiny: bool) -> dict[str, tuple[Differentiated, Differentiated | None]]:
    """Return, by name, work that returns an output with its gradients, and the same in FP32 by plain formulas."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_ads.architecture import LatentAttentionShape
    from megatron_ads.models.attention import make_heads
    from megatron_ads.models.specs import RMSNorm

    shape, tokens = stack.shape, 64 if tiny else 4096
    x, gate_up = _leaf(tokens, shape.hidden_size), _leaf(8 * tokens, 2 * shape.expert_ffn_size)
    routing = torch.rand(8 * tokens, 1, device=device()).requires_grad_()
    norm = RMSNorm(stack.megatron_config(), shape.hidden_size, 1e-6)
    logits, labels = _leaf(tokens, 1, shape.vocab_size), torch.randint(shape.vocab_size, (tokens, 1), device=device())
    widths = shape.attention
    assert isinstance(widths, LatentAttentionShape)
    query, key = _leaf(tokens, 1, shape.num_heads, widths.qk_head_dim), _leaf(tokens, 1, widths.qk_rope_head_dim)
    key_value = _leaf(tokens, 1, shape.num_heads, widths.qk_nope_head_dim + widths.v_head_dim)
    angles = torch.rand(tokens, 1, widths.qk_rope_head_dim // 2, device=device())
    turns = torch.polar(torch.ones_like(angles), angles)

    def heads(query: Tensor, key_value: Tensor, key: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in make_heads(query, key_value, key, turns)])

    ends, loss, cross_entropy = (gate_up, routing), (logits,), partial(_cross_entropy, labels=labels)
    return {
        "RMSNorm": (_with_gradients(norm, (x,)), _in_fp32(lambda x: _torch_norm(x, norm.weight.float()), (x,))),
        "RMSNorm of torch": (_with_gradients(lambda x: _torch_norm(x, norm.weight), (x,)), None),
        "heads with rotation": (
            _with_gradients(heads, (query, key_value, key)), _in_fp32(heads, (query, key_value, key)),
        ),
        "SwiGLU of the experts, eager": (_with_gradients(_swiglu, ends), _in_fp32(_swiglu, ends)),
        "SwiGLU of the experts, Megatron-Core": (
            _with_gradients(lambda x, w: weighted_bias_swiglu_impl(x, None, w), ends), _in_fp32(_swiglu, ends),
        ),
        "cross entropy, Megatron-Core": (
            _with_gradients(lambda x: vocab_parallel_cross_entropy(x.float(), labels), loss),
            _in_fp32(cross_entropy, loss),
        ),
        "cross entropy of torch": (_with_gradients(cross_entropy, loss), None),
    }  # fmt: skip


def _swiglu(gate_up: Tensor, routing: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (functional.silu(gate) * up * routing).to(gate_up.dtype)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(-1, 1)


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, 1e-6)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, device=device()).to(torch.bfloat16).requires_grad_()


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Differentiated:
    def run() -> Sequence[Tensor]:
        output = function(*inputs)
        grad = torch.ones_like(output).mul_(0.5)
        return output, *torch.autograd.grad(output, inputs, grad)

    return run


def _in_fp32(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Differentiated:
    """Return the same in FP32, from the rounded inputs."""
    return lambda: _with_gradients(function, [x.detach().float().requires_grad_() for x in inputs])()
