"""Two models on the same questions: what changed, how sure that is, and whether it is too much.

With d_i the difference of two models' scores of question i, of n:

    change  = mean d_i                     in points: 100 times that
    error   = std(d_i) / sqrt(n)           of a paired difference: what is hard for both models cancels
    p       of McNemar's exact test: how likely as many questions would go one way, were each way as likely

A benchmark falls where its change, and z errors more, are still below minus the margin. z is such that noise alone does
that to any of the k benchmarks once in 1 / ``FALSE_ALARMS`` releases (Bonferroni): 3.1 for one, 3.8 for 14.

Scores here are 0 or 1; p is left out where one is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from megatron_ads.errors import DataError
from megatron_ads.regress.model_scores import BenchmarkScores, Item, ModelScores

FALSE_ALARMS = 0.001
"""How often noise alone may fail a release."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreChange:
    """One benchmark, before and after. Shares are from 0 to 1, changes in points."""

    name: str
    questions: int
    base: float
    tuned: float
    change: float
    error: float | None
    """Standard error of the change, in points; None: one question has none."""
    p: float | None
    """Of McNemar's test."""
    unfinished: tuple[int, int]
    """Answers that did not end, of base and tuned."""
    other_answers: int
    """Questions that the models answered differently, right or wrong."""

    @property
    def relative(self) -> float | None:
        """Return the change by the score of the base, as AdNanny's table 8 has it; None where that is 0."""
        return (self.tuned - self.base) / self.base if self.base else None

    def falls_by_more_than(self, margin: float, *, noise: float) -> bool:
        """Return whether it fell by more than ``margin`` points and ``noise`` errors."""
        return self.change + noise * (self.error or 0.0) < -margin


def noise_of(benchmarks: int) -> float:
    """Return z, how many errors noise alone may reach."""
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / benchmarks)


def compare(base: ModelScores, tuned: ModelScores) -> list[ScoreChange]:
    """Return a comparison for each benchmark that both were asked.

    Raises:
        DataError: If they were not asked the same questions in the same way, or have no benchmark in common.
    """
    of_base = {one.name: one for one in base.benchmarks}
    common = [one for one in tuned.benchmarks if one.name in of_base]
    if not common:
        raise DataError(f"{base.model} and {tuned.model} were asked no benchmark in common. Run both again.")
    if base.chat != tuned.chat:
        asked = {True: "by its chat template", False: "without chat template"}
        raise DataError(
            f"{base.model} was asked {asked[base.chat]}, {tuned.model} {asked[tuned.chat]}: their answers cannot be "
            "compared. Give --chat or --no-chat for both."
        )
    return [_of_benchmark(of_base[one.name], one) for one in common]


def _of_benchmark(base: BenchmarkScores, tuned: BenchmarkScores) -> ScoreChange:
    if base.settings != tuned.settings:
        raise DataError(
            f"{base.name} was asked with {dict(base.settings)} and with {dict(tuned.settings)}. Run it again."
        )
    pairs = _paired(base, tuned)
    differences = [after.score - before.score for before, after in pairs]
    count = len(pairs)
    return ScoreChange(
        name=base.name,
        questions=count,
        base=fmean(before.score for before, _ in pairs),
        tuned=fmean(after.score for _, after in pairs),
        change=100 * fmean(differences),
        error=100 * stdev(differences) / math.sqrt(count) if count > 1 else None,
        p=mcnemar(differences),
        unfinished=(sum(not before.finished for before, _ in pairs), sum(not after.finished for _, after in pairs)),
        other_answers=sum(before.answer != after.answer for before, after in pairs),
    )


def _paired(base: BenchmarkScores, tuned: BenchmarkScores) -> list[tuple[Item, Item]]:
    before = {item.question: item for item in base.items}
    after = {item.question: item for item in tuned.items}
    if before.keys() != after.keys():
        raise DataError(
            f"{base.name}: {len(before)} questions were asked of one model, {len(after)} of the other. Take the same "
            "--limit and files, or run the base again."
        )
    pairs = [(before[question], after[question]) for question in before]
    if other := [first.question for first, second in pairs if first.asked != second.asked]:
        raise DataError(
            f"{base.name}: {len(other)} of {len(pairs)} questions differ between the models, {other[0]} among them. "
            "The data set or the prompts have changed; run the base again."
        )
    return pairs


def mcnemar(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of McNemar's exact test; None if a score is neither 0 nor 1."""
    from scipy.stats import binomtest

    if not set(differences) <= {-1.0, 0.0, 1.0}:
        return None
    won, lost = differences.count(1.0), differences.count(-1.0)
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def average(lines: Sequence[ScoreChange]) -> ScoreChange:
    """Return the line of the average, in which every benchmark counts the same."""
    errors = [line.error for line in lines if line.error is not None]
    count = len(lines)
    return ScoreChange(
        name="average",
        questions=sum(line.questions for line in lines),
        base=fmean(line.base for line in lines),
        tuned=fmean(line.tuned for line in lines),
        change=fmean(line.change for line in lines),
        error=math.hypot(*errors) / count if len(errors) == count else None,
        p=None,
        unfinished=(sum(line.unfinished[0] for line in lines), sum(line.unfinished[1] for line in lines)),
        other_answers=sum(line.other_answers for line in lines),
    )
