"""Next advertiser: whom a user buys from next. One name in free text, or a ranking of 20 with 5 interests in XML.

Source: the advertiser paper, sections 3.2 and 3.3; its listings of the prompts are not public, so the words are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from megatron_ads.metrics.ranking import (
    RECALLS,
    distinct_rate,
    each_once,
    mean,
    ndcg_at,
    position_of,
    recall_at,
    reciprocal_rank,
)
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import ReadFailure, Unreadable, strict_parser
from megatron_ads.tasks.ground_truth import Metrics, judged, readable
from megatron_ads.tasks.prompts import Template, example, filled, line
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

    @property
    def is_complete(self) -> bool:
        """Whether it has exactly the entries asked for, no advertiser twice."""
        distinct = len(each_once(self.advertisers)) == len(self.advertisers) == RANKED
        return distinct and len(self.interests) <= MOST_INTERESTS


def chat_row(
    row_id: str,
    request: AdvertiserRequest,
    advertiser: str,
    reasoning: str = "",
    *,
    item: str = "",
    view: HistoryView = FULL_VIEW,
) -> ChatRow:
    """Return one example of the free-text form; rows of one user stay on one side of any split.

    The paper found reasoning of no use here. ``item`` is what the user converts with, where that is known.

    Raises:
        DataError: If the name is empty.
    """
    truth, answer = Prediction(advertiser, reasoning), filled("the advertiser", advertiser)
    row = _example(row_id, TEMPLATE, request, truth, answer, advertiser, view)
    known = {Fact.next_item: item, Fact.next_semantic_id: view.semantic_ids.get(item, "")}
    return replace(row, facts={**row.facts, **{name: value for name, value in known.items() if value}})


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
    truth, answer = Ranking(tuple(advertisers), tuple(interests), reasoning), ranking_answer(advertisers, interests)
    return _example(row_id, RANKING_TEMPLATE, request, truth, answer, label, view)


def ranking_answer(advertisers: Sequence[str], interests: Sequence[str]) -> str:
    """Return the XML form of a ranking.

    Raises:
        DataError: If a name is empty.
    """
    names = "".join(f"<advertiser>{escape(filled('an advertiser', name))}</advertiser>" for name in advertisers)
    tags = "".join(f"<interest>{escape(filled('an interest', text))}</interest>" for text in interests)
    return f"<prediction><advertisers>{names}</advertisers><interests>{tags}</interests></prediction>"


def _example(
    row_id: str,
    template: Template,
    request: AdvertiserRequest,
    truth: Prediction | Ranking,
    answer: str,
    label: str,
    view: HistoryView,
) -> ChatRow:
    shown = [render_history(sections(request.user, view))]
    if request.pool:
        shown.append(line(Fact.pool, "; ".join(request.pool)))
    facts = {**user_facts(request.user, view), Fact.pool: list(request.pool)}
    return example(row_id, template, shown, truth, answer, facts=facts, group=request.user.user_id, label=label)


@strict_parser(reasons=False)
def parse(answer: str, reasoning: str) -> Prediction:
    """Read the free-text form: one line."""
    if not answer:
        raise Unreadable(ReadFailure.no_advertiser)
    if "\n" in answer:
        raise Unreadable(ReadFailure.several_lines)
    return Prediction(answer, reasoning)


@strict_parser(reasons=False)
def parse_ranking(answer: str, reasoning: str) -> Ranking:
    """Read the XML form: well-formed, both lists, nothing else. Too many or too few entries are no failure."""
    try:
        root = ElementTree.fromstring(answer) if "<!" not in answer and "<?" not in answer else None
    except ElementTree.ParseError:
        root = None
    if root is None or root.tag != "prediction":
        raise Unreadable(ReadFailure.not_xml)
    for name, failure in (("advertisers", ReadFailure.no_advertisers), ("interests", ReadFailure.no_interests)):
        if root.find(name) is None:
            raise Unreadable(failure)
    if [child.tag for child in root] != ["advertisers", "interests"]:
        raise Unreadable(ReadFailure.unknown_part)
    advertisers, interests = _entries(root[0], "advertiser"), _entries(root[1], "interest")
    if not advertisers:
        raise Unreadable(ReadFailure.no_advertiser)
    return Ranking(advertisers, interests, reasoning)


def _entries(part: ElementTree.Element, name: str) -> tuple[str, ...]:
    if any(child.tag != name or len(child) for child in part):
        raise Unreadable(ReadFailure.unknown_part)
    texts = tuple((child.text or "").strip() for child in part)
    if not all(texts):
        raise Unreadable(ReadFailure.empty_entry)
    return texts


def metrics(rows: Sequence[ChatRow], answers: Sequence[Prediction | ReadFailure]) -> Metrics:
    """Return how often the one name is the right one. Case and white space do not count."""
    pairs = judged(rows, answers, Prediction)
    return {
        "recall@1": recall_at(
            [position_of(truth.advertiser, [answer.advertiser] if answer else []) for truth, answer in pairs], 1
        )
    }


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
        "complete_rate": mean([answer is not None and answer.is_complete for answer in given]),
    }
