"""Next advertiser: whom a user buys from next. One name in free text, or a ranking of 20 with 5 interests in XML.

Source: the advertiser paper, sections 3.2 and 3.3; its listings of the prompts are not public, so the words are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from megatron_ads.metrics.ranking import RECALLS, distinct_rate, ndcg_at, position_of, recall_at, reciprocal_rank
from megatron_ads.rows import ChatRow, Fact, Facts
from megatron_ads.tasks.answer_format import ReadFailure, render_reasoned, split_reasoning
from megatron_ads.tasks.ground_truth import Metrics, ground_truth, readable, share, truth_facts
from megatron_ads.tasks.prompts import Template, filled, line, single_turn
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView, UserHistory, render_history, sections, user_facts

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
class AdvertiserRequest:
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


def render_prompt(
    request: AdvertiserRequest, instruction: str = TEMPLATE.instruction(), *, view: HistoryView = FULL_VIEW
) -> str:
    """Return the user's message: the instruction, the history section by section, the pool."""
    lines = [instruction, render_history(sections(request.user, view))]
    if request.pool:
        lines.append(line(Fact.pool, "; ".join(request.pool)))
    return "\n".join(lines)


def _request_facts(request: AdvertiserRequest, view: HistoryView) -> Facts:
    return {**user_facts(request.user, view), Fact.pool: list(request.pool)}


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
    row_id: str, request: AdvertiserRequest, advertiser: str, reasoning: str = "", *, view: HistoryView = FULL_VIEW
) -> ChatRow:
    """Return one example of the free-text form; rows of one user stay on one side of any split.

    Raises:
        DataError: If the name is empty.
    """
    prompt = render_prompt(request, TEMPLATE.instruction_of(row_id), view=view)
    target = render_target(advertiser, reasoning)
    facts = {**_request_facts(request, view), **truth_facts(Prediction(advertiser, reasoning))}
    return single_turn(row_id, TASK, prompt, target, facts=facts, group=request.user.user_id, label=advertiser)


def ranking_row(
    row_id: str,
    request: AdvertiserRequest,
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
    truth = truth_facts(Ranking(tuple(advertisers), tuple(interests), reasoning))
    facts = {**_request_facts(request, view), **truth}
    return single_turn(row_id, RANKING_TASK, prompt, target, facts=facts, group=request.user.user_id, label=label)


def parse(text: str, *, reasoning_required: bool = False) -> Prediction | ReadFailure:
    """Read the free-text form: one line after the reasoning, which may be missing."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    if not parts.answer:
        return ReadFailure.no_advertiser
    if "\n" in parts.answer:
        return ReadFailure.several_lines
    return Prediction(advertiser=parts.answer, reasoning=parts.reasoning)


def parse_ranking(text: str, *, reasoning_required: bool = False) -> Ranking | ReadFailure:
    """Read the XML form: well-formed, both lists, nothing else. Too many or too few entries are no failure."""
    parts = split_reasoning(text, required=reasoning_required)
    if isinstance(parts, ReadFailure):
        return parts
    if "<!" in parts.answer or "<?" in parts.answer:
        return ReadFailure.not_xml
    try:
        root = ElementTree.fromstring(parts.answer)
    except ElementTree.ParseError:
        return ReadFailure.not_xml
    if root.tag != "prediction":
        return ReadFailure.not_xml
    for name, failure in (("advertisers", ReadFailure.no_advertisers), ("interests", ReadFailure.no_interests)):
        if root.find(name) is None:
            return failure
    if [child.tag for child in root] != ["advertisers", "interests"]:
        return ReadFailure.unknown_part
    advertisers, interests = _entries(root[0], "advertiser"), _entries(root[1], "interest")
    if isinstance(advertisers, ReadFailure):
        return advertisers
    if isinstance(interests, ReadFailure):
        return interests
    if not advertisers:
        return ReadFailure.no_advertiser
    return Ranking(tuple(advertisers), tuple(interests), parts.reasoning)


def _entries(part: ElementTree.Element, name: str) -> list[str] | ReadFailure:
    if any(child.tag != name or len(child) for child in part):
        return ReadFailure.unknown_part
    texts = [(child.text or "").strip() for child in part]
    return texts if all(texts) else ReadFailure.empty_entry


def metrics(rows: Sequence[ChatRow], answers: Sequence[Prediction | ReadFailure]) -> Metrics:
    """Return how often the one name is the right one. Case and white space do not count."""
    truths = [ground_truth(row, Prediction).advertiser for row in rows]
    given = [readable(answer) for answer in answers]
    positions = [
        position_of(truth, [answer.advertiser] if answer else []) for truth, answer in zip(truths, given, strict=True)
    ]
    return {"recall@1": recall_at(positions, 1)}


def ranking_metrics(rows: Sequence[ChatRow], answers: Sequence[Ranking | ReadFailure]) -> Metrics:
    """Return the paper's recalls, with NDCG and MRR; the truth is the row's label. Unreadable answers find nothing."""
    given = [readable(answer) for answer in answers]
    rankings = [answer.advertisers if answer else () for answer in given]
    positions = [position_of(row.label or "", ranking) for row, ranking in zip(rows, rankings, strict=True)]
    return {
        **{f"recall@{k}": recall_at(positions, k) for k in RECALLS},
        f"ndcg@{RANKED}": ndcg_at(positions, RANKED),
        "mrr": reciprocal_rank(positions),
        "distinct_rate": distinct_rate(rankings),
        "complete_rate": share([answer is not None and is_complete(answer) for answer in given]),
    }


def is_complete(ranking: Ranking) -> bool:
    """Return whether a ranking has exactly the entries asked for, no advertiser twice."""
    distinct = len(set(ranking.advertisers)) == len(ranking.advertisers) == RANKED
    return distinct and len(ranking.interests) <= MOST_INTERESTS
