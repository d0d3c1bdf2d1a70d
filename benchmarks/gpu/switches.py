"""What each thing that makes a step faster is worth: a step as training runs it, and with one undone at a time."""

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

from torch import Tensor

from benchmarks.gpu.layers import note_speed, often, stack_that_fits, with_fields
from benchmarks.gpu.record import Record
from benchmarks.gpu.stacks import Built, build, one_rank
from benchmarks.gpu.timing import host_waits, milliseconds, peak_bytes

SETTINGS = (
    "apply_rope_fusion", "batch_p2p_comm", "batch_p2p_sync", "bias_activation_fusion", "bias_dropout_fusion",
    "cross_entropy_fusion_impl", "cross_entropy_loss_fusion", "deallocate_pipeline_outputs",
    "gradient_accumulation_fusion", "moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap",
    "moe_token_dispatcher_type", "overlap_p2p_comm",
)  # fmt: skip
"""Of Megatron's configuration, noted as this project sets them; those of pipelines have no effect on one rank."""

Switch = Callable[[Built], AbstractContextManager[object]]


def compare_switches(record: Record) -> None:
    """Time a step as training runs it, then with one thing undone at a time; what there is not is noted as such."""
    if (stack := stack_that_fits(record, "switches")) is None:
        return
    one_rank()
    built = build(stack)
    config = built.models[0].config
    record.figure("settings", {name: repr(getattr(config, name, "not there")) for name in SETTINGS})
    usual = milliseconds(built.step, **often(record))
    note_speed(record, stack, usual, "as trained")
    for name, switch in SWITCHES.items():
        try:
            undone = switch(built)
        except NotThereError as error:
            record.figure(name, f"not there: {error}")
            continue
        with record.attempt(name), undone:
            spent, waits = milliseconds(built.step, **often(record)), list[int | None]()
            taken = peak_bytes(lambda waits=waits: waits.append(host_waits(built.step)))  # type: ignore[misc]
            figures = {"ms_per_step": spent, "over_usual": spent / usual, "host_waits": waits[0], "peak_bytes": taken}
            said = f"{name}: {spent:.0f} ms a step, {spent / usual - 1:+.1%}"
            record.figure(name, figures, said)


class NotThereError(Exception):
    """This version has nothing to undo; the message names what was looked for."""


def undo(module: str, name: str, before: Callable[[Any], Any]) -> Switch:
    """Return a switch that puts ``before``, made from what is there now, in the place of a function or method."""

    def switch(_: Built) -> AbstractContextManager[object]:
        owner: Any = import_module(module)
        *classes, attribute = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        now = getattr(owner, attribute, None)
        if now is None or (earlier := before(now)) is now:
            raise NotThereError(f"{module}.{name}")
        return _replaced(owner, attribute, earlier)

    return switch


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _without_garbage_collection(_: Built) -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _eager_norm(_: Any) -> Any:
    from megatron_ads.models import specs

    def forward(norm: Any, x: Tensor) -> Any:
        return specs._Normalise.apply(x, norm.weight, norm.eps)

    return forward


def _without_longest(now: Any) -> Any:
    def attend(*heads: Tensor, scale: float, boundaries: Tensor | None = None, **_: Any) -> Any:
        return now(*heads, scale=scale, boundaries=boundaries)

    return attend


SWITCHES: dict[str, Switch] = {
    "nothing": lambda _: nullcontext(),
    "activations and residuals fused": lambda built: with_fields(
        built, bias_activation_fusion=False, bias_dropout_fusion=False
    ),
    "norms by one kernel": undo("megatron_ads.models.specs", "RMSNorm.forward", _eager_norm),
    "SwiGLU of the experts fused": undo(
        "megatron_ads.models.experts", "weighted_swiglu", lambda now: lambda *x, fused: now(*x, fused=False)
    ),
    "loss in pieces": undo(
        "megatron_ads.models.specs", "loss_in_pieces", lambda now: lambda compute, *tensors: compute(*tensors)
    ),
    "longest sample known to the host": undo("megatron_ads.models.attention", "attend", _without_longest),
    "samples rolled without waiting": undo(
        "megatron.core.transformer.multi_token_prediction", "_roll_tensor_packed_seq", inspect.unwrap
    ),
    "chunks sorted by one index": undo(
        "megatron.core.transformer.moe.token_dispatcher", "sort_chunks_by_idxs", inspect.unwrap
    ),
    "Python's own garbage collection": _without_garbage_collection,
}
"""What is undone, by name; undoing nothing shows how far equal runs differ."""
