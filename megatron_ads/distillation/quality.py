"""Data quality control of a teacher's answers.

Source: AdNanny, sections 3.4 and 5.3: its student learns better from answers under control. The paper names aims (no
boilerplate, self-consistency, faithful, no near-duplicates); the measures are ours, those of `data cook` where it has
the same aim. Two are of distillation alone, where the teacher decides over the label:

    improbable   exp(log P(label | prompt, reasoning)) < min_probability
    disagrees    further draws that give the same label / further draws < min_agreement
"""

import math
from collections.abc import Callable, Iterator, Sequence

from megatron_ads.config.distillation import DistillConfig, QualityConfig
from megatron_ads.config.synthesis import RejectConfig
from megatron_ads.distillation.lessons import Lesson, Unfit
from megatron_ads.metrics.text import mean_similarities, words_of
from megatron_ads.rows import ChatRow
from megatron_ads.synthesis.candidates import details_in, lack_of_content
from megatron_ads.synthesis.filters import embedder, query_faults
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.registry import TASKS


def control(lessons: Sequence[Lesson], config: DistillConfig) -> None:
    """Remove the lessons that break a rule, and note by which and by how much."""
    quality = config.quality
    rules: list[Callable[[Sequence[Lesson], QualityConfig], None]] = []
    rules += [_remove_without_content] if config.reasoning else []
    rules += [_remove_improbable, _remove_disagreeing]
    rules += [_remove_unlike] if quality.min_similarity > 0 else []
    rules += [_remove_bad_queries] if quality.queries else []
    rules += [_remove_repeats] if quality.repeats else []
    for rule in rules:
        rule(passing(lessons), quality)


def passing(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Return the lessons that nothing has removed so far, in order."""
    return [lesson for lesson in lessons if lesson.removed is None]


def _remove_without_content(lessons: Sequence[Lesson], quality: QualityConfig) -> None:
    reasoned = [lesson for lesson in lessons if _reasons(lesson)]
    details_of = details_in([lesson.row for lesson in reasoned])
    for lesson in reasoned:
        details = details_of(lesson.row)
        lack = lack_of_content(
            lesson.reasoning, details, min_words=quality.min_words, min_details=quality.min_details
        )  # fmt: skip
        if lack:
            lesson.remove(Unfit(str(lack[0])), measured=lack[1])


def _reasons(lesson: Lesson) -> bool:
    return lesson.row.task in TASKS and TASKS[lesson.row.task].reasons


def _remove_improbable(lessons: Sequence[Lesson], quality: QualityConfig) -> None:
    for lesson in lessons:
        if lesson.log_probability is None:
            continue
        probability = math.exp(min(lesson.log_probability, 0.0))
        if probability < quality.min_probability:
            lesson.remove(Unfit.improbable, f"label {lesson.row.label}", measured=f"P {probability:.3g}")


def _remove_disagreeing(lessons: Sequence[Lesson], quality: QualityConfig) -> None:
    for lesson in lessons:
        if lesson.row.label is None or not lesson.further:
            continue
        same = sum(draw.label == lesson.row.label for draw in lesson.further)
        if same / len(lesson.further) < quality.min_agreement:
            measured = f"{same} of {len(lesson.further)} further draws agree"
            lesson.remove(Unfit.disagrees, f"label {lesson.row.label}", measured=measured)


def _remove_unlike(lessons: Sequence[Lesson], quality: QualityConfig) -> None:
    compared = [
        (lesson, others)
        for lesson in lessons
        if lesson.reasoning and (others := [draw.reasoning for draw in lesson.further if draw.reasoning])
    ]
    if not compared:
        return
    embed = embedder(RejectConfig(), [lesson.reasoning for lesson, _ in compared])
    for lesson, others in compared:
        similarity = float(mean_similarities(embed([lesson.reasoning, *others]))[0])
        if similarity < quality.min_similarity:
            lesson.remove(Unfit.unlike_the_others, measured=f"similarity {similarity:.2f}")


def _remove_bad_queries(lessons: Sequence[Lesson], quality: QualityConfig) -> None:
    written = [lesson for lesson in lessons if lesson.row.task == query_generation.TASK]
    rows = [lesson.row for lesson in written]
    faults = query_faults(rows, RejectConfig(query_similarity=quality.query_similarity)) if rows else []
    for lesson, fault in zip(written, faults, strict=True):
        if fault:
            lesson.remove(Unfit(str(fault)))


def _remove_repeats(lessons: Sequence[Lesson], quality: QualityConfig) -> None:
    first: dict[tuple[str, frozenset[str]], str] = {}
    for lesson in lessons:
        key = (lesson.row.task, frozenset(_words_asked(lesson.row)))
        if key in first:
            lesson.remove(Unfit.repeats_a_row, measured=f"as row {first[key]}")
        else:
            first[key] = lesson.name


def _words_asked(row: ChatRow) -> Iterator[str]:
    for text in row.shown_texts() or [message.content for message in row.prompt]:
        yield from words_of(text)
