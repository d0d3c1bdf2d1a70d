"""Ad rewriting and keyword extension: another wording of an ad towards a goal, and keywords it could be found by.

Source: AdNanny, section 2 (rewrites and keywords with short rationales); tags and limits are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ads.errors import DataError
from megatron_ads.metrics.text import overlap, words_of
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    element,
    listed,
    read_elements,
    read_parts,
    render_reasoned,
    split_reasoning,
)
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, mean, readable, share, truth_facts
from megatron_ads.tasks.prompts import Ad, Template, filled, line, single_turn

TASK = "ad_rewriting"

TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Rewrite the ad towards the goal without changing its facts, and add keywords with the same intent.",
        "Write a better version of this ad for the goal, and list further keywords that should find it.",
        "Improve the ad as the goal asks; the facts stay. Extend its keywords.",
    ),
    answer_form=(
        "Answer with <Title>, <Text>, <Rationale>, then <Keyword>text</Keyword> for each keyword that is not there yet."
    ),
)


@dataclass(frozen=True, slots=True)
class RewriteBrief:
    """What is to be rewritten."""

    ad: Ad
    keywords: tuple[str, ...] = ()
    """Keywords the ad has already."""
    goal: str = "clear and correct writing"
    """Such as: emphasise the price."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrite:
    """A new wording and new keywords."""

    title: str
    text: str
    rationale: str
    """In short: what changed, for what."""
    keywords: tuple[str, ...] = ()
    reasoning: str = ""


def render_prompt(brief: RewriteBrief, instruction: str = TEMPLATE.instruction()) -> str:
    """Return the user's message: the instruction, the goal, the ad, its keywords.

    Raises:
        DataError: If the ad has no title, the goal no text, or a keyword cannot stand in a list.
    """
    ad = replace(brief.ad, title=filled("the title", brief.ad.title))
    lines = [instruction, line(Fact.goal, filled("the goal", brief.goal)), *ad.lines()]
    if brief.keywords:
        lines.append(line(Fact.keywords, listed(brief.keywords)))
    return "\n".join(lines)


def render_target(rewrite: Rewrite) -> str:
    """Return the assistant's message: reasoning, then one line per part.

    Raises:
        DataError: If a text is empty, or a keyword comes twice.
    """
    if len(set(rewrite.keywords)) < len(rewrite.keywords):
        raise DataError(f"the keywords are {', '.join(rewrite.keywords)}; each may be there once.")
    lines = [
        element("Title", rewrite.title),
        element("Text", rewrite.text),
        element("Rationale", rewrite.rationale),
        *(element("Keyword", keyword) for keyword in rewrite.keywords),
    ]
    return render_reasoned(rewrite.reasoning, "\n".join(lines))


def chat_row(row_id: str, brief: RewriteBrief, rewrite: Rewrite, *, group: str = "") -> ChatRow:
    """Return one example; rows of one ``group``, by default of one ad's title, stay on one side of any split.

    Raises:
        DataError: If a text is empty.
    """
    prompt = render_prompt(brief, TEMPLATE.instruction_of(row_id))
    facts = {
        Fact.ad: brief.ad.as_fact(),
        Fact.keywords: list(brief.keywords),
        Fact.goal: brief.goal,
        **truth_facts(rewrite),
    }
    return single_turn(row_id, TASK, prompt, render_target(rewrite), facts=facts, group=group or brief.ad.title)


_PARTS = ("Title", "Text", "Rationale")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def parse(text: str, *, reasoning_required: bool = True) -> Rewrite | ReadFailure:
    """Read an answer strictly: one ``<think>`` block, the three parts in order, then keywords, and nothing else."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    wording, _, _ = parts.answer.partition("<Keyword>")
    given = read_parts(wording, _PARTS)
    if isinstance(given, ReadFailure):
        return given
    elements = read_elements(parts.answer.removeprefix(wording))
    if elements is None:
        return ReadFailure.text_around_parts
    if any(name != "Keyword" for name, _ in elements):
        return ReadFailure.parts_out_of_order
    keywords = tuple(value for _, value in elements)
    if not all(keywords):
        return ReadFailure.empty_part
    if len(set(keywords)) < len(keywords):
        return ReadFailure.repeated_keyword
    return Rewrite(
        title=given["Title"],
        text=given["Text"],
        rationale=given["Rationale"],
        keywords=keywords,
        reasoning=parts.reasoning,
    )


def metrics(rows: Sequence[ChatRow], answers: Sequence[Rewrite | ReadFailure]) -> Metrics:
    """Return what can be told without a judge (ours); shares are of all rows, and unreadable answers have 0.

    usable        the wording is another than the ad's, has no number that the row's facts lack, and keywords are new
    text/word_f1  words of title and text against the true rewrite
    keywords/f1   keywords against the true ones
    quality       mean of the two, 0 where not usable
    """
    checked = [(row, ground_truth(row, Rewrite), readable(answer)) for row, answer in zip(rows, answers, strict=True)]
    usable = [answer is not None and is_usable(answer, row) for row, _, answer in checked]
    texts = [_text_f1(truth, answer) if answer else 0.0 for _, truth, answer in checked]
    keywords = [overlap(truth.keywords, answer.keywords).f1 if answer else 0.0 for _, truth, answer in checked]
    quality = [ok * (text + words) / 2 for ok, text, words in zip(usable, texts, keywords, strict=True)]
    return {
        "usable": share(usable),
        "text/word_f1": mean(texts),
        "keywords/f1": mean(keywords),
        "quality": mean(quality),
    }


def is_usable(rewrite: Rewrite, row: ChatRow) -> bool:
    """Return whether a rewrite changes the ad's words without inventing numbers, and its keywords are new."""
    shown = "\n".join(row.shown_texts())
    same = rewrite.title in shown and rewrite.text in shown
    invented = set(_NUMBER.findall(f"{rewrite.title} {rewrite.text}")) - set(_NUMBER.findall(shown))
    return not same and not invented and not set(rewrite.keywords) & set(row.list_fact(Fact.keywords))


def _text_f1(truth: Rewrite, answer: Rewrite) -> float:
    return overlap(words_of(f"{truth.title} {truth.text}"), words_of(f"{answer.title} {answer.text}")).f1
