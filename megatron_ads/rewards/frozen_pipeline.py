"""What rewards put into a frozen downstream pipeline: a row's own query, and the items that an answer names."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.downstream.pipeline_folder import load_pipeline
from megatron_ads.errors import require
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.next_advertiser import Prediction, Ranking
from megatron_ads.tasks.registry import TASKS, read_answer


def open_pipeline(path: str, reward: str) -> Pipeline:
    """Return the pipeline that a reward's setting names.

    Raises:
        ConfigError: If it names none.
        DataError: If there is none, or it is damaged.
    """
    require(
        bool(path.strip()),
        f"{reward} has no pipeline. Name the folder that `megatron-ads downstream train` wrote: "
        "settings: {pipeline: DIR}.",
    )
    return load_pipeline(Path(path))


def names_items(row: ChatRow) -> bool:
    """Return whether the answers to a row name items: one, or a ranking."""
    return row.task in TASKS and TASKS[row.task].answer in (Prediction, Ranking)


def can_be_read(row: ChatRow, text: str) -> bool:
    """Return whether an answer has its task's form; of rows of no known task every one has."""
    return row.task not in TASKS or not isinstance(read_answer(row, text), ReadFailure)


def named_items(row: ChatRow, text: str, pipeline: Pipeline) -> list[int]:
    """Return the numbers of the items that an answer names, in its order, each once; unknown names are left out."""
    answer = read_answer(row, text) if names_items(row) else None
    names: Sequence[str] = ()
    if isinstance(answer, Prediction):
        names = (answer.advertiser,)
    elif isinstance(answer, Ranking):
        names = answer.advertisers
    found = [number for name in names if (number := pipeline.number_of(name)) is not None]
    return list(dict.fromkeys(found))


def query_of(row: ChatRow) -> str:
    """Return what the pipeline is asked without an answer: the row's query or keyword, empty if it has none."""
    asked = next((row.facts[name] for name in (Fact.query, Fact.keyword) if name in row.facts), "")
    return str(asked)


def true_item(row: ChatRow, pipeline: Pipeline) -> int | None:
    """Return the item that a row's user bought, or whose ad its queries are for; None if the row does not say."""
    ad = row.facts.get(Fact.ad)
    seller = ad.get("seller") if isinstance(ad, dict) else None
    names = [name for name in (row.label, seller) if isinstance(name, str)]
    return next((number for name in names if (number := pipeline.number_of(name)) is not None), None)
