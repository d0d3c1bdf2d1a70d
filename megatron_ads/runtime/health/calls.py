"""See every communication of this process: which operation, in which group, with which tensors.

Calls are seen at torch's ``ProcessGroup`` methods, below every name that ``torch.distributed`` has for an operation,
and below the aliases that Megatron-Core keeps of those names. The methods are patched inside the context only. Facts
are kept as they come, ``without_tensors``; ``describe_call`` makes text of them when a report is written.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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

    @classmethod
    def of(cls, group: ProcessGroup) -> "Group":
        """Return the name and the global ranks of torch's ``group``."""
        name = group.group_desc.removesuffix("_GROUP").lower()
        return cls("default" if name == "default_pg" else name, tuple(dist.get_process_group_ranks(group)))

    def __str__(self) -> str:
        return f"{self.name}{list(self.ranks)}"


class TensorFacts(NamedTuple):
    """What is kept of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def without_tensors(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return arguments with ``TensorFacts`` in the place of tensors, which must not be kept alive."""
    return tuple(map(_without_tensor, arguments))


def _without_tensor(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return TensorFacts(argument.dtype, argument.shape)
    return without_tensors(argument) if isinstance(argument, list | tuple) else argument


def describe_call(group: Group, operation: str, arguments: Sequence[Any]) -> str:
    """Return a call in words: tensors, outputs first, then reduction, root or peer (by global rank), as it has them.

    ``arguments`` are those of ``ProcessGroup`` method ``operation``, without tensors.
    """
    tensors = ", ".join(f"{_name(tensor.dtype)}{list(tensor.shape)}" for tensor in _tensors(arguments))
    return _in_words(operation, tensors, _details(group, operation, arguments))


def signature(group: Group, operation: str, arguments: Sequence[Any]) -> str:
    """Return what the calls of all members have in common; of a message, which has two different ends, nothing."""
    if operation in POINT_TO_POINT:
        return ""
    if operation not in _OWN_SHAPE_ON_EACH_RANK:
        return describe_call(group, operation, arguments)
    dtypes = ", ".join(sorted({_name(tensor.dtype) for tensor in _tensors(arguments)}))
    return _in_words(operation, dtypes, _details(group, operation, arguments))


def _in_words(operation: str, tensors: str, details: Iterable[str]) -> str:
    return f"{operation}({'; '.join(filter(None, (tensors, ', '.join(details))))})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(arguments: Iterable[Any]) -> Iterator[TensorFacts]:
    for argument in arguments:
        if isinstance(argument, TensorFacts):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _details(group: Group, operation: str, arguments: Sequence[Any]) -> Iterator[str]:
    if operation in ("send", "recv"):
        yield f"{'to' if operation == 'send' else 'from'} rank {group.ranks[arguments[1]]}"
    for options in arguments:
        if hasattr(options, "reduceOp"):
            yield str(options.reduceOp.op.name).lower()
        if hasattr(options, "rootRank") and options.rootRank >= 0:
            yield f"root {group.ranks[options.rootRank]}"


class Observer(Protocol):
    """What learns of calls; ``health.activity.Activity`` does."""

    def begin(self, group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
        """Learn of a call that is about to be made."""

    def issued(self, operation: str, work: Any) -> None:
        """Learn of the handle that the latest call returned: None if it is over, or part of a coalesced batch."""

    def batch_issued(self, work: Any) -> None:
        """Learn of the handle of all calls that were coalesced (NCCL does) since the last batch."""

    def wait_begins(self, work: Any) -> None:
        """Learn that the host, or the stream on a GPU, waits for a call from here on."""

    def wait_ends(self, work: Any) -> None:
        """Learn of the end of the wait."""


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Let ``observer`` see every communication of this process inside the context."""
    names = [name for name in (*_METHODS, _END_OF_BATCH) if name in ProcessGroup.__dict__]
    originals = {name: ProcessGroup.__dict__[name] for name in names}
    original_wait = Work.wait
    for name in names:
        setattr(ProcessGroup, name, _observed(name, originals[name], observer))
    Work.wait = _waiting(original_wait, observer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.wait = original_wait  # type: ignore[method-assign]
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _observed(name: str, method: Callable[..., Any], observer: Observer) -> Callable[..., Any]:
    def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        observer.begin(group, name, (*args, *kwargs.values()))
        work = method(group, *args, **kwargs)
        observer.issued(name, work)
        return work

    def end_batch(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        work = method(group, *args, **kwargs)
        observer.batch_issued(work)
        return work

    return end_batch if name == _END_OF_BATCH else call


def _waiting(method: Callable[..., Any], observer: Observer) -> Callable[..., Any]:
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        observer.wait_begins(work)
        try:
            return method(work, *args, **kwargs)
        finally:
            observer.wait_ends(work)

    return wait
