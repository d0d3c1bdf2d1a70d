"""Query-ad relevance: how well an ad answers a query, as bad, fair or good, with the reasoning before the label.

A row asks for that label alone, or for three: whether the place fits and whether the ad is well made, too.

Source: AdNanny, sections 2 and 3.2; the labels' tags and their order are the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import DefectView, accuracy, in_view
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    Unreadable,
    count_of,
    element,
    read_choice,
    read_elements,
    strict_parser,
)
from megatron_ads.tasks.ground_truth import Metrics, judged
from megatron_ads.tasks.prompts import Ad, Template, example, line

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


def lines_of(query: str, ad: Ad) -> list[str]:
    """Return the lines of a prompt, below the instruction."""
    return [line(Fact.query, query), *ad.lines()]


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
    if (location is None) != (quality is None):
        raise DataError(f"location is {location}, quality is {quality}; both are needed, or neither.")
    template, answer = TEMPLATE, element("Label", label)
    if location is not None and quality is not None:
        template = THREE_LABELS_TEMPLATE
        answer = element("LocationLabel", location) + answer + element("AdQuality", quality)
    truth = RelevanceJudgement(label, reasoning, location, quality)
    facts: Facts = {Fact.query: query, Fact.ad: ad.as_fact()}
    return example(row_id, template, lines_of(query, ad), truth, answer, facts=facts, group=query, label=label)


_ONE, _THREE = ["Label"], ["LocationLabel", "Label", "AdQuality"]


@strict_parser(reasons=True)
def parse(answer: str, reasoning: str) -> RelevanceJudgement:
    """Read the label alone or all three in order, and nothing else."""
    labels = count_of("Label", answer)
    if labels != 1:
        raise Unreadable(ReadFailure.several_labels if labels else ReadFailure.no_label)
    elements = read_elements(answer)
    names = [name for name, _ in elements or []]
    if elements is None or not set(names) <= set(_THREE):
        raise Unreadable(ReadFailure.text_around_label)
    if names not in (_ONE, _THREE):
        raise Unreadable(ReadFailure.incomplete_labels)
    given = dict(elements)
    flags = [read_choice(given[name], Flag, ReadFailure.unknown_label) for name in names if name != "Label"]
    return RelevanceJudgement(read_choice(given["Label"], Label, ReadFailure.unknown_label), reasoning, *flags)


def metrics(rows: Sequence[ChatRow], answers: Sequence[RelevanceJudgement | ReadFailure]) -> Metrics:
    """Return the paper's tables 1 to 4 of a model's answers, each name behind the name of its view.

    The location and quality views are over the rows that ask for three labels.
    """
    pairs = judged(rows, answers, RelevanceJudgement)
    asked = [(truth, answer) for truth, answer in pairs if truth.location is not None]
    truths, labels = [truth.label for truth, _ in pairs], [answer.label if answer else None for _, answer in pairs]
    found: Metrics = {"accuracy": accuracy(truths, labels)}
    for view in (BAD_VIEW, FAIR_VIEW):
        found |= in_view(truths, labels, view)
    for view, flag in ((LOCATION_VIEW, "location"), (QUALITY_VIEW, "quality")) if asked else ():
        true_flags = [getattr(truth, flag) for truth, _ in asked]
        found |= in_view(true_flags, [getattr(answer, flag) if answer else None for _, answer in asked], view)
    return found
