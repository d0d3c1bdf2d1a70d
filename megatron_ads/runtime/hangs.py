"""Say which rank, group and operation it was when a communication times out or loses its peer.

Under gloo the wait ends in an exception here; under NCCL torch's own watchdog ends the process, and the peer monitor
(``watchdog.py``) and NCCL's log have to do.
"""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_ads.errors import MegatronAdsError
from megatron_ads.layout import ParallelLayout
from megatron_ads.runtime.health.activity import Activity

_SIGNS = ("gloo", "Timed out", "timed out", "timeout", "Connection closed by peer", "Connection reset by peer")


class CommunicationError(MegatronAdsError, RuntimeError):
    """A communication did not finish: a peer has died, or some ranks of a group made another call than the rest."""


@contextlib.contextmanager
def name_failed_communication(layout: ParallelLayout, activity: Activity | None = None) -> Iterator[None]:
    """Turn torch's error about a timeout or a lost peer inside the context into one with names.

    Args:
        activity: Where this rank's communications are recorded; None if nobody else looks at them.

    Raises:
        CommunicationError: With this rank's coordinates, the unfinished operation, its group and the group's ranks.
    """
    activity = activity or Activity()
    with activity.observed():
        try:
            yield
        except RuntimeError as error:
            if not _is_about_communication(error):
                raise
            rank = dist.get_rank()
            at = layout.coordinates(rank)
            raise CommunicationError(
                f"Rank {rank} (stage {at.pp}, dp {at.dp}, cp {at.cp}, tp {at.tp}, edp {at.edp}, ep {at.ep}) was left "
                f"waiting in {activity.describe(rank)}. torch says: {str(error).splitlines()[0]}"
            ) from error


def _is_about_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
