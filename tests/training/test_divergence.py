"""A job that learns nothing any more says so, ends with a status of its own, exports nothing and is not restarted."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.errors import DivergedError
from megatron_ads.launching.attempts import decide, judge
from megatron_ads.optim.chain import UpdateReport
from megatron_ads.runtime.health.rank_record import ExitStatus, RankRecord
from megatron_ads.training import divergence
from megatron_ads.training.divergence import SkippedUpdates
from megatron_ads.training.step import StepReport
from parity_tests.harness.real_job import RealJob, two_rank_job


def _report(*, updated: bool) -> StepReport:
    update = UpdateReport(updated=updated, grad_norm=float("inf"), norm_by_kind={}, zero_gradients=0, not_finite=3)
    return StepReport(loss=7.0, loss_tokens=1, tokens=2, samples=1, stop_requested=False, update=update)


@pytest.fixture
def of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence.dist, "get_rank", lambda: 0)


@pytest.mark.usefixtures("of_rank_0")
def test_only_consecutive_skips_end_a_job() -> None:
    skips = SkippedUpdates(maximum=3)
    for step, updated in enumerate([False, False, True, False, False, True, False, False], start=1):
        skips.observe(step, _report(updated=updated))
    with pytest.raises(
        DivergedError, match=r"3 consecutive updates were skipped, up to step 9 .loss 7, gradient norm inf"
    ):
        skips.observe(9, _report(updated=False))


@pytest.mark.usefixtures("of_rank_0")
def test_every_skip_is_told_until_there_are_many(caplog: pytest.LogCaptureFixture) -> None:
    skips = SkippedUpdates(maximum=1000)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 101):
            skips.observe(step, _report(updated=False))
    assert [int(record.getMessage().split()[1].rstrip(":")) for record in caplog.records] == [*range(1, 9), 16, 32, 64]
    assert "3 gradient elements not finite; 1 in a row, of at most 1000" in caplog.records[0].getMessage()


def test_no_launcher_starts_it_again() -> None:
    records = [RankRecord(rank=0, host="h", status=ExitStatus.DIVERGED, message="", ended=0.0)]
    verdict = judge(records, 1, None)
    assert verdict is ExitStatus.DIVERGED
    decision = decide(verdict, 1, 3)
    assert (decision.again, decision.status) == (False, 77)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[RealJob]:
    with two_rank_job(tmp_path, steps=4, save_every=1) as job:
        yield job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "steps", "saved"),
    [
        # Step 1 moves the weights to 1e30, the gradients of step 2 are not finite; 2 of 4 steps in a row are enough.
        (["optim.learning_rate=1e30", "optim.warmup_steps=0"], 3, ["step-00000001"]),
        (["optim.learning_rate=1e38", "optim.warmup_steps=0", "optim.weight_decay=1e3"], 1, []),  # to infinity at once
    ],
)
def test_a_job_that_diverges_ends_with_77_and_exports_nothing(
    job: RealJob, overrides: list[str], steps: int, saved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_ADS_MAX_RESTARTS", "2")
    job.overrides = overrides
    job.start_launcher()
    assert job.wait(150) == [ExitStatus.DIVERGED], job.logs()
    assert max(job.losses()) == steps
    assert job.complete() == saved
    assert not (job.root / "export").exists() and not (job.root / "outcome.json").exists()
    log = job.logs()
    assert "megatron-ads: first failure: rank" in log and "DIVERGED: the job has diverged" in log
    assert not (job.root / "torchrun/node-0/restart-001").exists()
    skipped = [line["step"] for line in job.metrics() if line.get("skipped_update")]
    assert skipped == list(range(2, steps + 1))
    assert ("WARNING step 2: the update is skipped" in log) == bool(skipped)
    json.dumps(job.metrics(), allow_nan=False)
