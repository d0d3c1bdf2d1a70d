"""The stages of a distillation: the teacher answers, its answers are controlled, students learn, all are judged.

    OUT/questions.jsonl         what the teacher is asked
    OUT/answers/0, 1, ...       its answers: the jobs of `label`, the first of which is learned from
    OUT/rows/STUDENT.jsonl      rows of a student, with reports of what was removed (.md, .json)
    OUT/STUDENT/                its fine-tuning, with curves and ``export/``
    OUT/on_policy/              the on-policy distillation of the first student, where it has steps
    OUT/judged/NAME.jsonl       answers of teacher and students to the rows that are judged
    OUT/report.md, report.json  how near the students come

The teacher's answers are what costs most: no changed setting removes them. A job of `label` refuses a folder that is
another's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from conversion.atomic_file import write_small
from conversion.sources import open_source
from megatron_ads.config.data import SourceConfig
from megatron_ads.config.distillation import DistillConfig, Student
from megatron_ads.config.generation import EndpointConfig, ModelKind
from megatron_ads.config.labelling import LabellerConfig
from megatron_ads.config.recipes import load_job, validate_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.config.run import RunConfig
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.data.sources import files_of
from megatron_ads.distillation.agreement import agreement_gain
from megatron_ads.distillation.corpus import rows_file, write_corpus
from megatron_ads.distillation.questions import judged_rows, write_questions
from megatron_ads.evaluation.evaluate import evaluate
from megatron_ads.evaluation.given_answers import GivenAnswers, read_given_answers
from megatron_ads.evaluation.request import EvaluationRequest
from megatron_ads.inference.model_folder import tokenizer_folder
from megatron_ads.labelling.job import run_job
from megatron_ads.labelling.report import report_of, summary, write
from megatron_ads.quickstart.job_stages import train_stage
from megatron_ads.quickstart.stages import Stage
from megatron_ads.training.rollout.teacher import require_same_tokens

TEACHER, ON_POLICY, DIFFERENCE, ON_POLICY_DIFFERENCE = "teacher", "on_policy", "difference", "on-policy-difference"


def stages(config: DistillConfig) -> Iterator[Stage]:
    """Yield the stages of a recipe, which is checked.

    Raises:
        ConfigError: If the student's recipe, or the one whose rows are judged, does not compose or cannot run.
        ConversionError: If the student starts from no checkpoint.
        DataError: If a source has no file.
    """
    data = load_job(config.judged.recipe, config.judged_settings, sections=["data"]).data
    judged = {**asdict(data), "sources": _state(data.sources)}
    out = Path(config.out).resolve()
    questions = out / "questions.jsonl"
    of_teacher = [*_teacher_stages(config, questions, judged)] if config.sources else []
    yield from of_teacher
    yield _judging(config, TEACHER, _teacher(config), judged, after=[])
    answered = [stage.name for stage in of_teacher[1:]]
    for student in config.students:
        yield from _student_stages(config, questions, student, judged, after=answered)
    if set(config.students) == set(Student):
        yield _comparison(config, DIFFERENCE, Student.checked, Student.unchecked, judged)
    if config.on_policy.steps:
        first = config.students[0]
        yield _on_policy(config, out, first)
        yield _judging(config, ON_POLICY, out / ON_POLICY / "export", judged, after=[ON_POLICY, f"{TEACHER}-scores"])
        yield _comparison(config, ON_POLICY_DIFFERENCE, ON_POLICY, first, judged)


def _teacher_stages(config: DistillConfig, questions: Path, judged: Mapping[str, Any]) -> Iterator[Stage]:
    """Yield the stages of the teacher: the questions, and its answers, once for each draw."""
    yield Stage(
        name="questions", title="write the rows that the teacher is asked", outputs=[questions],
        settings={"sources": _state(config.sources), "judged": judged, "seed": config.seed},
        run=partial(write_questions, config, questions),
    )  # fmt: skip
    for draw in range(config.draws):
        yield _answers(config, questions, draw)


def _student_stages(
    config: DistillConfig, questions: Path, student: Student, judged: Mapping[str, Any], *, after: Sequence[str]
) -> Iterator[Stage]:
    """Yield the stages of a student: its rows, its fine-tuning and what that is worth."""
    out = Path(config.out).resolve()
    yield Stage(
        name=f"{student}-rows", title=f"rows of the student {student}", after=after,
        outputs=[rows_file(out, student)], run=partial(write_corpus, config, questions, student),
        settings={
            "answered": _state(config.answered), "judged": judged if config.answered else None, "seed": config.seed,
            "quality": asdict(config.quality) if student is Student.checked else None, "samples": config.samples,
        },
    )  # fmt: skip
    yield _training(config, out, student)
    yield _judging(config, student, out / student / "export", judged, after=[student, f"{TEACHER}-scores"])


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
        *_rows_of(config, out, student), *config.student.settings,
        f"model.load={_quoted(Path(config.student.load).resolve())}", f"log.dir={_quoted(out / student)}",
    ]  # fmt: skip
    _require_possible(config, config.student.recipe, settings)
    title, recipe = f"fine-tune the student {student}", config.student.recipe
    return train_stage(student, title, settings, out, config.student.ranks, after=[f"{student}-rows"], recipe=recipe)


def _rows_of(config: DistillConfig, out: Path, student: Student) -> list[str]:
    """Return the settings of a job that learns a student's rows."""
    return [
        "data=jsonl", f"data.sources=[{{kind: jsonl, path: {_quoted(rows_file(out, student))}}}]",
        f"data.validation_rows={config.student.validation_rows}", f"data.reasoning={str(config.reasoning).lower()}",
    ]  # fmt: skip


def _require_possible(config: DistillConfig, recipe: str, settings: Sequence[str]) -> RunConfig:
    """Return the composed job of a student; refuse one that cannot run before the teacher is paid."""
    job = load_job(recipe, settings)
    validate_job(job, config.student.ranks, open_source(Path(config.student.load)).shape)
    return job


def _on_policy(config: DistillConfig, out: Path, student: Student) -> Stage:
    """Return the stage in which a fine-tuned student learns from what the teacher makes of its own answers."""
    settings = [
        *_rows_of(config, out, student), *_teacher_settings(config.teacher), *config.on_policy.settings,
        f"train.max_steps={config.on_policy.steps}",
        f"model.load={_quoted(out / student / 'export')}", f"log.dir={_quoted(out / ON_POLICY)}",
    ]  # fmt: skip
    job = _require_possible(config, config.on_policy.recipe, settings)
    assert isinstance(job, RlConfig), "no other kind has a teacher"
    require_same_tokens(job.teacher, load_tokenizer(tokenizer_folder(Path(config.student.load))))
    title, recipe = f"let the student {student} answer, and the teacher judge", config.on_policy.recipe
    return train_stage(ON_POLICY, title, settings, out, config.student.ranks, after=[student], recipe=recipe)


def _teacher_settings(teacher: LabellerConfig) -> list[str]:
    """Return the teacher as an on-policy job names it, which reads answers and needs no settings of answering."""
    names = ["kind", "model"]
    if teacher.kind is ModelKind.endpoint:
        of_both = {field.name for field in fields(TeacherConfig)} & {field.name for field in fields(LabellerConfig)}
        names += sorted(of_both - {*names, "batch_size", "template_arguments"})
        teacher = replace(teacher, url=[*teacher.servers, teacher.url][0])
    defaults = TeacherConfig()
    values = {name: getattr(teacher, name) for name in names}
    changed = {name: value for name, value in values.items() if name == "kind" or value != getattr(defaults, name)}
    return [f"teacher.{name}={_quoted(value) if isinstance(value, str) else value}" for name, value in changed.items()]


def _quoted(text: str | Path) -> str:
    """Return a text as an override of Hydra takes it, whatever characters it has."""
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'")
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


def _comparison(config: DistillConfig, stage: str, name: str, other: str, data: Mapping[str, Any]) -> Stage:
    """Return the stage that compares what two students answered."""
    return Stage(
        name=stage, title=f"compare the students {name} and {other}", settings={"data": data}, outputs=[],
        after=[f"{name}-scores", f"{other}-scores"], run=partial(_difference, config, name, other),
    )  # fmt: skip


def _difference(config: DistillConfig, name: str, other: str) -> dict[str, Any]:
    """Return by dataset and metric what one student has over another, ``evaluation.comparison``, and the agreement."""
    out = Path(config.out).resolve()
    request = EvaluationRequest(
        recipe=config.judged.recipe,
        overrides=config.judged_settings,
        batch_size=config.judged.batch_size,
        compare_file=judged_file(out, other),
    )
    scores = evaluate(GivenAnswers(file=judged_file(out, name)), request)
    rows = judged_rows(config).tasks
    own, others, teacher = (read_given_answers(judged_file(out, each), rows) for each in (name, other, TEACHER))
    return {
        "metrics": {dataset: found["comparison"]["metrics"] for dataset, found in scores["tasks"].items()},
        "agreement": agreement_gain(own, others, teacher),
    }


def judged_file(out: Path, name: str) -> Path:
    """Return where the answers of the teacher or a student to the judged rows are."""
    return out / "judged" / f"{name}.jsonl"


def write_report(out: Path, report: str, numbers: str) -> None:
    """Write the report for people and the one for programs."""
    write_small(out / "report.md", report)
    write_small(out / "report.json", numbers)
