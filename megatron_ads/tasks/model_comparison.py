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
from megatron_ads.metrics.text import overlap
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    element,
    listed,
    read_parts,
    render_reasoned,
    split_reasoning,
    unlisted,
)
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, mean, readable, truth_facts
from megatron_ads.tasks.prompts import Template, filled, line, single_turn

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


def new_is_first(row_id: str) -> bool:
    """Return whether a row shows the new system's output first."""
    return _ORDER.wording_of(row_id) == 1


_ORDER = Template(task=f"{TASK}/order", version=1, paraphrases=("current first", "new first"))


def render_prompt(shared: SharedRequest, instruction: str = TEMPLATE.instruction(), *, new_first: bool = False) -> str:
    """Return the user's message: the instruction, the request, the outputs.

    Raises:
        DataError: If a text is empty.
    """
    current = line(Fact.current, filled("the current output", shared.current))
    new = line(Fact.new, filled("the new output", shared.new))
    request = line(Fact.request, filled("the request", shared.request))
    return "\n".join([instruction, request, *((new, current) if new_first else (current, new))])


def render_target(assessment: Assessment) -> str:
    """Return the assistant's message: reasoning, then one line per part.

    Raises:
        DataError: If a value cannot stand in a list.
    """
    lines = [
        element("Strengths", listed(assessment.strengths)),
        element("Weaknesses", listed(assessment.weaknesses)),
        element("Risk", assessment.risk),
        element("Verdict", assessment.verdict),
    ]
    return render_reasoned(assessment.reasoning, "\n".join(lines))


def chat_row(row_id: str, shared: SharedRequest, assessment: Assessment, *, group: str = "") -> ChatRow:
    """Return one example; rows of one ``group``, by default of one request, stay on one side of any split.

    Raises:
        DataError: If a text is empty.
    """
    prompt = render_prompt(shared, TEMPLATE.instruction_of(row_id), new_first=new_is_first(row_id))
    target = render_target(assessment)
    facts = {**asdict(shared), **truth_facts(assessment)}
    return single_turn(
        row_id, TASK, prompt, target, facts=facts, group=group or shared.request, label=assessment.verdict
    )


_PARTS = ("Strengths", "Weaknesses", "Risk", "Verdict")


def parse(text: str, *, reasoning_required: bool = True) -> Assessment | ReadFailure:
    """Read an answer strictly: one ``<think>`` block, then the four parts in order, and nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    given = read_parts(parts.answer, _PARTS)
    if isinstance(given, ReadFailure):
        return given
    if given["Risk"] not in set(Risk):
        return ReadFailure.unknown_risk
    if given["Verdict"] not in set(Verdict):
        return ReadFailure.unknown_verdict
    return Assessment(
        strengths=unlisted(given["Strengths"]),
        weaknesses=unlisted(given["Weaknesses"]),
        risk=Risk(given["Risk"]),
        verdict=Verdict(given["Verdict"]),
        reasoning=parts.reasoning,
    )


def metrics(rows: Sequence[ChatRow], answers: Sequence[Assessment | ReadFailure]) -> Metrics:
    """Return how well verdict and risk are met, and the F1 of the points made (ours). Unreadable answers are wrong."""
    truths = [ground_truth(row, Assessment) for row in rows]
    given = [readable(answer) for answer in answers]
    true_verdicts, verdicts = (
        [truth.verdict for truth in truths],
        [answer.verdict if answer else None for answer in given],
    )
    points = [
        overlap((*truth.strengths, *truth.weaknesses), (*answer.strengths, *answer.weaknesses)).f1 if answer else 0.0
        for truth, answer in zip(truths, given, strict=True)
    ]
    return {
        "verdict/accuracy": accuracy(true_verdicts, verdicts),
        "verdict/macro_recall": macro_recall(true_verdicts, verdicts),
        "verdict/quadratic_kappa": quadratic_kappa(true_verdicts, verdicts, list(Verdict)),
        "risk/macro_recall": macro_recall(
            [truth.risk for truth in truths], [answer.risk if answer else None for answer in given]
        ),
        "points/f1": mean(points),
    }


MAX_HIGH_RISK = 0.01
"""Largest share of outputs of high risk that a test may have."""
MAX_UNREADABLE = 0.2
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
    max_high_risk: float = MAX_HIGH_RISK,
    max_unreadable: float = MAX_UNREADABLE,
) -> ReplacementReport:
    """Add comparisons up.

    Args:
        answers: One per request.
        groups: One value per answer; answers of equal value, such as of one query, are not independent.
        max_high_risk: Largest share of high risk for a test.
        max_unreadable: Largest share of unreadable answers for any advice.
    """
    pairs = list(zip(answers, groups or range(len(answers)), strict=True))
    read = [(answer, group) for answer, group in pairs if isinstance(answer, Assessment)]
    worth = [_WORTH[answer.verdict] for answer, _ in read]
    interval = mean_interval(worth, groups=[group for _, group in read])
    verdicts = Counter(answer.verdict for answer, _ in read)
    risks = Counter(answer.risk for answer, _ in read)
    high_risk = risks[Risk.high] / len(read) if read else None
    enough = len(answers) - len(read) <= max_unreadable * len(answers)
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
        advice=_advise(interval, high_risk, max_high_risk) if enough else Advice.undecided,
    )


def _advise(net: Interval | None, high_risk: float | None, max_high_risk: float) -> Advice:
    if net is None or high_risk is None:
        return Advice.undecided
    if net.high < 0 or high_risk > max_high_risk:
        return Advice.keep_current
    return Advice.test_online if net.low > 0 else Advice.undecided
