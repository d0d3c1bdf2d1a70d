"""The report that comparisons of two systems add up to: as the model has them, and as the true answers do."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_ads.evaluation.answer import Answer
from megatron_ads.tasks.ground_truth import ground_truth
from megatron_ads.tasks.model_comparison import Assessment, parse, replacement_report


def replacement_scores(answers: Sequence[Answer], *, reasons: bool = True) -> dict[str, Any]:
    """Return ``tasks.replacement_report`` by ``model`` and by ``truth`` as JSON values.

    Raises:
        DataError: If a row's facts have no ground truth.
    """
    groups = [answer.row.group or answer.row.id for answer in answers]
    model = [parse(answer.text, reasoning_required=reasons) for answer in answers]
    truth = [ground_truth(answer.row, Assessment) for answer in answers]
    return {
        "model": asdict(replacement_report(model, groups=groups)),
        "truth": asdict(replacement_report(truth, groups=groups)),
    }
