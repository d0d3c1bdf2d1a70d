"""A job that is resumed on other data is refused; other settings and weights are taken over, and told."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_ads.training.checkpointer import Checkpointer
from parity_tests.harness.real_job import RealJob, write_small_model


def _write(file: Path, word: str) -> None:
    rows = [
        {"id": f"{word}{number}", "messages": [{"role": "user", "content": f"{word} {number}"},
                                               {"role": "assistant", "content": "yes"}]}
        for number in range(16)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[RealJob]:
    model = write_small_model(tmp_path / "model")
    job = RealJob(model=model, root=tmp_path / "run", ranks=1, layout={"pp": 1, "ep": 1}, steps=2, save_every=2)
    yield job
    job.kill()


def _sources(tmp_path: Path, *weights: float) -> str:
    pairs = zip("ab", weights, strict=True)
    sources = [f"{{kind: jsonl, path: {tmp_path}/{name}.jsonl, weight: {weight}}}" for name, weight in pairs]
    return f"data.sources=[{', '.join(sources)}]"


def _run(job: RealJob) -> tuple[int, str]:
    job.log(0).unlink(missing_ok=True)
    job.start_ranks(forked=True)
    (status,) = job.wait(150)
    return status, job.logs()


def test_a_resumed_job_tells_what_has_changed_and_refuses_other_rows(job: RealJob, tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", "first")
    _write(tmp_path / "b.jsonl", "second")
    job.overrides = [_sources(tmp_path, 1, 1)]
    status, log = _run(job)
    assert status == 0 and "have changed" not in log, log

    job.steps, job.overrides = 4, [_sources(tmp_path, 3, 1), "optim.clip_grad=0.5", "optim.warmup_steps=1"]
    status, log = _run(job)
    assert status == 0, log
    (told,) = [line for line in log.splitlines() if "settings that have changed since that checkpoint" in line]
    for change in ("optim.clip_grad 1.0 -> 0.5", "train.max_steps 2 -> 4", "data.sources[0].weight 1.0 -> 3.0"):
        assert change in told
    # 2e-3 at step 1, after the warm-up, 0 at step 3: half-way between them, the cosine is at half of it.
    assert "(the next update's learning rate is 0.001;" in told
    assert "log.dir" not in told and "the sources' weights have changed, and hold from here on" in log

    _write(tmp_path / "b.jsonl", "others")
    job.steps = 6
    status, log = _run(job)
    assert status == 2
    assert "The checkpoint was made with data of other content in source 1, counted from 0" in log
    assert max(job.losses()) == 4


def test_a_checkpoint_that_has_no_settings_says_nothing_of_them(caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(
        settings=Mock(), model=Mock(), data=Mock(), layout=Mock(), side_files=None, job={"train.max_steps": 4}
    )
    with caplog.at_level("INFO"):
        checkpointer._report_changes({})
    assert caplog.text == ""
