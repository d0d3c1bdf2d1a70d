"""Model comparison: may a new system replace the current one, judged on what both said to the same request.

One answer judges one request; a replacement report adds many up. Which output is shown first is drawn from the row's
id, so that a preference for a place cannot look like a preference for a system. In a report

    net share = (better - worse) / comparisons that could be read

and the advice, ours, is against a test if the new system is surely worse or its outputs are too often of high risk; for
one if it is surely better; undecided in between, and whenever too many comparisons could not be read. Surely means that
the 95 % interval of the net share, over requests, leaves out 0.

Source: AdNanny, section 2 (strengths, weaknesses, risks, aggregated into a report); tags and scales are ours.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from megatron_ads.metrics.classification import accuracy, macro_recall, quadratic_kappa
from megatron_ads.metrics.intervals import Interval, mean_interval
from megatron_ads.metrics.ranking import mean
from megatron_ads.metrics.text import overlap
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import ReadFailure, read_choice, read_parts, render_parts, strict_parser, unlisted
from megatron_ads.tasks.ground_truth import Metrics, judged
from megatron_ads.tasks.prompts import Template, example, filled, line

TASK = "model_comparison"


class Verdict(StrEnum):
    """The new system's output against the current one's."""

    worse = "Worse"
    same = "Same"
    better = "Better"


class Risk(StrEnum):
    """What showing the new system's output could do: policy, safety, plain wrong matches."""

    none = "None"
    low = "Low"
    high = "High"


TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Two systems answered the same request. Judge the new one against the current one.",
        "Compare the outputs: is the new system's better than the current system's?",
        "Could the new system replace the current one, going by this request?",
    ),
    answer_form=(
        "Answer with <Strengths>, <Weaknesses> (of the new one, lists separated by ';', or none), "
        "<Risk>None, Low or High</Risk> and <Verdict>Better, Same or Worse</Verdict>."
    ),
)


@dataclass(frozen=True, slots=True)
class SharedRequest:
    """One request and what the two systems made of it."""

    request: str
    current: str
    """Output of the system in production."""
    new: str
    """Output of the system that may replace it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """What is said of the new system's output."""

    strengths: tuple[str, ...] = ()
    weaknesses: tuple[str, ...] = ()
    risk: Risk
    verdict: Verdict
    reasoning: str = ""


_PARTS = ("Strengths", "Weaknesses", "Risk", "Verdict")
_ORDER = Template(task=f"{TASK}/order", version=1, paraphrases=("current first", "new first"))


def chat_row(row_id: str, shared: SharedRequest, assessment: Assessment, *, group: str = "") -> ChatRow:
    """Return one example; rows of one ``group``, by default of one request, stay on one side of any split.

    Raises:
        DataError: If a text is empty, or a value cannot stand in a list.
    """
    current = line(Fact.current, filled("the current output", shared.current))
    new = line(Fact.new, filled("the new output", shared.new))
    request = line(Fact.request, filled("the request", shared.request))
    outputs = (new, current) if _ORDER.wording_of(row_id) == 1 else (current, new)
    return example(
        row_id,
        TEMPLATE,
        [request, *outputs],
        assessment,
        render_parts(assessment, _PARTS),
        facts=asdict(shared),
        group=group or shared.request,
        label=assessment.verdict,
    )


@strict_parser(reasons=True)
def parse(answer: str, reasoning: str) -> Assessment:
    """Read the four parts in order, and nothing else."""
    given = read_parts(answer, _PARTS)
    return Assessment(
        risk=read_choice(given["Risk"], Risk, ReadFailure.unknown_risk),
        verdict=read_choice(given["Verdict"], Verdict, ReadFailure.unknown_verdict),
        strengths=unlisted(given["Strengths"]),
        weaknesses=unlisted(given["Weaknesses"]),
        reasoning=reasoning,
    )


def metrics(rows: Sequence[ChatRow], answers: Sequence[Assessment | ReadFailure]) -> Metrics:
    """Return how well verdict and risk are met, and the F1 of the points made (ours). Unreadable answers are wrong."""
    pairs = judged(rows, answers, Assessment)
    true_verdicts = [truth.verdict for truth, _ in pairs]
    verdicts = [answer.verdict if answer else None for _, answer in pairs]
    points = [
        overlap((*truth.strengths, *truth.weaknesses), (*answer.strengths, *answer.weaknesses)).f1 if answer else 0.0
        for truth, answer in pairs
    ]
    return {
        "verdict/accuracy": accuracy(true_verdicts, verdicts),
        "verdict/macro_recall": macro_recall(true_verdicts, verdicts),
        "verdict/quadratic_kappa": quadratic_kappa(true_verdicts, verdicts, list(Verdict)),
        "risk/macro_recall": macro_recall(
            [truth.risk for truth, _ in pairs], [answer.risk if answer else None for _, answer in pairs]
        ),
        "points/f1": mean(points),
    }


MAX_HIGH_RISK = 0.01
"""Largest share of outputs of high risk that a test may have."""
MAX_UNREADABLE = 0.2
"""Largest share of unreadable answers that any advice may rest on."""
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
    answers: Sequence[Assessment | ReadFailure], *, groups: Sequence[Hashable] | None = None
) -> ReplacementReport:
    """Add comparisons up.

    Args:
        answers: One per request.
        groups: One value per answer; answers of equal value, such as of one query, are not independent.
    """
    numbered = zip(answers, groups or range(len(answers)), strict=True)
    read, read_groups = [], []
    for answer, group in numbered:
        if isinstance(answer, Assessment):
            read.append(answer)
            read_groups.append(group)
    worth = [_WORTH[answer.verdict] for answer in read]
    interval = mean_interval(worth, groups=read_groups)
    verdicts, risks = Counter(answer.verdict for answer in read), Counter(answer.risk for answer in read)
    high_risk = risks[Risk.high] / len(read) if read else None
    enough = len(answers) - len(read) <= MAX_UNREADABLE * len(answers)
    return ReplacementReport(
        comparisons=len(answers),
        failures=dict(Counter(str(answer) for answer in answers if isinstance(answer, ReadFailure)).most_common()),
        verdicts={str(verdict): verdicts[verdict] for verdict in Verdict},
        risks={str(risk): risks[risk] for risk in Risk},
        net_share=mean(worth),
        net_share_95=interval,
        high_risk_share=high_risk,
        strengths=Counter(point for answer in read for point in answer.strengths).most_common(_POINTS_LISTED),
        weaknesses=Counter(point for answer in read for point in answer.weaknesses).most_common(_POINTS_LISTED),
        advice=_advise(interval, high_risk) if enough else Advice.undecided,
    )


def _advise(net: Interval | None, high_risk: float | None) -> Advice:
    if net is None or high_risk is None:
        return Advice.undecided
    if net.high < 0 or high_risk > MAX_HIGH_RISK:
        return Advice.keep_current
    return Advice.test_online if net.low > 0 else Advice.undecided
