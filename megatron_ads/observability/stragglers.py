"""Name the rank that holds up the others.

In a synchronous job all ranks take equally long for a step, so what is compared is the time in which a rank did not
wait for communication. Ranks of one pipeline stage have the same work; each is compared with the median of the others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

_NOTICEABLE = 0.1
"""Share of the step that a rank must lose before it is worth a line: small times differ by chance."""


@dataclass(frozen=True, slots=True)
class RankComparison:
    """A rank compared with the others of its stage."""

    rank: int
    seconds: float
    """Of its own work in the step."""
    median_seconds: float
    """Of the other ranks of its stage."""

    @property
    def over_median(self) -> float:
        """How many times as long it took."""
        return self.seconds / max(self.median_seconds, 1e-9)


class StragglerWatch:
    """Warns once when a rank is behind for several consecutive logged steps; reports when it kept up for as many."""

    def __init__(self, stages: Sequence[int], hosts: Sequence[str], *, factor: float, steps: int) -> None:
        """Watch ranks of these ``stages`` on these ``hosts``, in the order of their numbers.

        A rank is named that took ``factor`` times the median for ``steps`` consecutive logged steps.
        """
        self._stages, self._hosts, self._factor, self._steps = stages, hosts, factor, steps
        self._behind: Counter[int] = Counter()
        self._in_time: Counter[int] = Counter()
        """By rank, the consecutive logged steps."""
        self._named: set[int] = set()

    def observe(self, step: int, seconds: Sequence[float], step_seconds: float) -> RankComparison | None:
        """Record a logged step; return the rank that lost most, by however little; None if no rank can be compared."""
        compared = [
            RankComparison(rank, seconds[rank], median(others))
            for rank, stage in enumerate(self._stages)
            if (others := [seconds[other] for other, its in enumerate(self._stages) if its == stage and other != rank])
        ]
        behind = {
            each.rank: each
            for each in compared
            if each.seconds >= self._factor * each.median_seconds
            and each.seconds - each.median_seconds >= _NOTICEABLE * step_seconds
        }
        for rank in range(len(seconds)):
            counted, other = (self._behind, self._in_time) if rank in behind else (self._in_time, self._behind)
            counted[rank], other[rank] = counted[rank] + 1, 0
            if self._behind[rank] >= self._steps and rank not in self._named:
                self._named.add(rank)
                self._warn(step, behind[rank], step_seconds)
            if self._in_time[rank] >= self._steps and rank in self._named:
                self._named.remove(rank)
                logger.info("rank %d has kept up with its stage for %d logged steps", rank, self._steps)
        return max(compared, key=lambda each: each.seconds - each.median_seconds, default=None)

    def _warn(self, step: int, each: RankComparison, step_seconds: float) -> None:
        logger.warning(
            "rank %d (stage %d) on %s holds up the job: its own work took %.3g s of the %.3g s of step %d, %.1f times "
            "the median of the others of its stage, %.3g s, in %d consecutive logged steps. Look at that machine's "
            "clocks, temperature, disks and other processes.",
            *(each.rank, self._stages[each.rank], self._hosts[each.rank], each.seconds, step_seconds, step),
            *(each.over_median, each.median_seconds, self._steps),
        )
