"""Ad-user relevance: how well an ad fits what a user did lately, from 0 to 3, with the reasoning before the score.

Source: AdNanny, sections 2 and 3.2; the scale and the tag are the paper's, the words for the scale ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.errors import DataError
from megatron_ads.metrics.classification import DefectView, accuracy, auc, in_view, mean_distance, quadratic_kappa
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import (
    ReadFailure,
    element,
    read_choice,
    read_only,
    strict_parser,
)
from megatron_ads.tasks.ground_truth import Metrics, judged
from megatron_ads.tasks.prompts import Ad, Template, example
from megatron_ads.tasks.user_history import FULL_VIEW, HistoryView, UserHistory, render_history, sections, user_facts

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
class UserRelevanceJudgement:
    """An answer that could be read."""

    score: Score
    reasoning: str


def chat_row(
    row_id: str, user: UserHistory, ad: Ad, score: Score | int, reasoning: str, *, view: HistoryView = FULL_VIEW
) -> ChatRow:
    """Return one example; rows of one user stay on one side of any split.

    Raises:
        DataError: If the score is not on the scale.
    """
    if str(score) not in set(Score):
        raise DataError(f"the score is {score!r}; it must be one of {', '.join(Score)}.")
    truth = UserRelevanceJudgement(Score(str(score)), reasoning)
    shown = [render_history(sections(user, view)), *ad.lines()]
    facts = {**user_facts(user, view), Fact.ad: ad.as_fact()}
    answer = element("Score", truth.score)
    return example(row_id, TEMPLATE, shown, truth, answer, facts=facts, group=user.user_id, label=truth.score)


@strict_parser(reasons=True)
def parse(answer: str, reasoning: str) -> UserRelevanceJudgement:
    """Read one score of the scale, and nothing else."""
    score = read_choice(read_only("Score", answer), Score, ReadFailure.score_outside_scale)
    return UserRelevanceJudgement(score, reasoning)


def metrics(rows: Sequence[ChatRow], answers: Sequence[UserRelevanceJudgement | ReadFailure]) -> Metrics:
    """Return the paper's table 5, where RR is ``bad/defect_rate``, and the agreement on the whole scale."""
    pairs = judged(rows, answers, UserRelevanceJudgement)
    truths, scores = [truth.score for truth, _ in pairs], [answer.score if answer else None for _, answer in pairs]
    return {
        **in_view(truths, scores, BAD_VIEW),
        "auc": match_auc(truths, scores),
        "accuracy": accuracy(truths, scores),
        "quadratic_kappa": quadratic_kappa(truths, scores, list(Score)),
        "mean_distance": mean_distance(truths, scores, list(Score)),
    }


def match_auc(truths: Sequence[str], scores: Sequence[str | None]) -> float | None:
    """Return how well scores order matches above bad ads; None unless both are there.

    An unreadable answer ranks below all others if the ad is a match, and above all others if not (ours).
    """
    positives = [truth not in BAD_VIEW.defects for truth in truths]
    return auc(positives, [math.nan if score is None else float(score) for score in scores])
