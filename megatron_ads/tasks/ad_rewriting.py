"""Ad rewriting and keyword extension: another wording of an ad towards a goal, and keywords it could be found by.

Source: AdNanny, section 2 (rewrites and keywords with short rationales); tags and limits are ours.
"""

from dataclasses import dataclass

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.tasks.conversation import filled, single_turn
from megatron_ads.tasks.elements import element
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.reasoning import render_reasoned
from megatron_ads.tasks.relevance import Ad

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
        DataError: If the ad has no title, or the goal no text.
    """
    lines = [instruction, f"Goal: {filled('the goal', brief.goal)}", f"Ad: {filled('the title', brief.ad.title)}"]
    if brief.ad.seller:
        lines.append(f"Seller: {brief.ad.seller}")
    if brief.ad.description:
        lines.append(f"Text: {brief.ad.description}")
    if brief.keywords:
        lines.append(f"Keywords: {'; '.join(brief.keywords)}")
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
    return single_turn(row_id, TASK, prompt, render_target(rewrite), group=group or brief.ad.title)
