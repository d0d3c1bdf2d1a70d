"""Ad-user relevance: how well an ad fits what a user did lately, from 0 to 3, with the reasoning before the score.

Source: AdNanny, sections 2 and 3.2; the scale and the tag are the paper's, the words for the scale ours.
"""

from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.data.rows import ChatRow
from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import DefectView
from megatron_ads.tasks.conversation import single_turn
from megatron_ads.tasks.elements import element
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.reasoning import render_reasoned
from megatron_ads.tasks.relevance import Ad
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView, UserHistory, render_history, sections

TASK = "ad_user_relevance"


class Score(StrEnum):
    """From irrelevant to highly relevant."""

    irrelevant = "0"
    weak = "1"
    relevant = "2"
    high = "3"


BAD_VIEW = DefectView("bad", frozenset({Score.irrelevant}))
"""The paper's Bad against Others; which scores are bad it does not say, so 0 alone (ours)."""

TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "How relevant is the ad to this user?",
        "Judge how well the ad fits what this user did lately.",
        "Would this ad interest the user? Grade it.",
        "Why might this user click the ad, or not? Grade the match.",
    ),
    answer_form="Answer with <Score>0 to 3</Score>: 0 irrelevant, 1 weakly related, 2 relevant, 3 highly relevant.",
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer that could be read."""

    score: Score
    reasoning: str


def render_prompt(
    user: UserHistory, ad: Ad, instruction: str = TEMPLATE.instruction(), *, view: HistoryView = FULL_VIEW
) -> str:
    """Return the user's message: the instruction, the history section by section, the ad."""
    lines = [instruction, render_history(sections(user, view)) or "Nothing is known of the user."]
    lines.append(f"Ad: {ad.title}")
    if ad.seller:
        lines.append(f"Seller: {ad.seller}")
    if ad.description:
        lines.append(f"Text: {ad.description}")
    return "\n".join(lines)


def render_target(score: Score | int, reasoning: str) -> str:
    """Return the assistant's message: reasoning, then the tagged score.

    Raises:
        DataError: If the score is not on the scale.
    """
    return render_reasoned(reasoning, element("Score", as_score(score)))


def as_score(score: Score | int | str) -> Score:
    """Return the score as one of the scale.

    Raises:
        DataError: If it is not on the scale.
    """
    if str(score) not in set(Score):
        raise DataError(f"the score is {score!r}; it must be one of {', '.join(Score)}.")
    return Score(str(score))


def chat_row(
    row_id: str, user: UserHistory, ad: Ad, score: Score | int, reasoning: str, *, view: HistoryView = FULL_VIEW
) -> ChatRow:
    """Return one example; rows of one user stay on one side of any split.

    Raises:
        DataError: If the score is not on the scale.
    """
    prompt = render_prompt(user, ad, TEMPLATE.instruction_of(row_id), view=view)
    target = render_target(score, reasoning)
    return single_turn(row_id, TASK, prompt, target, group=user.user_id, label=as_score(score))
