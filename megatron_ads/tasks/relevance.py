"""Query-ad relevance: how well an ad answers a query, as bad, fair or good, with the reasoning before the label.

Source: AdNanny, sections 2 and 3.2; the label's tag is the paper's.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.data.rows import ChatRow, Message, Role
from megatron_ads.metrics.classification import DefectView

TASK = "query_ad_relevance"


class Label(StrEnum):
    """From the worst to the best."""

    bad = "Bad"
    fair = "Fair"
    good = "Good"


BAD_VIEW = DefectView("bad", frozenset({Label.bad}))
"""Only clearly unacceptable ads are a defect."""
FAIR_VIEW = DefectView("fair", frozenset({Label.bad, Label.fair}))
"""Mediocre matches are a defect as well."""


class Failure(StrEnum):
    """Why an answer cannot be read; the first that applies is reported."""

    empty = "empty"
    no_reasoning = "no_reasoning"
    """No ``<think>`` block, or an empty one."""
    unclosed_reasoning = "unclosed_reasoning"
    """``<think>`` without ``</think>``: usually the answer was cut off."""
    no_label = "no_label"
    """No ``<Label>...</Label>`` after the reasoning."""
    several_labels = "several_labels"
    unknown_label = "unknown_label"
    text_around_label = "text_around_label"
    """Something other than the label follows the reasoning."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer that could be read."""

    label: Label
    reasoning: str


@dataclass(frozen=True, slots=True)
class Ad:
    """What the judge sees of an ad."""

    title: str
    description: str = ""
    seller: str = ""
    """Brand, advertiser or domain; empty if unknown."""


def render_prompt(query: str, ad: Ad) -> str:
    """Return the user's message: the instruction in one line, then query and ad."""
    lines = ["Is the ad relevant to the query?", f"Query: {query}", f"Ad: {ad.title}"]
    if ad.seller:
        lines.append(f"Seller: {ad.seller}")
    if ad.description:
        lines.append(f"Text: {ad.description}")
    return "\n".join(lines)


def render_target(label: Label, reasoning: str) -> str:
    """Return the assistant's message: reasoning, then the tagged label."""
    return f"<think>{reasoning}</think><Label>{label}</Label>"


def chat_row(row_id: str, query: str, ad: Ad, label: Label, reasoning: str) -> ChatRow:
    """Return one example; rows of one query stay on one side of any split."""
    messages = (
        Message(Role.user, render_prompt(query, ad)),
        Message(Role.assistant, render_target(label, reasoning)),
    )
    return ChatRow(id=row_id, task=TASK, messages=messages, group=query, label=str(label))


_LABEL = re.compile(r"<Label>(.*?)</Label>", re.DOTALL)


def parse(text: str) -> Judgement | Failure:
    """Read an answer strictly: one ``<think>`` block, then one label of the three, and nothing else."""
    answer = text.strip()
    if not answer:
        return Failure.empty
    if not answer.startswith("<think>"):
        return Failure.no_reasoning
    reasoning, closing, rest = answer.removeprefix("<think>").partition("</think>")
    if not closing:
        return Failure.unclosed_reasoning
    if not reasoning.strip():
        return Failure.no_reasoning
    return _parse_label(reasoning.strip(), rest.strip())


def _parse_label(reasoning: str, rest: str) -> Judgement | Failure:
    found = _LABEL.findall(rest)
    if not found:
        return Failure.no_label
    if len(found) > 1:
        return Failure.several_labels
    if found[0] not in {str(label) for label in Label}:
        return Failure.unknown_label
    if _LABEL.sub("", rest):
        return Failure.text_around_label
    return Judgement(label=Label(found[0]), reasoning=reasoning)
