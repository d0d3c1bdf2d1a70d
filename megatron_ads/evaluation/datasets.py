"""Which rows are scored together: those of one task and one source, as the papers have a line for each dataset."""

from collections import defaultdict
from collections.abc import Sequence

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.rows import ChatRow


def dataset_names(rows: Sequence[ChatRow]) -> list[str]:
    """Return what results call the dataset of each row: its task, and of a task with several sources the source too."""
    sources = defaultdict(set)
    for row in rows:
        sources[row.task].add(row.source)
    return [f"{row.task}, {row.source}" if len(sources[row.task]) > 1 else row.task for row in rows]


def rows_beside(answers: Sequence[Answer], training: Sequence[ChatRow]) -> list[ChatRow]:
    """Return the training rows of the task, those of the same sources if there are any."""
    sources = {answer.row.source for answer in answers}
    of_task = [row for row in training if row.task == answers[0].row.task]
    return [row for row in of_task if row.source in sources] or of_task
