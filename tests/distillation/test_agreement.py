"""Agreement with the teacher, worked out by hand, and how it is shown."""

from megatron_ads.distillation.agreement import agreement, agreement_gain, label_said
from megatron_ads.evaluation.answer_records import Answer
from tests.distillation.test_quality import question


def answers(*labels: str) -> list[Answer]:
    """Return answers with these labels to rows of different queries."""
    texts = [f"<Label>{label}</Label>" for label in labels]
    return [Answer(question(number), text, ended=True) for number, text in enumerate(texts)]


TEACHER = answers("Good", "Bad", "Good", "Superb", "Fair")


def test_agreement_is_over_rows_with_a_label_of_the_teacher() -> None:
    student = answers("Good", "Good", "none such", "Good", "Fair")
    assert label_said(student[2]) is None
    (task,) = (found := agreement(student, TEACHER))
    # Of five rows the teacher's fourth is no label; of the other four the first and the last agree.
    assert (task, found[task]["rows"], found[task]["agreement"]) == ("query_ad_relevance", 4, 0.5)
    low, high = found[task]["agreement_95"]
    assert 0 <= low < 0.5 < high <= 1


def test_a_gain_pairs_the_answers_of_two_students() -> None:
    better, worse = answers("Good", "Bad", "Good", "Bad", "Fair"), answers("Good", "Good", "Good", "Bad", "Fair")
    gain = agreement_gain(better, worse, TEACHER)["query_ad_relevance"]
    assert gain["delta"] == 0.25  # one row of four
    assert 0 <= gain["delta_95"][0] <= 0.25 <= gain["delta_95"][1] < 1
    assert agreement_gain(better, better, TEACHER)["query_ad_relevance"]["delta_95"] == [0, 0]
