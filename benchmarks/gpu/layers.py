"""Train stacks of layers: time, share of the card's peak, memory against the planner's, against transformers too."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.gpu.record import Record
from benchmarks.gpu.stacks import STACKS, Built, Stack, build, one_rank
from benchmarks.gpu.timing import forget, host_waits, kernel_table, milliseconds, on_gpu
from megatron_ads.config.model import Recompute
from megatron_ads.models.flops import token_flops
from megatron_ads.models.parts import Lora
from megatron_ads.planning.hardware import CARDS
from megatron_ads.planning.memory import stage_memory
from megatron_ads.runtime.device import device

AIM = 0.40
"""Share of the card's BF16 peak that the model's arithmetic should reach."""
MEMORY_TOLERANCE = 0.10
"""Of the planner's memory model."""
RESERVED_BYTES = 3_000_000_000
"""Left to the driver, to libraries and to fragments when it is decided whether a stack fits a card."""


def train_stack(record: Record, name: str) -> None:
    """Train a stack for a few steps: time, share of the peak, memory against the planner's, waits, longest kernels."""
    if (stack := stack_that_fits(record, name)) is None:
        return
    one_rank()
    from megatron_ads.models.experts import ExpertLoad

    built = build(stack)
    load = ExpertLoad(built.models)
    _compare_loading(record, stack)
    report = built.step()  # compiles
    # Logits of a normalised state are normal with this variance; the mean of log sum exp is half of it more.
    expected = math.log(stack.vocabulary) + stack.shape.hidden_size * stack.shape.initializer_range**2 / 2
    record.figure("loss", report.loss)
    record.check(abs(report.loss - expected) < 0.5, f"the loss is {report.loss:.2f}, of random weights {expected:.2f}")
    record.figure("busiest_expert_over_mean", load.measure())
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    spent = milliseconds(built.step, **often(record))
    _compare_memory(record, stack)
    share = note_speed(record, stack, spent, str(stack))
    if name in ("plain", "full") and share is not None and not record.dry_run:
        record.check(share >= AIM, f"{share:.0%} of the card's peak, less than the {AIM:.0%} aimed at")
    with record.attempt("host waits"):
        waits = host_waits(built.step)
        said = "" if waits is None else f"the host waits {waits / stack.microbatches:.1f} times a microbatch"
        record.figure("host_waits_per_microbatch", waits and waits / stack.microbatches, said)
    with record.attempt("kernels"):
        record.figure("kernels_ms_calls", kernel_table(built.step))


def often(record: Record) -> dict[str, int]:
    """Return how often a step is timed."""
    return {"repeats": 1, "warm_up": 0} if record.dry_run else {"repeats": 3, "warm_up": 2}


def stack_that_fits(record: Record, name: str) -> Stack | None:
    """Return the stack, small in a dry run; None, with the reason in ``record``, where the card cannot hold it."""
    stack = STACKS[name].sized(tiny=record.dry_run)
    if not on_gpu():
        return stack
    wanted, held = planned_bytes(stack) + RESERVED_BYTES, torch.cuda.get_device_properties(device()).total_memory
    if wanted < held:
        return stack
    record.skip(f"the plan is {wanted / 1e9:.0f} GB, the card has {held / 1e9:.0f} GB")
    return None


def planned_bytes(stack: Stack) -> int:
    """Return what the planner expects of a GPU, without the optimizer where there is none."""
    memory = stage_memory(stack.job, 0, gpu=True)
    return max(memory.training - (0 if stack.updates else memory.optimizer), memory.loading)


def _compare_loading(record: Record, stack: Stack) -> None:
    if on_gpu():
        planned, measured = stage_memory(stack.job, 0, gpu=True).loading, torch.cuda.max_memory_allocated()
        record.figure("loading_bytes", {"planned": planned, "measured": measured})


def _compare_memory(record: Record, stack: Stack) -> None:
    memory = stage_memory(stack.job, 0, gpu=True)
    planned = memory.training - (0 if stack.updates else memory.optimizer)
    record.figure("planned_bytes", planned)
    record.figure("planned_parts", asdict(memory))
    if on_gpu():
        measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        said = f"peak {measured / 1e9:.1f} GB, planned {planned / 1e9:.1f} GB"
        record.figure("peak_bytes", measured, said)
        record.figure("reserved_bytes", reserved)
        right = record.dry_run or abs(planned / measured - 1) < MEMORY_TOLERANCE
        record.check(right, f"the planner's memory model is off: {said}")


def note_speed(record: Record, stack: Stack, spent_ms: float, name: str) -> float | None:
    """Note what a step of ``spent_ms`` comes to; return the share of the card's peak where that is known."""
    tokens_per_second = stack.microbatches * stack.row_tokens / spent_ms * 1e3
    layers = stack.layers + stack.mtp
    flops = token_flops(
        stack.shape,
        range(layers),
        outputs=1 + stack.mtp,
        seq_length=stack.row_tokens // stack.samples,
        recompute=stack.recompute,
        lora=Lora.of(stack.model),
    )
    rate = tokens_per_second * (flops.forward + flops.backward)
    said = f"{name}: {spent_ms:.0f} ms a step, {tokens_per_second:.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s"
    share = None
    if peak := _peak_flops_per_second():
        share, with_repeats = rate / peak, rate / peak * (1 + flops.recomputed / (flops.forward + flops.backward))
        record.figure(f"{name}: share_of_peak", share)
        record.figure(f"{name}: efficiency", with_repeats)  # the planner's word: what is computed again counts
        said += f", {share:.1%} of the peak"
    record.figure(f"{name}: ms_per_step", spent_ms, said)
    record.figure(f"{name}: tokens_per_second", tokens_per_second)
    record.figure(f"{name}: model_flops_per_second", rate)
    return share


def _peak_flops_per_second() -> float | None:
    words = torch.cuda.get_device_name(device()).lower().split() if on_gpu() else []
    return next((card.flops_per_second for card in CARDS.values() if card.name in words), None)


# --- the same shapes in transformers


def train_transformers(record: Record) -> None:
    """Time forward and backward passes of the same tokens in transformers and here, without and with recomputation."""
    if (stack := stack_that_fits(record, "plain")) is None:
        return
    one_rank()  # before anything else imports Megatron-Core
    theirs: dict[Recompute, float] = {}
    with record.attempt("transformers"):
        theirs = _time_transformers(record, stack)
    forget()
    built = build(stack)
    for recompute, their_ms in theirs.items():
        with record.attempt(f"here, recompute {recompute}"), with_fields(built, **_RECOMPUTE_FIELDS[recompute]):
            our_ms = milliseconds(built.step, **often(record))
            note_speed(record, replace(stack, recompute=recompute), our_ms, f"here, recompute {recompute}")
            ratio = their_ms / our_ms
            said = f"{ratio:.2f} times as fast as transformers"
            record.figure(f"speed over transformers, recompute {recompute}", ratio, said)


_RECOMPUTE_FIELDS: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.full: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Of Megatron's configuration, which reads them at every pass."""


def _time_transformers(record: Record, stack: Stack) -> dict[Recompute, float]:
    """Return the median ms of a step by what is recomputed."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(**stack.config)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    model.config.use_cache = False
    record.figure("experts_implementation", str(getattr(model.config, "_experts_implementation", None)))
    tokens_BS = torch.randint(stack.vocabulary, (stack.samples, stack.row_tokens // stack.samples), device=device())

    def step() -> None:
        model.zero_grad()
        for _ in range(stack.microbatches):
            model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()

    times = {}
    for recompute in _RECOMPUTE_FIELDS:
        if recompute is Recompute.full:
            model.gradient_checkpointing_enable()
        times[recompute] = milliseconds(step, **often(record))
        of = replace(stack, recompute=recompute)
        note_speed(record, of, times[recompute], f"transformers, recompute {recompute}")
    return times


@contextmanager
def with_fields(built: Built, **fields: Any) -> Iterator[None]:
    """Run with other fields of Megatron's configuration, for those that it reads at every pass."""
    config = built.models[0].config
    before = {name: getattr(config, name) for name in fields}
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
