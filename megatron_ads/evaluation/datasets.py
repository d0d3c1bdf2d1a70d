"""Which rows are scored together: those of one task and one source, as the papers have a line for each dataset."""

from collections import defaultdict
from collections.abc import Sequence

from megatron_ads.rows import ChatRow


def dataset_names(rows: Sequence[ChatRow]) -> list[str]:
    """Return what results call the dataset of each row: its task, and of a task with several sources the source too."""
    sources = defaultdict(set)
    for row in rows:
        sources[row.task].add(row.source)
    return [f"{row.task}, {row.source}" if len(sources[row.task]) > 1 else row.task for row in rows]
