"""The stages of a distillation: the teacher answers, its answers are controlled, students learn, all are judged.

    OUT/questions.jsonl         what the teacher is asked
    OUT/answers/0, 1, ...       its answers: the jobs of `label`, the first of which is learned from
    OUT/rows/STUDENT.jsonl      rows of a student, with reports of what was removed (.md, .json)
    OUT/STUDENT/                its fine-tuning, with curves and ``export/``
    OUT/judged/NAME.jsonl       answers of teacher and students to the rows that are judged
    OUT/report.md, report.json  how near the students come

The teacher's answers are what costs most: no changed setting removes them. A job of `label` refuses a folder that is
another's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from conversion.sources import open_source
from megatron_ads.config.data import SourceConfig
from megatron_ads.config.distillation import DistillConfig, Student
from megatron_ads.config.generation import EndpointConfig, ModelKind
from megatron_ads.config.recipes import load_job, validate_job
from megatron_ads.data.sources import files_of
from megatron_ads.distillation.agreement import agreement_gain
from megatron_ads.distillation.corpus import rows_file, write_corpus
from megatron_ads.distillation.questions import judged_rows, write_questions
from megatron_ads.evaluation.evaluate import evaluate
from megatron_ads.evaluation.given_answers import GivenAnswers, read_given_answers
from megatron_ads.evaluation.request import EvaluationRequest
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.report import report_of, summary, write
from megatron_ads.quickstart.job_stages import train_stage
from megatron_ads.quickstart.stages import Stage

TEACHER, DIFFERENCE = "teacher", "difference"


def stages(config: DistillConfig) -> Iterator[Stage]:
    """Yield the stages of a recipe, which is checked.

    Raises:
        ConfigError: If the student's recipe, or the one whose rows are judged, does not compose or cannot run.
        ConversionError: If the student starts from no checkpoint.
        DataError: If a source has no file.
    """
    out = Path(config.out).resolve()
    questions = out / "questions.jsonl"
    data = load_job(config.judged.recipe, config.judged_settings, sections=["data"]).data
    judged = {**asdict(data), "sources": _state(data.sources)}
    asked: list[str] = []
    if config.sources:
        yield Stage(
            name="questions", title="write the rows that the teacher is asked", outputs=[questions],
            settings={"sources": _state(config.sources), "judged": judged, "seed": config.seed},
            run=partial(write_questions, config, questions),
        )  # fmt: skip
        asked = [f"answers-{draw}" for draw in range(config.draws)]
        for draw in range(config.draws):
            yield _answers(config, questions, draw)
    yield _judging(config, TEACHER, _teacher(config), judged, after=[])
    for student in config.students:
        yield Stage(
            name=f"{student}-rows", title=f"rows of the student {student}", after=asked,
            outputs=[rows_file(out, student)], run=partial(write_corpus, config, questions, student),
            settings={
                "answered": _state(config.answered), "judged": judged if config.answered else None, "seed": config.seed,
                "quality": asdict(config.quality) if student is Student.checked else None, "samples": config.samples,
            },
        )  # fmt: skip
        yield _training(config, out, student)
        yield _judging(config, student, out / student / "export", judged, after=[student, f"{TEACHER}-scores"])
    if set(config.students) == set(Student):
        yield Stage(
            name=DIFFERENCE, title="compare the students", settings={"data": judged}, outputs=[],
            after=[f"{student}-scores" for student in Student], run=partial(_difference, config, out),
        )  # fmt: skip


def _state(sources: list[SourceConfig]) -> list[dict[str, Any]]:
    """Return what decides the rows of sources: their settings, and the sizes and times of their files."""
    return [
        {**asdict(source), "files": [[part.name, *_size_and_time(part.file)] for part in files_of(source)]}
        for source in sources
    ]


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _answers(config: DistillConfig, questions: Path, draw: int) -> Stage:
    job = config.label_job(questions, draw)

    def ask() -> Mapping[str, Any]:
        run_job(job)
        report = report_of(job)
        write(report)
        return {"summary": summary(report)}

    teacher = {name: getattr(config.teacher, name) for name in _DECIDES}
    more = {"reasoning": job.reasoning, "attempts": job.draws, "draw_temperature": job.draw_temperature}
    more |= {"log_probabilities": job.log_probabilities, "seed": job.seed}
    which = "answers to learn from" if draw == 0 else f"further draw {draw}, to compare with"
    return Stage(
        name=f"answers-{draw}", title=f"let the teacher answer: {which}", settings={**teacher, **more},
        after=["questions"], outputs=[], run=ask,
    )  # fmt: skip


_DECIDES = ("model", "temperature", "top_p", "max_tokens", "template_arguments")
"""Settings of a model that decide what it says."""


def _training(config: DistillConfig, out: Path, student: Student) -> Stage:
    settings = [
        "data=jsonl", f"data.sources=[{{kind: jsonl, path: {_quoted(rows_file(out, student))}}}]",
        f"data.validation_rows={config.student.validation_rows}", f"data.reasoning={str(config.reasoning).lower()}",
        *config.student.settings,
        f"model.load={_quoted(Path(config.student.load).resolve())}", f"log.dir={_quoted(out / student)}",
    ]  # fmt: skip
    shape = open_source(Path(config.student.load)).shape
    validate_job(load_job(config.student.recipe, settings), config.student.ranks, shape)  # before the teacher is paid
    title, recipe = f"fine-tune the student {student}", config.student.recipe
    return train_stage(student, title, settings, out, config.student.ranks, after=[f"{student}-rows"], recipe=recipe)


def _quoted(path: Path) -> str:
    """Return a path as an override of Hydra takes it, whatever characters it has."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _teacher(config: DistillConfig) -> Path | EndpointConfig:
    teacher = config.teacher
    if teacher.kind is ModelKind.local:
        return Path(teacher.model or "")
    return teacher.of_server([*teacher.servers, teacher.url or ""][0])


def _judging(
    config: DistillConfig, name: str, model: Path | EndpointConfig, data: Mapping[str, Any], *, after: list[str]
) -> Stage:
    """Return the stage that lets a model answer the rows that are judged."""
    out = Path(config.out).resolve()
    answers, others = judged_file(out, name), judged_file(out, TEACHER)
    request = EvaluationRequest(
        recipe=config.judged.recipe,
        overrides=config.judged_settings,
        batch_size=config.judged.batch_size,
        max_new_tokens=config.judged.max_new_tokens,
        answers_file=answers,
        tokenizer_folder=Path(config.teacher.tokenizer) if name == TEACHER and config.teacher.tokenizer else None,
        compare_file=None if name == TEACHER else others,
        html_file=answers.with_suffix(".html"),
    )

    def judge() -> dict[str, Any]:
        answers.parent.mkdir(exist_ok=True)
        return evaluate(model, request)

    who = {name: getattr(config.teacher, name) for name in _DECIDES} if name == TEACHER else {}
    settings = {"data": data, "longest": config.judged.max_new_tokens, **who}
    return Stage(
        name=f"{name}-scores", title=f"judge: {'the teacher' if name == TEACHER else f'the student {name}'}",
        settings=settings, after=after, outputs=[answers], resumable=True, run=judge,
    )  # fmt: skip


def _difference(config: DistillConfig, out: Path) -> dict[str, Any]:
    """Return by dataset and metric what quality control adds, ``evaluation.comparison``, and to the agreement."""
    request = EvaluationRequest(
        recipe=config.judged.recipe,
        overrides=config.judged_settings,
        batch_size=config.judged.batch_size,
        compare_file=judged_file(out, Student.unchecked),
    )
    scores = evaluate(GivenAnswers(file=judged_file(out, Student.checked)), request)
    rows = judged_rows(config).tasks
    checked, unchecked, teacher = (
        read_given_answers(judged_file(out, name), rows) for name in (Student.checked, Student.unchecked, TEACHER)
    )
    return {
        "metrics": {dataset: found["comparison"]["metrics"] for dataset, found in scores["tasks"].items()},
        "agreement": agreement_gain(checked, unchecked, teacher),
    }


def judged_file(out: Path, name: str) -> Path:
    """Return where the answers of the teacher or a student to the judged rows are."""
    return out / "judged" / f"{name}.jsonl"


def write_report(out: Path, report: str, numbers: str) -> None:
    """Write the report for people and the one for programs."""
    write_small(out / "report.md", report)
    write_small(out / "report.json", numbers)
