"""Whether something has become slower: its ratio now against the ratio of a baseline, never its seconds.

The ratio is a speed in speeds of a reference that was measured in turn with the work. A busy machine slows down both,
so the ratio stays where it is and only varies more from round to round. Something is *slower* if

    ratio < baseline * exp(-limit),    limit = tolerance + 3 * sqrt(error_now ^ 2 + error_baseline ^ 2)

where the errors are the standard errors of the logarithms of both medians, from their rounds. That is: slower by more
than the tolerance, the share that two runs of equal code differ by, and by more than chance explains. With quiet rounds
the limit is next to the tolerance. Where the rounds vary so much that half the speed would pass, nothing can be said:
*too noisy*, which is shown and is no failure. *Faster* is the same in the other direction: a better baseline.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SURE = 3.0
"""Standard errors: chance exceeds so many in one direction once in 700 times."""


class Outcome(StrEnum):
    """What a ratio says, compared with that of the baseline."""

    same = "same"
    slower = "slower"
    faster = "faster"
    too_noisy = "too noisy"
    no_baseline = "no baseline"
    met = "met"
    missed = "missed"


FAILED = (Outcome.slower, Outcome.missed)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one comparison or share."""

    name: str
    outcome: Outcome
    now: float
    baseline: float | None
    limit: float | None
    """The least that ``now`` may be; None without a baseline."""

    @property
    def failed(self) -> bool:
        return self.outcome in FAILED

    def __str__(self) -> str:
        if self.outcome is Outcome.missed:
            return f"{self.name}: {self.now:.4f}, and must be {self.limit:.4f} at least"
        if self.baseline is None or self.limit is None:
            return f"{self.name}: ratio {self.now:.3f}, no baseline"
        return (
            f"{self.name} is {self.outcome}: ratio now {self.now:.3f}, of the baseline {self.baseline:.3f}, "
            f"limit {self.limit:.3f}"
        )


def judge(found: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Verdict:
    """Judge one comparison or share, each as its ``as_json`` gives it."""
    name = found["name"]
    if "least" in found:
        outcome = Outcome.met if found["value"] >= found["least"] else Outcome.missed
        return Verdict(name, outcome, found["value"], None, found["least"])
    ratio = found["ratio"]
    if baseline is None:
        return Verdict(name, Outcome.no_baseline, ratio, None, None)
    before = baseline["ratio"]
    margin = found["tolerance"] + SURE * math.hypot(found["error"], baseline["error"])
    outcome = Outcome.same
    if ratio < before * math.exp(-margin):
        outcome = Outcome.slower
    elif margin > math.log(2):
        outcome = Outcome.too_noisy
    elif ratio > before * math.exp(margin):
        outcome = Outcome.faster
    return Verdict(name, outcome, ratio, before, before * math.exp(-margin))
