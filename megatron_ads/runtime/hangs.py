"""Say which rank, group and operation it was when a communication times out or loses its peer.

Under gloo the wait ends in an exception here; under NCCL torch's own watchdog ends the process, and the peer monitor
(``watchdog.py``) and NCCL's log have to do.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ads.errors import MegatronAdsError
from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.collective_trace import Collective, Group, describe_call, describe_group, intercept

_REMEMBERED = 32
"""Calls looked through for unfinished ones: more than are ever under way at once."""
_SIGNS = ("gloo", "Timed out", "timed out", "timeout", "Connection closed by peer", "Connection reset by peer")


class CommunicationError(MegatronAdsError, RuntimeError):
    """A communication did not finish: a peer has died, or some ranks of a group made another call than the rest."""


@contextlib.contextmanager
def name_failed_communication(layout: ParallelLayout) -> Iterator[None]:
    """Turn torch's error about a timeout or a lost peer inside the context into one with names.

    Raises:
        CommunicationError: With this rank's coordinates, the unfinished operation, its group and the group's ranks.
    """
    recent = _RecentCalls()
    with intercept(before=recent.begin, after=recent.issued):
        try:
            yield
        except RuntimeError as error:
            if not _is_about_communication(error):
                raise
            rank = dist.get_rank()
            at = layout.coordinates(rank)
            raise CommunicationError(
                f"Rank {rank} (stage {at.pp}, dp {at.dp}, cp {at.cp}, tp {at.tp}, edp {at.edp}, ep {at.ep}) was left "
                f"waiting in {recent.describe(rank)}. torch says: {str(error).splitlines()[0]}"
            ) from error


@dataclass(slots=True)
class _Call:
    group: Group
    call: Collective
    work: weakref.ref[Any] | None = None
    """The handle to wait on, which dies when nobody waits; None if the call itself has not returned one."""

    def is_unfinished(self) -> bool:
        if self.work is None:
            return True
        work = self.work()
        return work is not None and (not work.is_completed() or work.exception() is not None)


class _RecentCalls:
    """The latest communications, without keeping their tensors alive."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=_REMEMBERED)
        self._groups: dict[str, Group] = {}

    def begin(self, group: ProcessGroup, operation: str, arguments: Sequence[Any]) -> None:
        """Remember a call that is about to be made."""
        named = self._groups.get(group.group_name)
        if named is None:
            named = self._groups[group.group_name] = describe_group(group)
        self._calls.append(_Call(named, describe_call(named, operation, arguments)))

    def issued(self, group: ProcessGroup, operation: str, arguments: Sequence[Any], work: Any) -> None:
        """Remember the handle that the latest call returned."""
        if work is None:
            self._calls.pop()
        else:
            self._calls[-1].work = weakref.ref(work)

    def describe(self, rank: int) -> str:
        """Name the calls that have not succeeded, oldest first, and the ranks that they needed."""
        unfinished = [call for call in self._calls if call.is_unfinished()] or list(self._calls)[-1:]
        if not unfinished:
            return "a communication that torch was setting up"
        named = dict.fromkeys(f"{call.call} of {call.group}" for call in unfinished)
        peers = sorted({peer for call in unfinished for peer in call.group.ranks} - {rank})
        whose = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}"
        return f"{', then '.join(named)}; look at the logs of {whose}"


def _is_about_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
