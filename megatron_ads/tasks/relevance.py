"""Query-ad relevance: how well an ad answers a query, as bad, fair or good, with the reasoning before the label.

A row asks for that label alone, or for three: whether the place fits and whether the ad is well made, too.

Source: AdNanny, sections 2 and 3.2; the labels' tags and their order are the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import DefectView, accuracy, binary_metrics
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    count_of,
    element,
    read_elements,
    render_reasoned,
    split_reasoning,
)
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, readable, truth_facts
from megatron_ads.tasks.prompts import Ad, Template, line, single_turn

TASK = "query_ad_relevance"


class Label(StrEnum):
    """From the worst to the best."""

    bad = "Bad"
    fair = "Fair"
    good = "Good"


class Flag(StrEnum):
    """Whether the place fits, whether the ad is well made."""

    bad = "Bad"
    good = "Good"


BAD_VIEW = DefectView("bad", frozenset({Label.bad}))
"""Only clearly unacceptable ads are a defect."""
FAIR_VIEW = DefectView("fair", frozenset({Label.bad, Label.fair}))
"""Mediocre matches are a defect as well."""
LOCATION_VIEW = DefectView("location", frozenset({Flag.bad}))
QUALITY_VIEW = DefectView("quality", frozenset({Flag.bad}))

TEMPLATE = Template(task=TASK, version=1, paraphrases=("Is the ad relevant to the query?",))
THREE_LABELS_TEMPLATE = Template(
    task=TASK,
    version=2,
    paraphrases=(
        "Judge the ad for the query: is it relevant, does the place fit, is the ad well made?",
        "What makes this ad relevant to the query, or not? Judge the place and the ad's writing too.",
        "Would the ad serve the person who typed the query? Judge relevance, place and ad quality.",
    ),
    answer_form=(
        "Answer with <LocationLabel>Bad or Good</LocationLabel><Label>Bad, Fair or Good</Label>"
        "<AdQuality>Bad or Good</AdQuality>."
    ),
)


@dataclass(frozen=True, slots=True)
class RelevanceJudgement:
    """An answer that could be read."""

    label: Label
    reasoning: str
    location: Flag | None = None
    """None: the answer is the label alone."""
    quality: Flag | None = None


def render_prompt(query: str, ad: Ad, instruction: str = TEMPLATE.instruction()) -> str:
    """Return the user's message: the instruction in one line, then query and ad."""
    return "\n".join([instruction, line(Fact.query, query), *ad.lines()])


def render_target(label: Label, reasoning: str, *, location: Flag | None = None, quality: Flag | None = None) -> str:
    """Return the assistant's message: reasoning, then the tagged label, or the three of them.

    Raises:
        DataError: If one of location and quality is there and the other is not.
    """
    if (location is None) != (quality is None):
        raise DataError(f"location is {location}, quality is {quality}; both are needed, or neither.")
    answer = element("Label", label)
    if location is not None and quality is not None:
        answer = element("LocationLabel", location) + answer + element("AdQuality", quality)
    return render_reasoned(reasoning, answer)


def chat_row(
    row_id: str,
    query: str,
    ad: Ad,
    label: Label,
    reasoning: str,
    *,
    location: Flag | None = None,
    quality: Flag | None = None,
) -> ChatRow:
    """Return one example, of one label or of three; rows of one query stay on one side of any split.

    Raises:
        DataError: If one of location and quality is there and the other is not.
    """
    template = TEMPLATE if location is None else THREE_LABELS_TEMPLATE
    prompt = render_prompt(query, ad, template.instruction_of(row_id))
    target = render_target(label, reasoning, location=location, quality=quality)
    truth = truth_facts(RelevanceJudgement(label, reasoning, location, quality))
    facts = {Fact.query: query, Fact.ad: ad.as_fact(), **truth}
    return single_turn(row_id, TASK, prompt, target, facts=facts, group=query, label=str(label))


_ONE, _THREE = ["Label"], ["LocationLabel", "Label", "AdQuality"]


def parse(text: str, *, reasoning_required: bool = True) -> RelevanceJudgement | ReadFailure:
    """Read an answer strictly: one ``<think>`` block, then the label alone or all three in order, and nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    labels = count_of("Label", parts.answer)
    if labels != 1:
        return ReadFailure.several_labels if labels else ReadFailure.no_label
    elements = read_elements(parts.answer)
    names = [name for name, _ in elements or []]
    if elements is None or not set(names) <= set(_THREE):
        return ReadFailure.text_around_label
    if names not in (_ONE, _THREE):
        return ReadFailure.incomplete_labels
    return _read_labels(dict(elements), parts.reasoning)


def _read_labels(given: dict[str, str], reasoning: str) -> RelevanceJudgement | ReadFailure:
    try:
        return RelevanceJudgement(
            label=Label(given["Label"]),
            reasoning=reasoning,
            location=Flag(given["LocationLabel"]) if "LocationLabel" in given else None,
            quality=Flag(given["AdQuality"]) if "AdQuality" in given else None,
        )
    except ValueError:
        return ReadFailure.unknown_label


def metrics(rows: Sequence[ChatRow], answers: Sequence[RelevanceJudgement | ReadFailure]) -> Metrics:
    """Return the paper's tables 1 to 4 of a model's answers, each name behind the name of its view.

    The location and quality views are over the rows that ask for three labels.
    """
    truths = [ground_truth(row, RelevanceJudgement) for row in rows]
    given = [readable(answer) for answer in answers]
    labels = [answer.label if answer else None for answer in given]
    found: Metrics = {"accuracy": accuracy([truth.label for truth in truths], labels)}
    for view in (BAD_VIEW, FAIR_VIEW):
        found |= _in_view(view, [truth.label for truth in truths], labels)
    asked = [(truth, answer) for truth, answer in zip(truths, given, strict=True) if truth.location is not None]
    for view, attribute in ((LOCATION_VIEW, "location"), (QUALITY_VIEW, "quality")):
        if asked:
            true_flags = [getattr(truth, attribute) for truth, _ in asked]
            found |= _in_view(view, true_flags, [getattr(answer, attribute) if answer else None for _, answer in asked])
    return found


def _in_view(view: DefectView, truths: Sequence[str], predictions: Sequence[str | None]) -> Metrics:
    return {f"{view.name}/{name}": value for name, value in binary_metrics(truths, predictions, view).as_dict().items()}
