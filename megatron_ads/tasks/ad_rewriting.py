"""Ad rewriting and keyword extension: another wording of an ad towards a goal, and keywords it could be found by.

Source: AdNanny, section 2 (rewrites and keywords with short rationales); tags and limits are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import mean
from megatron_ads.metrics.text import overlap, words_of
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    Unreadable,
    element,
    listed,
    read_elements,
    read_parts,
    render_parts,
    strict_parser,
)
from megatron_ads.tasks.ground_truth import Metrics, judged
from megatron_ads.tasks.prompts import Ad, Template, example, filled, line

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

    @property
    def wording(self) -> str:
        """Title and text."""
        return f"{self.title} {self.text}"


_PARTS = ("Title", "Text", "Rationale")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def chat_row(row_id: str, brief: RewriteBrief, rewrite: Rewrite, *, group: str = "") -> ChatRow:
    """Return one example; rows of one ``group``, by default of one ad's title, stay on one side of any split.

    Raises:
        DataError: If a text is empty, a keyword comes twice, or one that the ad has cannot stand in a list.
    """
    if len(set(rewrite.keywords)) < len(rewrite.keywords):
        raise DataError(f"the keywords are {', '.join(rewrite.keywords)}; each may be there once.")
    ad = replace(brief.ad, title=filled("the title", brief.ad.title))
    shown = [line(Fact.goal, filled("the goal", brief.goal)), *ad.lines()]
    if brief.keywords:
        shown.append(line(Fact.keywords, listed(brief.keywords)))
    answer = [render_parts(rewrite, _PARTS), *(element("Keyword", keyword) for keyword in rewrite.keywords)]
    facts: Facts = {Fact.ad: brief.ad.as_fact(), Fact.keywords: list(brief.keywords), Fact.goal: brief.goal}
    return example(row_id, TEMPLATE, shown, rewrite, "\n".join(answer), facts=facts, group=group or brief.ad.title)


@strict_parser(reasons=True)
def parse(answer: str, reasoning: str) -> Rewrite:
    """Read the three parts in order, then keywords, and nothing else."""
    wording, _, _ = answer.partition("<Keyword>")
    given = read_parts(wording, _PARTS)
    elements = read_elements(answer.removeprefix(wording))
    if elements is None:
        raise Unreadable(ReadFailure.text_around_parts)
    if any(name != "Keyword" for name, _ in elements):
        raise Unreadable(ReadFailure.parts_out_of_order)
    keywords = tuple(value for _, value in elements)
    if not all(keywords):
        raise Unreadable(ReadFailure.empty_part)
    if len(set(keywords)) < len(keywords):
        raise Unreadable(ReadFailure.repeated_keyword)
    return Rewrite(
        title=given["Title"], text=given["Text"], rationale=given["Rationale"], keywords=keywords, reasoning=reasoning
    )


def metrics(rows: Sequence[ChatRow], answers: Sequence[Rewrite | ReadFailure]) -> Metrics:
    """Return what can be told without a judge (ours); shares are of all rows, and unreadable answers have 0.

    usable        the wording is another than the ad's, has no number that the row's facts lack, and keywords are new
    text/word_f1  words of title and text against the true rewrite
    keywords/f1   keywords against the true ones
    quality       mean of the two, 0 where not usable
    """
    pairs = judged(rows, answers, Rewrite)
    usable = [answer is not None and _is_usable(answer, row) for row, (_, answer) in zip(rows, pairs, strict=True)]
    texts = [
        overlap(words_of(truth.wording), words_of(answer.wording)).f1 if answer else 0.0 for truth, answer in pairs
    ]
    keywords = [overlap(truth.keywords, answer.keywords).f1 if answer else 0.0 for truth, answer in pairs]
    quality = [ok * (text + words) / 2 for ok, text, words in zip(usable, texts, keywords, strict=True)]
    return {
        "usable": mean(usable),
        "text/word_f1": mean(texts),
        "keywords/f1": mean(keywords),
        "quality": mean(quality),
    }


def _is_usable(rewrite: Rewrite, row: ChatRow) -> bool:
    """Return whether a rewrite changes the ad's words without inventing numbers, and its keywords are new."""
    shown = "\n".join(row.shown_texts())
    same = rewrite.title in shown and rewrite.text in shown
    invented = set(_NUMBER.findall(rewrite.wording)) - set(_NUMBER.findall(shown))
    return not same and not invented and not set(rewrite.keywords) & set(row.list_fact(Fact.keywords))
