"""Many comparisons of two systems, added up: may the new one go to an online test?

    net share = (better - worse) / comparisons that could be read

The advice, ours: against a test if the new system is surely worse or its outputs are too often of high risk; for one if
it is surely better; undecided in between, and whenever too many comparisons could not be read. Surely means that the
95 % interval of the net share, over requests, leaves out 0.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.metrics.intervals import Interval, mean_interval
from megatron_ads.tasks.elements import ReadFailure
from megatron_ads.tasks.model_comparison import Assessment, Risk, Verdict

MOST_HIGH_RISK = 0.01
"""Largest share of outputs of high risk that a test may have."""
MOST_UNREADABLE = 0.2
_POINTS_LISTED = 5
_WORTH = {Verdict.better: 1.0, Verdict.same: 0.0, Verdict.worse: -1.0}


class Advice(StrEnum):
    """What the comparisons speak for."""

    test_online = "test online"
    keep_current = "keep current"
    undecided = "undecided"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplacementReport:
    """What many comparisons say of a new system."""

    comparisons: int
    failures: dict[str, int]
    """Comparisons that could not be read, by reason."""
    verdicts: dict[str, int]
    risks: dict[str, int]
    net_share: float | None
    net_share_95: Interval | None
    high_risk_share: float | None
    strengths: list[tuple[str, int]]
    """The points made most often, with their number."""
    weaknesses: list[tuple[str, int]]
    advice: Advice


def replacement_report(
    answers: Sequence[Assessment | ReadFailure],
    *,
    groups: Sequence[Hashable] | None = None,
    most_high_risk: float = MOST_HIGH_RISK,
    most_unreadable: float = MOST_UNREADABLE,
) -> ReplacementReport:
    """Add comparisons up.

    Args:
        answers: One per request.
        groups: One value per answer; answers of equal value, such as of one query, are not independent.
        most_high_risk: Largest share of high risk for a test.
        most_unreadable: Largest share of unreadable answers for any advice.
    """
    pairs = list(zip(answers, groups or range(len(answers)), strict=True))
    read = [(answer, group) for answer, group in pairs if isinstance(answer, Assessment)]
    worth = [_WORTH[answer.verdict] for answer, _ in read]
    interval = mean_interval(worth, groups=[group for _, group in read])
    verdicts = Counter(answer.verdict for answer, _ in read)
    risks = Counter(answer.risk for answer, _ in read)
    high_risk = risks[Risk.high] / len(read) if read else None
    enough = len(answers) - len(read) <= most_unreadable * len(answers)
    return ReplacementReport(
        comparisons=len(answers),
        failures=dict(Counter(str(answer) for answer in answers if isinstance(answer, ReadFailure)).most_common()),
        verdicts={str(verdict): verdicts[verdict] for verdict in Verdict},
        risks={str(risk): risks[risk] for risk in Risk},
        net_share=sum(worth) / len(worth) if worth else None,
        net_share_95=interval,
        high_risk_share=high_risk,
        strengths=Counter(point for answer, _ in read for point in answer.strengths).most_common(_POINTS_LISTED),
        weaknesses=Counter(point for answer, _ in read for point in answer.weaknesses).most_common(_POINTS_LISTED),
        advice=_advise(interval, high_risk, most_high_risk) if enough else Advice.undecided,
    )


def _advise(net: Interval | None, high_risk: float | None, most_high_risk: float) -> Advice:
    if net is None or high_risk is None:
        return Advice.undecided
    if net.high < 0 or high_risk > most_high_risk:
        return Advice.keep_current
    return Advice.test_online if net.low > 0 else Advice.undecided
