"""Keyword-based query generation: queries that are narrower than an advertiser's keyword, each with its reason.

Source: AdNanny, section 3.2 (rules); the tags are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks.conversation import filled, single_turn
from megatron_ads.tasks.elements import element
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.reasoning import render_reasoned
from megatron_ads.tasks.relevance import Ad

TASK = "query_generation"

TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Write search queries that are narrower than the keyword, stay in its category and sound natural.",
        "Which more specific searches would people type who are after what this keyword stands for?",
        "Refine the keyword into natural queries of the same category, each more specific than the keyword.",
    ),
    answer_form="Answer with <Query>text</Query><Reason>why</Reason> for each.",
)


@dataclass(frozen=True, slots=True)
class KeywordBrief:
    """What queries are written for."""

    keyword: str
    ad: Ad | None = None
    """An ad that the keyword is bid on; None: the keyword alone is known."""
    queries_wanted: int = 4


@dataclass(frozen=True, slots=True)
class GeneratedQuery:
    """One query and why it fits the keyword."""

    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Queries:
    """An answer that could be read."""

    queries: tuple[GeneratedQuery, ...]
    reasoning: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The queries without their reasons."""
        return tuple(query.text for query in self.queries)


def render_prompt(brief: KeywordBrief, instruction: str = TEMPLATE.instruction()) -> str:
    """Return the user's message: the instruction, the keyword, the ad if there is one.

    Raises:
        DataError: If the keyword is empty.
    """
    lines = [instruction, f"Keyword: {filled('the keyword', brief.keyword)}", f"Queries: {brief.queries_wanted}"]
    if brief.ad is not None:
        lines.append(f"Ad: {brief.ad.title}")
        if brief.ad.seller:
            lines.append(f"Seller: {brief.ad.seller}")
        if brief.ad.description:
            lines.append(f"Text: {brief.ad.description}")
    return "\n".join(lines)


def render_target(queries: Sequence[GeneratedQuery], reasoning: str) -> str:
    """Return the assistant's message: reasoning, then one line per query.

    Raises:
        DataError: If there is no query, or one is without text or reason.
    """
    if not queries:
        raise DataError("there are no queries; at least one is needed.")
    lines = [element("Query", query.text) + element("Reason", query.reason) for query in queries]
    return render_reasoned(reasoning, "\n".join(lines))


def chat_row(row_id: str, brief: KeywordBrief, queries: Sequence[GeneratedQuery], reasoning: str) -> ChatRow:
    """Return one example; rows of one keyword stay on one side of any split.

    Raises:
        DataError: If there is no query, or a text is empty.
    """
    prompt = render_prompt(brief, TEMPLATE.instruction_of(row_id))
    return single_turn(row_id, TASK, prompt, render_target(queries, reasoning), group=brief.keyword)
