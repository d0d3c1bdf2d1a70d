"""Attention by itself at DeepSeek-R1's widths: right against plain FP32 arithmetic, how fast, and without S^2 memory.

Shape suffixes: H = heads, S = tokens.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import LIMITS, host_waits, milliseconds, peak_bytes, relative_error
from megatron_ads.runtime.device import device


def attention(record: Record) -> None:
    """Run the attention of packed and unpacked rows forward and backward, against the textbook's formula."""
    row = 96 if record.dry_run else 4096
    sixteen = (1, *(row // 16 + (-1) ** n * (row // 64) for n in range(14)))  # one sample of one token
    sixteen = (*sixteen, row - sum(sixteen))
    forms = {
        "bf16, 16 samples": (torch.bfloat16, sixteen, True),
        "bf16, 1 sample": (torch.bfloat16, (row,), True),
        "bf16, 1 sample, not packed": (torch.bfloat16, (row,), False),
        "fp32, 16 samples": (torch.float32, sixteen, True),
    }
    for name, (dtype, lengths, packed) in forms.items():
        with record.attempt(name):
            _attention_form(record, name, dtype, lengths, packed=packed)


def _attention_form(record: Record, name: str, dtype: torch.dtype, lengths: Sequence[int], *, packed: bool) -> None:
    from megatron_ads.models.attention import attend

    heads, width, value_width = (4, 24, 16) if record.dry_run else (128, 192, 128)
    scale = width**-0.5
    q, k, v = (_heads(sum(lengths), heads, each, dtype) for each in (width, width, value_width))
    grad = torch.randn(1, heads, sum(lengths), value_width, device=device()).to(dtype)
    boundaries = torch.tensor([0, *lengths], device=device()).cumsum(0).to(torch.int32) if packed else None

    longest = max(lengths) if packed else None

    def run() -> list[Tensor]:
        output = attend(q, k, v, scale=scale, boundaries=boundaries, longest=longest)
        return [output, *torch.autograd.grad(output, (q, k, v), grad)]

    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for part, found, wanted in zip(names, run(), _plain_attention(q, k, v, grad, scale, lengths), strict=True):
        error = relative_error(found, wanted)
        record.figure(f"{name}: error of the {part}", error)
        record.check(error < LIMITS[dtype], f"{name}: the {part} is off by {error:.1e}, more than {LIMITS[dtype]:.0e}")
    taken, waits, spent = peak_bytes(run), host_waits(run), milliseconds(run)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = 3 * 2 * pairs * heads * (width + value_width) / spent * 1e3  # backward counts twice
    record.figure(f"{name}: ms", spent, f"{name}: {spent:.2f} ms forward and backward, {flops / 1e12:.0f} TFLOP/s")
    record.figure(f"{name}: flops_per_second", flops)
    record.figure(f"{name}: peak_bytes", taken)
    record.figure(f"{name}: host_waits", waits)
    most = 1.25e9 * dtype.itemsize  # inputs, outputs and gradients are 0.2 GB each in BF16, all scores 4.3 GB
    if taken is not None and not record.dry_run:
        record.check(taken < most, f"{name}: takes {taken / 1e9:.2f} GB, more than {most / 1e9:.1f}")
    if waits is not None and packed and dtype is torch.bfloat16:
        record.check(waits == 0, f"{name}: the host waited for the device {waits} times")


def _heads(tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return (1, H, S, width) as the projections leave it: tokens outermost in memory."""
    rows = torch.randn(tokens, 1, heads, width, device=device()).to(dtype)
    return rows.permute(1, 2, 0, 3).detach().requires_grad_()


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, lengths: Sequence[int]
) -> list[Tensor]:
    """Return output and gradients in FP32, a few heads of a sample at a time."""
    wanted = [torch.empty_like(x, dtype=torch.float32) for x in (v, q, k, v)]
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        for head in range(0, q.size(1), 16):
            part = (slice(None), slice(head, head + 16), slice(end - length, end))
            fq, fk, fv = (x[part].detach().float().requires_grad_() for x in (q, k, v))
            scores = (fq @ fk.transpose(-1, -2) * scale).masked_fill(future, -torch.inf)
            output = scores.softmax(-1) @ fv
            grads = torch.autograd.grad(output, (fq, fk, fv), grad[part].float())
            for whole, piece in zip(wanted, (output.detach(), *grads), strict=True):
                whole[part] = piece
    return wanted
