"""One row as the teacher answered it: read from the labels of a job, or taken as it is."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_ads.config.distillation import DistillConfig
from megatron_ads.distillation.questions import answered_rows, read_questions
from megatron_ads.errors import DataError
from megatron_ads.labelling.parquet_files import epoch_files, read_table
from megatron_ads.labelling.question_store import LABELS
from megatron_ads.rows import ChatRow, Fact, Message, Role
from megatron_ads.tasks.answer_format import ReadFailure, render_reasoned, split_reasoning
from megatron_ads.tasks.ground_truth import truth_facts
from megatron_ads.tasks.registry import TASKS
from megatron_ads.tasks.row_checks import fault_of

_COLUMNS = ("row", "label", "reasoning", "text", "failure", "log_probability")


class Unfit(StrEnum):
    """Why an answer is not learned from; the first that applies, in this order, is counted."""

    unreadable = "unreadable"
    """There is none, or the task's parser does not read it. All that follow are quality control."""
    too_short = "too_short"
    boilerplate = "boilerplate"
    """The reasoning mentions too few details of the row's input."""
    improbable = "improbable"
    """The teacher finds its own label improbable."""
    disagrees = "disagrees"
    """Too few of the further draws give the same label."""
    unlike_the_others = "unlike_the_others"
    """The reasoning of the further draws says something else."""
    broader_query = "broader_query"
    repeated_query = "repeated_query"
    off_topic_query = "off_topic_query"
    repeats_a_row = "repeats_a_row"
    """Its input has the same words as an earlier row's."""


@dataclass(frozen=True, slots=True)
class FurtherDraw:
    """What another answer to the same row says."""

    label: str | None
    """None: it could not be read, or its task has no labels."""
    reasoning: str
    """Empty where it could not be read."""


@dataclass(slots=True)
class TeacherAnswer:
    """One row and the teacher's answer, on its way through quality control."""

    row: ChatRow
    """With the teacher's answer as target, label and facts; of an answer that cannot be read: what was asked."""
    text: str
    """What the teacher wrote."""
    log_probability: float | None = None
    """Of the label, in nats; None: not known."""
    further: tuple[FurtherDraw, ...] = ()
    removed: Unfit | None = None
    reason: str = ""
    measured: str = ""

    @property
    def name(self) -> str:
        """The id of the row."""
        return self.row.id

    @property
    def reasoning(self) -> str:
        """The teacher's."""
        return str(self.row.facts.get(Fact.reasoning, ""))

    def remove(self, why: Unfit, reason: str = "", *, measured: str = "") -> None:
        """Take it out."""
        self.removed, self.reason, self.measured = why, reason, measured


def read_teacher_answers(config: DistillConfig, questions_file: Path, left_out: Counter[str]) -> list[TeacherAnswer]:
    """Return all rows with the teacher's answers, those asked before those that had one.

    Args:
        config: Its jobs of `label` are finished.
        questions_file: What the teacher was asked.
        left_out: Counts rows of ``answered`` that are judged.

    Raises:
        DataError: If labels are missing or damaged, or two rows have one id.
    """
    answers = list(_asked(config, questions_file)) if config.sources else []
    answers += map(answer_from_row, answered_rows(config, left_out))
    repeated = [name for name, count in Counter(answer.name for answer in answers).items() if count > 1]
    if repeated:
        raise DataError(f"id {repeated[0]!r} is that of a row in sources and of one in answered. Ids must differ.")
    return answers


def _asked(config: DistillConfig, questions_file: Path) -> Iterator[TeacherAnswer]:
    draws = [_labels_of(Path(config.label_job(questions_file, draw).out)) for draw in range(config.draws)]
    for number, question in enumerate(read_questions(questions_file)):
        first, *others = (labels.get(number) for labels in draws)
        if first is None:
            raise DataError(
                f"row {question.id!r} has no line in {config.out}/answers. Restore it, or choose another --out."
            )
        yield answer_from_labels(question, first, [other for other in others if other is not None])


def _labels_of(job: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a job's labels by the numbers of their rows."""
    tables = [read_table(file, _COLUMNS) for file in epoch_files(job / LABELS)]
    return {line["row"]: line for table in tables for line in table.to_pylist()}


def answer_from_labels(question: ChatRow, first: Mapping[str, Any], others: list[dict[str, Any]]) -> TeacherAnswer:
    """Return what a row became, from lines of labels: that of the answer to learn from, and those of further draws."""
    further = tuple(FurtherDraw(other["label"], other["reasoning"] or "") for other in others)
    text = first["text"] or ""
    if first["failure"] is not None:
        answer = TeacherAnswer(question, text)
        answer.remove(Unfit.unreadable, first["failure"])
        return answer
    answer = answer_from_row(answered_with(question, text))
    answer.text, answer.log_probability, answer.further = text, first["log_probability"], further
    return answer


def answer_from_row(row: ChatRow) -> TeacherAnswer:
    """Return a row that has the teacher's answer; removed if that cannot be read."""
    answer = TeacherAnswer(row, row.target)
    if fault := fault_of(row):
        answer.remove(Unfit.unreadable, fault.reason or str(fault.fault))
    return answer


def answered_with(question: ChatRow, text: str) -> ChatRow:
    """Return a row whose target, label and facts are those of an answer that can be read."""
    parts = split_reasoning(text, required=False)
    assert not isinstance(parts, ReadFailure), "the labels say that it can be read"
    if question.task not in TASKS:
        target = render_reasoned(parts.reasoning, parts.answer) if parts.reasoning else parts.answer
        return replace(question, messages=(*question.prompt, Message(Role.assistant, target)))
    task = TASKS[question.task]
    said = task.parse(text, reasoning_required=False)
    return replace(
        question,
        messages=(*question.prompt, Message(Role.assistant, render_reasoned(parts.reasoning, parts.answer))),
        label=None if task.label_of is None else task.label_of(said),
        facts={**question.facts, **truth_facts(said)},
    )
