"""The true answer in texts, and whether an answer is the true one: what several rewards compare."""

from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow, Fact, JsonValue, texts_in
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.answer_texts import said_text
from megatron_ads.tasks.ground_truth import agrees
from megatron_ads.tasks.registry import TASKS, read_answer


def true_text(row: ChatRow) -> str:
    """Return the texts of a row's true answer: its ground truth, or else its target.

    Raises:
        DataError: If it has neither.
    """
    if text := _joined(row.facts.get(Fact.ground_truth)) or said_text(row, row.target):
        return text
    raise DataError(f"row {row.id!r} of task {row.task} has no true answer in texts to compare answers with.")


def is_true(row: ChatRow, text: str) -> bool:
    """Return whether an answer is the true one: its label where the task has labels, or else all that it says.

    Names and texts are compared folded. An answer that cannot be read is not true.

    Raises:
        DataError: If the row has no true answer.
    """
    task = TASKS.get(row.task)
    if task is None:
        return same_name(said_text(row, text)) == same_name(true_text(row))
    answer = read_answer(row, text)
    if isinstance(answer, ReadFailure):
        return False
    if task.label_of is not None and row.label is not None:
        return same_name(task.label_of(answer)) == same_name(row.label)
    return agrees(answer, row)


def _joined(value: JsonValue) -> str:
    return " ".join(texts_in(value))
