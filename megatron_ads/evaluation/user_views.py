"""AdNanny's table 5: ad-user relevance as bad against the others, and how well scores order the two."""

from collections.abc import Sequence
from typing import Any

from megatron_ads.data.rows import ChatRow
from megatron_ads.evaluation.answer import Answer
from megatron_ads.evaluation.defect_views import best_labels, defect_view, lines_beside
from megatron_ads.tasks.ad_user_relevance import BAD_VIEW, UserRelevanceJudgement, match_auc, parse
from megatron_ads.tasks.ground_truth import ground_truth, readable


def score_views(
    answers: Sequence[Answer],
    *,
    training: Sequence[ChatRow],
    reasons: bool = True,
) -> dict[str, Any]:
    """Return the bad view, with the lines of ``evaluation.defect_views`` and the AUC of each, as JSON values."""
    rows = [answer.row for answer in answers]
    truths = [str(ground_truth(row, UserRelevanceJudgement).score) for row in rows]
    given = [readable(parse(answer.text, reasoning_required=reasons)) for answer in answers]
    lines = lines_beside(
        [str(found.score) if found else None for found in given], rows, training, best=best_labels(rows)
    )
    view = defect_view(BAD_VIEW, truths, lines, [row.group or row.id for row in rows])
    for name, labels in lines.items():
        view[name]["auc"] = match_auc(truths, labels)
    return {BAD_VIEW.name: view}
