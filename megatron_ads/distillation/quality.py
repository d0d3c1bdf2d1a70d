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
from megatron_ads.distillation.teacher_answers import TeacherAnswer, Unfit
from megatron_ads.metrics.text import mean_similarities, words_of
from megatron_ads.rows import ChatRow
from megatron_ads.synthesis.candidates import details_in, lack_of_content
from megatron_ads.synthesis.filters import embedder, query_faults
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.registry import TASKS


def control(answers: Sequence[TeacherAnswer], config: DistillConfig) -> None:
    """Remove the answers that break a rule, and note by which and by how much."""
    quality = config.quality
    rules: list[Callable[[Sequence[TeacherAnswer], QualityConfig], None]] = []
    rules += [_remove_without_content] if config.reasoning else []
    rules += [_remove_improbable, _remove_disagreeing]
    rules += [_remove_unlike] if quality.min_similarity > 0 else []
    rules += [_remove_bad_queries] if quality.queries else []
    rules += [_remove_repeats] if quality.repeats else []
    for rule in rules:
        rule(passing(answers), quality)


def passing(answers: Sequence[TeacherAnswer]) -> list[TeacherAnswer]:
    """Return the answers that nothing has removed so far, in order."""
    return [answer for answer in answers if answer.removed is None]


def _remove_without_content(answers: Sequence[TeacherAnswer], quality: QualityConfig) -> None:
    reasoned = [answer for answer in answers if _reasons(answer)]
    details_of = details_in([answer.row for answer in reasoned])
    for answer in reasoned:
        details = details_of(answer.row)
        lack = lack_of_content(
            answer.reasoning, details, min_words=quality.min_words, min_details=quality.min_details
        )  # fmt: skip
        if lack:
            answer.remove(Unfit(str(lack[0])), measured=lack[1])


def _reasons(answer: TeacherAnswer) -> bool:
    return answer.row.task in TASKS and TASKS[answer.row.task].reasons


def _remove_improbable(answers: Sequence[TeacherAnswer], quality: QualityConfig) -> None:
    for answer in answers:
        if answer.log_probability is None:
            continue
        probability = math.exp(min(answer.log_probability, 0.0))
        if probability < quality.min_probability:
            answer.remove(Unfit.improbable, f"label {answer.row.label}", measured=f"P {probability:.3g}")


def _remove_disagreeing(answers: Sequence[TeacherAnswer], quality: QualityConfig) -> None:
    for answer in answers:
        if answer.row.label is None or not answer.further:
            continue
        same = sum(draw.label == answer.row.label for draw in answer.further)
        if same / len(answer.further) < quality.min_agreement:
            measured = f"{same} of {len(answer.further)} further draws agree"
            answer.remove(Unfit.disagrees, f"label {answer.row.label}", measured=measured)


def _remove_unlike(answers: Sequence[TeacherAnswer], quality: QualityConfig) -> None:
    compared = [
        (answer, others)
        for answer in answers
        if answer.reasoning and (others := [draw.reasoning for draw in answer.further if draw.reasoning])
    ]
    if not compared:
        return
    embed = embedder(RejectConfig(), [answer.reasoning for answer, _ in compared])
    for answer, others in compared:
        similarity = float(mean_similarities(embed([answer.reasoning, *others]))[0])
        if similarity < quality.min_similarity:
            answer.remove(Unfit.unlike_the_others, measured=f"similarity {similarity:.2f}")


def _remove_bad_queries(answers: Sequence[TeacherAnswer], quality: QualityConfig) -> None:
    written = [answer for answer in answers if answer.row.task == query_generation.TASK]
    rows = [answer.row for answer in written]
    faults = query_faults(rows, RejectConfig(query_similarity=quality.query_similarity)) if rows else []
    for answer, fault in zip(written, faults, strict=True):
        if fault:
            answer.remove(Unfit(str(fault)))


def _remove_repeats(answers: Sequence[TeacherAnswer], quality: QualityConfig) -> None:
    first: dict[tuple[str, frozenset[str]], str] = {}
    for answer in answers:
        key = (answer.row.task, frozenset(_words_asked(answer.row)))
        if key in first:
            answer.remove(Unfit.repeats_a_row, measured=f"as row {first[key]}")
        else:
            first[key] = answer.name


def _words_asked(row: ChatRow) -> Iterator[str]:
    for text in row.shown_texts() or [message.content for message in row.prompt]:
        yield from words_of(text)
