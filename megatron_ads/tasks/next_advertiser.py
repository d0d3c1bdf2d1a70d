"""Next advertiser: whom a user buys from next. One name in free text, or a ranking of 20 with 5 interests in XML.

Source: the advertiser paper, sections 3.2 and 3.3; its listings of the prompts are not public, so the words are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from megatron_ads.data.rows import ChatRow
from megatron_ads.tasks.conversation import filled, single_turn
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.reasoning import render_reasoned
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView, UserHistory, render_history, sections

TASK = "next_advertiser"
RANKING_TASK = "next_advertiser_ranking"
RANKED, MOST_INTERESTS = 20, 5

TEMPLATE = Template(
    task=TASK,
    version=1,
    paraphrases=(
        "Which advertiser will this user buy from next?",
        "Predict the next advertiser that this user converts with.",
        "Name the advertiser that will make the next sale to this user.",
    ),
    answer_form="Answer with the name alone.",
)
RANKING_TEMPLATE = Template(
    task=RANKING_TASK,
    version=1,
    paraphrases=(
        f"Rank the {RANKED} advertisers that this user is most likely to buy from next, and name up to "
        f"{MOST_INTERESTS} interests.",
        f"Which {RANKED} advertisers could this user convert with next, the likeliest first? Add up to "
        f"{MOST_INTERESTS} interests.",
    ),
    answer_form=(
        "Answer as <prediction><advertisers><advertiser>name</advertiser>...</advertisers>"
        "<interests><interest>text</interest>...</interests></prediction>."
    ),
)


@dataclass(frozen=True, slots=True)
class Request:
    """What the prediction is made from."""

    user: UserHistory
    """Everything in it happened before the anchor; what follows is the label."""
    pool: tuple[str, ...] = ()
    """Advertisers preset for everybody, such as the day's largest; empty shows none."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A readable answer of one name."""

    advertiser: str
    reasoning: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """A readable answer in XML; how many entries it has is for the metrics and the reward to judge."""

    advertisers: tuple[str, ...]
    """As written, the likeliest first; may repeat."""
    interests: tuple[str, ...]
    reasoning: str


def render_prompt(request: Request, instruction: str = TEMPLATE.instruction(), *, view: HistoryView = FULL_VIEW) -> str:
    """Return the user's message: the instruction, the history section by section, the pool."""
    lines = [instruction, render_history(sections(request.user, view)) or "Nothing is known of the user."]
    if request.pool:
        lines.append(f"Advertisers: {'; '.join(request.pool)}")
    return "\n".join(lines)


def render_target(advertiser: str, reasoning: str = "") -> str:
    """Return the assistant's message of the free-text form. The paper found reasoning of no use here; it may be empty.

    Raises:
        DataError: If the name is empty.
    """
    return render_reasoned(reasoning, filled("the advertiser", advertiser))


def render_ranking(advertisers: Sequence[str], interests: Sequence[str], reasoning: str = "") -> str:
    """Return the assistant's message of the XML form.

    Raises:
        DataError: If a name is empty.
    """
    names = "".join(f"<advertiser>{escape(filled('an advertiser', name))}</advertiser>" for name in advertisers)
    tags = "".join(f"<interest>{escape(filled('an interest', text))}</interest>" for text in interests)
    answer = f"<prediction><advertisers>{names}</advertisers><interests>{tags}</interests></prediction>"
    return render_reasoned(reasoning, answer)


def chat_row(
    row_id: str, request: Request, advertiser: str, reasoning: str = "", *, view: HistoryView = FULL_VIEW
) -> ChatRow:
    """Return one example of the free-text form; rows of one user stay on one side of any split.

    Raises:
        DataError: If the name is empty.
    """
    prompt = render_prompt(request, TEMPLATE.instruction_of(row_id), view=view)
    target = render_target(advertiser, reasoning)
    return single_turn(row_id, TASK, prompt, target, group=request.user.user_id, label=advertiser)


def ranking_row(
    row_id: str,
    request: Request,
    advertisers: Sequence[str],
    interests: Sequence[str],
    reasoning: str = "",
    *,
    label: str,
    view: HistoryView = FULL_VIEW,
) -> ChatRow:
    """Return one example of the XML form; ``label`` is the advertiser that the user did convert with.

    Raises:
        DataError: If a name is empty.
    """
    prompt = render_prompt(request, RANKING_TEMPLATE.instruction_of(row_id), view=view)
    target = render_ranking(advertisers, interests, reasoning)
    return single_turn(row_id, RANKING_TASK, prompt, target, group=request.user.user_id, label=label)
