"""Record which collectives each rank makes in each process group, and find where members of a group disagree.

    with trace_collectives() as trace:
        optimizer.step()
    mismatches = compare_traces(gathered)          # gathered: {rank: trace}

Calls are seen at torch's ``ProcessGroup`` methods, below every name that ``torch.distributed`` has for an operation,
and below the aliases that Megatron-Core keeps of those names. The methods are patched inside the context only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work
from torch.distributed import ProcessGroup

POINT_TO_POINT = frozenset({"send", "recv", "recv_anysource"})
_OWN_SHAPE_ON_EACH_RANK = frozenset({"alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter"})
_METHODS = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced", "all_to_all_single",
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced",
    "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource",
    "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip
"""Communicating methods of ``ProcessGroup`` in torch 2.13; versions that lack some of them have fewer to record."""
_END_OF_BATCH = "_end_coalescing"


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """A process group, named as on every other member."""

    name: str
    """What Megatron calls it, in lower case and without "group": ``expert_data_parallel``."""
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}{list(self.ranks)}"


@dataclass(frozen=True, slots=True)
class Collective:
    """One operation as a member of the group called it."""

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    """Of every tensor passed, outputs first."""
    dtypes: tuple[str, ...]
    detail: str = ""
    """Reduction, root or peer (by global rank), where the operation has them."""

    def __str__(self) -> str:
        tensors = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in zip(self.dtypes, self.shapes, strict=True))
        return f"{self.operation}({'; '.join(filter(None, (tensors, self.detail)))})"

    def signature(self) -> str:
        """Return what the calls of all members have in common: some operations take another shape on every rank."""
        if self.operation in _OWN_SHAPE_ON_EACH_RANK:
            return f"{self.operation}({', '.join(sorted(set(self.dtypes)))}; {self.detail})"
        return str(self)

    def agrees_with(self, other: "Collective") -> bool:
        """Whether two members may make these calls as one."""
        return self.signature() == other.signature()


@dataclass(slots=True)
class Trace:
    """What one rank called, in order, by group."""

    collectives: dict[Group, list[Collective]] = field(default_factory=dict)
    point_to_point: dict[Group, list[Collective]] = field(default_factory=dict)
    """Sends and receives, which only two members take part in."""

    def count(self) -> int:
        """Return the number of calls, collectives and point-to-point."""
        return sum(len(calls) for part in (self.collectives, self.point_to_point) for calls in part.values())


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first place in the sequence of one group where its members differ."""

    group: Group
    position: int
    """From 0, in the group's sequence of collectives."""
    calls: dict[int, str]
    """What each member called there, by rank; "nothing" where its sequence had ended."""

    def __str__(self) -> str:
        said = "; ".join(f"rank {rank}: {call}" for rank, call in sorted(self.calls.items()))
        return f"collective {self.position} of {self.group}: {said}"


@contextlib.contextmanager
def trace_collectives() -> Iterator[Trace]:
    """Record every call that this process makes until the context ends."""
    trace = Trace()

    def record(group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
        part = trace.point_to_point if operation in POINT_TO_POINT else trace.collectives
        named = describe_group(group)
        part.setdefault(named, []).append(describe_call(named, operation, arguments))

    with intercept(before=record):
        yield trace


def compare_traces(traces: Mapping[int, Trace]) -> list[Mismatch]:
    """Return, for each group whose members made different sequences, the first difference.

    Args:
        traces: The trace of every rank of the job, by rank. A member without any call in a group made none.
    """
    groups = sorted({group for trace in traces.values() for group in trace.collectives})
    found = (_first_difference(group, {rank: traces[rank].collectives.get(group, []) for rank in group.ranks})
             for group in groups)  # fmt: skip
    return [mismatch for mismatch in found if mismatch]


def _first_difference(group: Group, calls: Mapping[int, list[Collective]]) -> Mismatch | None:
    for position in range(max(map(len, calls.values()))):
        here = {rank: made[position] if position < len(made) else None for rank, made in calls.items()}
        first, *others = here.values()
        if first is None or not all(other is not None and first.agrees_with(other) for other in others):
            return Mismatch(group, position, {rank: str(call or "nothing") for rank, call in here.items()})
    return None


@contextlib.contextmanager
def intercept(
    before: Callable[[ProcessGroup, str, Sequence[Any]], None] | None = None,
    after: Callable[[ProcessGroup, str, Sequence[Any], Any], None] | None = None,
    *,
    after_batch: Callable[[Any], None] | None = None,
    before_wait: Callable[[Any], None] | None = None,
    after_wait: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Call ``before(group, operation, arguments)`` ahead of, and ``after(..., work)`` behind, each communication.

    ``after_batch(work)`` is called behind communications that the backend coalesced (NCCL does), which have no work
    of their own; ``before_wait(work)`` and ``after_wait(work)`` around each wait on a communication.
    """
    methods = (*_METHODS, _END_OF_BATCH)
    originals = {name: ProcessGroup.__dict__[name] for name in methods if name in ProcessGroup.__dict__}
    original_wait = Work.wait
    for name in originals:
        method = getattr(ProcessGroup, name)
        wrapped = _ending(method, after_batch) if name == _END_OF_BATCH else _observed(name, method, before, after)
        setattr(ProcessGroup, name, wrapped)
    if before_wait and after_wait:
        Work.wait = _observed_wait(original_wait, before_wait, after_wait)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.wait = original_wait  # type: ignore[method-assign]
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _observed(name: str, method: Callable[..., Any], before: Any, after: Any) -> Callable[..., Any]:
    def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values())
        if before:
            before(group, name, arguments)
        work = method(group, *args, **kwargs)
        if after:
            after(group, name, arguments, work)
        return work

    return call


def _ending(method: Callable[..., Any], after: Callable[[Any], None] | None) -> Callable[..., Any]:
    def end_batch(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        work = method(group, *args, **kwargs)
        if after:
            after(work)
        return work

    return end_batch


def _observed_wait(
    method: Callable[..., Any], before: Callable[[Any], None], after: Callable[[Any], None]
) -> Callable[..., Any]:
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        before(work)
        try:
            return method(work, *args, **kwargs)
        finally:
            after(work)

    return wait


def describe_group(group: ProcessGroup) -> Group:
    """Return the name and the global ranks of ``group``."""
    name = group.group_desc.removesuffix("_GROUP").lower()
    return Group("default" if name == "default_pg" else name, tuple(dist.get_process_group_ranks(group)))


def describe_call(group: Group, operation: str, arguments: Sequence[Any]) -> Collective:
    """Return the record of a call of ``ProcessGroup`` method ``operation``."""
    tensors = list(_tensors(arguments))
    return Collective(
        operation=operation,
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        detail=", ".join(_details(group, operation, arguments)),
    )


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _details(group: Group, operation: str, arguments: Sequence[Any]) -> Iterator[str]:
    if operation in ("send", "recv"):
        yield f"{'to' if operation == 'send' else 'from'} rank {group.ranks[arguments[1]]}"
    for options in arguments:
        if hasattr(options, "reduceOp"):
            yield str(options.reduceOp.op.name).lower()
        if hasattr(options, "rootRank") and options.rootRank >= 0:
            yield f"root {group.ranks[options.rootRank]}"
