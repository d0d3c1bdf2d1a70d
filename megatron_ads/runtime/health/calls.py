"""One communication of this process: which operation, in which group, with which tensors, and in words for reports.

torch's Flight Recorder cannot take the place of these records: under gloo it has no messages (torch 2.13), and under
no backend the reduction, the root or the peer.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

POINT_TO_POINT = frozenset({"send", "recv", "recv_anysource"})
_OWN_SHAPE_ON_EACH_RANK = frozenset({"alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter"})


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """A process group, named as on every other member."""

    name: str
    """What Megatron calls it, in lower case and without "group": ``expert_data_parallel``."""
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, group: ProcessGroup) -> Self:
        """Return the name and the global ranks of torch's ``group``."""
        name = group.group_desc.removesuffix("_GROUP").lower()
        return cls("default" if name == "default_pg" else name, tuple(dist.get_process_group_ranks(group)))

    def __str__(self) -> str:
        return f"{self.name}{list(self.ranks)}"


class TensorFacts(NamedTuple):
    """What is kept of a tensor, which must not be kept alive itself."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Call:
    """A call of a method of ``ProcessGroup``; as text, its tensors (outputs first), reduction, root or peer."""

    group: Group
    operation: str
    arguments: tuple[Any, ...]
    """Flat, with ``TensorFacts`` in the place of tensors."""
    channel: str = ""
    """The name under which all who take part count it: the group, and for messages the two ranks."""
    number: int = 0
    """On its channel, from 1."""
    begun: float = 0.0
    work: weakref.ref[Any] | None = None
    """What the call, or the batch that it is part of, returned to wait on; dies when nobody waits any more."""
    finished: torch.cuda.Event | None = None
    """On a GPU: after the wait in the stream of the computation, which the host does not wait for."""

    @classmethod
    def of(cls, group: Group, operation: str, arguments: Sequence[Any]) -> Self:
        """Record ``ProcessGroup`` method ``operation`` as it is called with ``arguments``."""
        leaves = (
            TensorFacts(str(leaf.dtype).removeprefix("torch."), leaf.shape) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in tree_leaves(list(arguments))
        )
        return cls(group, operation, tuple(leaves))

    def is_unfinished(self) -> bool:
        """Whether the communication is not over, or has failed."""
        if self.finished is not None:
            return not self.finished.query()
        if self.work is None:
            return True
        work = self.work()
        return work is not None and (not work.is_completed() or work.exception() is not None)

    def ends(self) -> tuple[int, int] | None:
        """Return the sending and the receiving rank of a message between two known ranks."""
        if self.operation not in ("send", "recv"):
            return None
        peer = self.group.ranks[next(each for each in self.arguments if not isinstance(each, TensorFacts))]
        return (dist.get_rank(), peer) if self.operation == "send" else (peer, dist.get_rank())

    def signature(self) -> str:
        """Return what the calls of all members have in common; of a message, which has two different ends, nothing."""
        if self.operation in POINT_TO_POINT:
            return ""
        if self.operation in _OWN_SHAPE_ON_EACH_RANK:
            return self._in_words(", ".join(sorted({tensor.dtype for tensor in self._tensors()})))
        return str(self)

    def __str__(self) -> str:
        return self._in_words(", ".join(f"{tensor.dtype}{list(tensor.shape)}" for tensor in self._tensors()))

    def _tensors(self) -> list[TensorFacts]:
        return [each for each in self.arguments if isinstance(each, TensorFacts)]

    def _in_words(self, tensors: str) -> str:
        ends = self.ends()
        details = [f"to rank {ends[1]}" if self.operation == "send" else f"from rank {ends[0]}"] if ends else []
        for options in self.arguments:
            if hasattr(options, "reduceOp"):
                details.append(str(options.reduceOp.op.name).lower())
            if hasattr(options, "rootRank") and options.rootRank >= 0:
                details.append(f"root {self.group.ranks[options.rootRank]}")
        return f"{self.operation}({'; '.join(filter(None, (tensors, ', '.join(details))))})"
