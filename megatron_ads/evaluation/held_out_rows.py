"""The rows of a recipe that an evaluation is about, and how long the answers to them may be."""

from dataclasses import dataclass, replace

from megatron_ads.config.data import DataConfig
from megatron_ads.data.chat import ChatTokenizer
from megatron_ads.data.corpus import read_corpus
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.registry import TASKS

MARGIN = 1.25
"""How much longer than the longest training target an answer may become."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRows:
    """The rows of a recipe that an evaluation needs."""

    tasks: list[ChatRow]
    """Held out, of ads tasks: a model answers them."""
    general: list[ChatRow]
    """Held out, of no ads task, such as conversations: the perplexity of their targets is measured."""
    training: list[ChatRow]


def held_out(data: DataConfig, *, merge_sources: bool = False) -> EvaluationRows:
    """Read the rows of a recipe's ``data`` section.

    With ``merge_sources`` no row has the name of its source, so that results do not tell sources apart.

    Raises:
        DataError: If it holds none out.
    """
    corpus = read_corpus(data)
    if not corpus.validation:
        raise DataError("the recipe holds no rows out; raise data.validation_rows.")
    validation, training = corpus.validation, [row for rows in corpus.training for row in rows]
    if merge_sources:
        validation, training = ([replace(row, source="") for row in rows] for rows in (validation, training))
    return EvaluationRows(
        tasks=[row for row in validation if row.task in TASKS],
        general=[row for row in validation if row.task not in TASKS],
        training=training,
    )


def longest_answers(tokenizer: ChatTokenizer | None, rows: EvaluationRows, given: int | None) -> dict[str, int]:
    """Return the limit of each task in tokens: ``given``, or what the model was taught to say there and ``MARGIN``.

    Raises:
        ConfigError: If none is given and there is no tokenizer to count what was taught.
    """
    tasks = {row.task for row in (*rows.tasks, *rows.general)}
    if given:
        return dict.fromkeys(tasks, given)
    if tokenizer is None:
        raise ConfigError(
            "--url needs --max-new-tokens N, or --tokenizer DIR, by which the length of training targets is counted."
        )
    taught = dict.fromkeys(tasks, 0)
    for row in rows.training:
        taught[row.task] = max(taught.get(row.task, 0), len(tokenizer.encode(row.target)))
    # A task that is held out only may say as much as any other.
    return {task: round(MARGIN * (taught[task] or max(taught.values()))) + 1 for task in tasks}
