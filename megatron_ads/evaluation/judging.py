"""Everything that answers are judged with: the rows, what was trained on, valid names, another model, a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from megatron_ads.config.data import DataConfig
from megatron_ads.config.generation import Method
from megatron_ads.downstream.pipeline import Pipeline
from megatron_ads.downstream.pipeline_folder import load_pipeline
from megatron_ads.errors import ConfigError
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.comparison import add_comparisons, on_the_same_rows
from megatron_ads.evaluation.given_answers import read_given_answers
from megatron_ads.evaluation.held_out_rows import EvaluationRows, held_out
from megatron_ads.evaluation.request import EvaluationRequest
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on, read_names, valid_names
from megatron_ads.rewards.frozen_pipeline import names_items


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """What one evaluation judges with."""

    rows: EvaluationRows
    advertisers: AdvertiserNames
    compared: Sequence[Answer] | None
    """Another model's; None: there is none."""
    compared_name: str
    pipeline: Pipeline | None
    ground: bool

    @classmethod
    def prepare(cls, data: DataConfig, request: EvaluationRequest) -> Self:
        """Read everything, so that what cannot be used is refused before a model answers.

        Raises:
            ConfigError: If what is asked for has no effect on the rows.
            DataError: If the recipe holds no rows out, or a file cannot be used.
        """
        rows = held_out(data, merge_sources=request.merge_sources)
        advertisers = read_names(request.names_file) if request.names_file else names_trained_on(rows.training)
        if request.how.method is Method.constrained_beam:
            _require_names(rows, advertisers)
        compared = None
        if file := request.compare_file:
            compared = read_given_answers(file, rows.tasks, allow_missing=request.allow_missing)
        return cls(
            rows=rows,
            advertisers=advertisers,
            compared=compared,
            compared_name=request.compare_file.stem if request.compare_file else "",
            pipeline=_pipeline(rows, request),
            ground=request.ground,
        )

    def scores(self, answers: Sequence[Answer]) -> tuple[dict[str, dict[str, Any]], Sequence[Answer]]:
        """Return ``task_scores``, with comparisons where there is another model, and the answers that they are of.

        Raises:
            DataError: If both models answered no row in common.
        """
        if self.compared is None:
            return self._scores(answers), answers
        answers, compared = on_the_same_rows(answers, self.compared)
        found = self._scores(answers)
        beside = self._scores(compared)
        add_comparisons(
            found,
            beside,
            answers,
            compared,
            name=self.compared_name,
            training=self.rows.training,
            pipeline=self.pipeline,
        )
        return found, answers

    def _scores(self, answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
        return task_scores(
            answers, self.rows.training, self.advertisers, ground=self.ground, pipeline=self.pipeline
        )  # fmt: skip


def _pipeline(rows: EvaluationRows, request: EvaluationRequest) -> Pipeline | None:
    if request.pipeline_folder is None:
        return None
    if not any(map(names_items, rows.tasks)):
        tasks = ", ".join(sorted({row.task for row in rows.tasks}))
        raise ConfigError(
            f"--pipeline has no effect: no held-out row, of {tasks}, is answered with items. Leave it out."
        )
    return load_pipeline(request.pipeline_folder)


def _require_names(rows: EvaluationRows, advertisers: AdvertiserNames) -> None:
    """Refuse constrained beams where no row is answered with a name."""
    if all(valid_names(row, advertisers) is None for row in rows.tasks):
        held = [*rows.tasks, *rows.general]
        tasks = ", ".join(sorted({row.task for row in held}))
        raise ConfigError(
            f"--decode constrained-beam has no effect: none of the {len(held)} held-out rows, of {tasks}, "
            "is answered with a name; leave it out."
        )
