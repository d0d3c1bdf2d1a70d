"""AdNanny's table 5: ad-user relevance as bad against the others, and how well scores order the two."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.data.rows import ChatRow
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.defect_views import defect_view, lines_beside
from megatron_ads.tasks.ad_user_relevance import BAD_VIEW, match_auc, parse
from megatron_ads.tasks.truths import readable, truth_of


def score_views(
    answers: Sequence[Answer],
    *,
    training: Sequence[ChatRow],
    best: Mapping[str, Sequence[str]] | None = None,
    reasons: bool = True,
) -> dict[str, Any]:
    """Return the bad view, with the lines of ``evaluation.defect_views`` and the AUC of each, as JSON values."""
    rows = [answer.row for answer in answers]
    truths = [str(truth_of(row, parse).score) for row in rows]
    given = [readable(parse(answer.text, reasoning_required=reasons)) for answer in answers]
    lines = lines_beside([str(found.score) if found else None for found in given], rows, training, best)
    view = defect_view(BAD_VIEW, truths, lines, [row.group or row.id for row in rows])
    for name, labels in lines.items():
        view[name]["auc"] = match_auc(truths, labels)
    return {BAD_VIEW.name: view}
