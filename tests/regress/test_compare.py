import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ads.errors import DataError
from megatron_ads.regress.compare import average, compare, mcnemar
from megatron_ads.regress.model_scores import BenchmarkScores, Item, ModelScores
from megatron_ads.regress.report import report_of, summary, verdict
from megatron_ads.regress.suite import SUITE

GSM8K = next(benchmark for benchmark in SUITE if benchmark.name == "gsm8k")


def scores_of(values: list[float], *, name: str = "gsm8k", answers: list[str] | None = None) -> ModelScores:
    """Return a model's scores on one benchmark."""
    said = answers or [f"{value:g}" for value in values]
    items = tuple(
        Item(question=f"{name}:{number}", asked=f"digest {number}", score=value, answer=answer, finished=True)
        for number, (value, answer) in enumerate(zip(values, said, strict=True))
    )
    benchmark = BenchmarkScores(name=name, settings=GSM8K.settings(), items=items)
    return ModelScores(model="m", chat=True, limit=None, benchmarks=(benchmark,), provenance={})


def test_a_change_its_error_and_its_p_are_those_worked_out_by_hand() -> None:
    # Differences -1, -1, -1, 0, 1: mean -0.4; squared deviations 3 x 0.36 + 0.16 + 1.96 = 3.2, variance 0.8.
    (line,) = compare(scores_of([1, 1, 1, 0, 0]), scores_of([0, 0, 0, 0, 1]))
    assert (line.base, line.tuned, line.questions, line.other_answers) == (0.6, 0.2, 5, 4)
    assert line.change == pytest.approx(-40.0)
    assert line.error == pytest.approx(100 * math.sqrt(0.8 / 5))
    assert line.relative == pytest.approx(-2 / 3)
    # Four questions changed, one for the better: P(at most 1 or at least 3 of 4 coins) = 2 (1 + 4) / 16.
    assert line.p == pytest.approx(0.625)


def test_mcnemar_is_one_without_a_change_and_undefined_for_scores_between() -> None:
    assert mcnemar([0.0, 0.0]) == 1.0
    assert mcnemar([0.5, -1.0]) is None


def test_the_average_counts_every_benchmark_the_same() -> None:
    first = compare(scores_of([1.0] * 4), scores_of([1.0, 1.0, 0.0, 0.0]))
    second = compare(scores_of([0.0] * 100, name="math"), scores_of([0.0] * 100, name="math"))
    line = average([*first, *second])
    assert (line.change, line.questions) == (-25.0, 104)
    # 100 sqrt(1/3) / 2 and 0, halved.
    assert line.error == pytest.approx(100 * math.sqrt(1 / 3) / 2 / 2)


def test_the_same_scores_pass_and_a_clear_fall_does_not() -> None:
    base = scores_of([1.0] * 80 + [0.0] * 20)
    assert report_of(base, base, margin=1.0, same=False)["passed"]
    fallen = report_of(base, scores_of([1.0] * 60 + [0.0] * 40), margin=1.0, same=False)
    assert fallen["failed"] == ["gsm8k"]
    assert verdict(fallen) == "gsm8k fell by more than 1 points beyond noise (3.1 errors)"


def test_a_fall_within_the_margin_passes_however_sure_it_is() -> None:
    # 5 of 1000 questions: half a point, with an error of 0.22 points.
    base, tuned = scores_of([1.0] * 1000), scores_of([0.0] * 5 + [1.0] * 995)
    assert report_of(base, tuned, margin=1.0, same=False)["passed"]
    # 20 of 1000: two points, with an error of 0.44: -2 + 3.09 x 0.443 = -0.63 is within one point, beyond half of one.
    tuned = scores_of([0.0] * 20 + [1.0] * 980)
    assert report_of(base, tuned, margin=1.0, same=False)["passed"]
    assert not report_of(base, tuned, margin=0.5, same=False)["passed"]


def test_noise_alone_does_not_fail_the_gate_in_20_of_20_resamplings() -> None:
    passed = 0
    for seed in range(20):
        draw = random.Random(seed)
        chances = [draw.random() for _ in range(1000)]  # how hard each question is for both models
        base, tuned = ([float(draw.random() < chance) for chance in chances] for _ in range(2))
        passed += report_of(scores_of(base), scores_of(tuned), margin=1.0, same=False)["passed"]
    assert passed == 20


def test_a_fall_of_ten_points_fails_the_gate_in_20_of_20_resamplings() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        base = [float(draw.random() < 0.8) for _ in range(1000)]
        tuned = [score if draw.random() < 0.875 else 0.0 for score in base]
        assert not report_of(scores_of(base), scores_of(tuned), margin=1.0, same=False)["passed"]


def test_same_looks_at_answers_and_not_at_scores() -> None:
    base = scores_of([0.0, 0.0], answers=["17", "18"])
    assert report_of(base, base, margin=1.0, same=True)["passed"]
    other = scores_of([0.0, 0.0], answers=["17", "19"])
    report = report_of(base, other, margin=1.0, same=True)
    assert report["failed"] == ["gsm8k"]
    assert report_of(base, other, margin=1.0, same=False)["passed"]


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (scores_of([1.0]), "2 questions were asked of one model, 1 of the other"),
        (scores_of([1.0, 0.0], name="piqa"), "no benchmark in common"),
        (replace(scores_of([1.0, 0.0]), chat=False), "without chat template"),
    ],
)
def test_what_was_not_asked_alike_is_not_compared(tuned: ModelScores, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(scores_of([1.0, 0.0]), tuned)


def test_other_questions_and_other_settings_are_noticed() -> None:
    base = scores_of([1.0, 0.0])
    (benchmark,) = base.benchmarks
    changed = replace(benchmark, items=(benchmark.items[0], replace(benchmark.items[1], asked="another digest")))
    with pytest.raises(DataError, match="1 of 2 questions differ between the models, gsm8k:1"):
        compare(base, replace(base, benchmarks=(changed,)))
    with pytest.raises(DataError, match="Run it again"):
        compare(base, replace(base, benchmarks=(replace(benchmark, settings={"shots": 0}),)))


def test_scores_are_read_as_they_were_written_and_other_files_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    scores = scores_of([1.0, 0.0])
    scores.write(file)
    assert ModelScores.read(file) == scores
    for content in ("{}", "[1]", "no JSON", file.read_text()[:-30], '{"format": 2}'):
        file.write_text(content)
        with pytest.raises(DataError, match="does not hold the scores of a model"):
            ModelScores.read(file)


def test_the_table_says_what_failed(tmp_path: Path) -> None:
    report = report_of(scores_of([1.0] * 50), scores_of([0.0] * 50), margin=1.0, same=False)
    text = summary(report, tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("gsm8k"))
    assert row.split()[:6] == ["gsm8k", "50", "1.000", "0.000", "-100.0%", "-100.00"]
    assert row.endswith("FAILED")
