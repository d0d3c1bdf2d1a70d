"""Real jobs whose answers come from an inference server that generates while they update."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.real_job import RealJob, write_small_model
from tests.inference.scripted_server import Reply, scripted_server
from tests.training.test_rl import REWARDS, course

pytestmark = pytest.mark.slow

STEPS, PROMPTS, SAMPLES = 4, 4, 4
DONE = Reply(raw=b"")


class Server:
    """Answers with letters that its seed decides, and notes how often it had got weights before each request."""

    def __init__(self) -> None:
        self.loads = 0
        self.asked: list[tuple[int, dict[str, Any]]] = []

    def script(self, body: dict[str, Any], _: int) -> Reply:
        self.asked.append((self.loads, body))
        tokens = [40 + body["seed"] // 7**place % 7 for place in range(3 + body["seed"] % 4)]
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-1.5] * len(tokens)}}
        return Reply(content="".join(map(chr, tokens)), choice=choice)

    def load(self, _: dict[str, Any]) -> Reply:
        self.loads += 1
        return DONE


@contextmanager
def fake_server() -> Iterator[tuple[Server, str]]:
    server = Server()
    controls = {"/collective_rpc": server.load, "/reset_prefix_cache": lambda _: DONE}
    with scripted_server(server.script, controls=controls) as record:
        yield server, record.url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    write_small_model(folder / "model")
    (folder / "reward.py").write_text(REWARDS)
    return folder


def job(folder: Path, name: str, url: str, *overrides: str) -> RealJob:
    return RealJob(
        recipe="rl/quickstart",
        model=folder / "model",
        root=folder / name,
        ranks=2,
        layout={"pp": 1, "ep": 2},
        steps=STEPS,
        timeout_seconds=120,
        overrides=[
            "rollout.mode=servers",
            f"rollout.servers=[{{url: '{url}', model: m}}]",
            "rollout.probe_rows=0",
            "rollout.max_logprob_diff=100",  # what the server says is no policy's
            f"train.global_batch_size={PROMPTS}",
            f"rollout.samples={SAMPLES}",
            "rollout.max_new_tokens=12",
            "policy.minibatches=2",
            "policy.importance_sampling=tis",
            "optim.warmup_steps=0",
            "train.evaluate_every=2",
            "data.validation_rows=4",
            "checkpoint.save_every=null",
            f"rewards.use=[{{name: '{folder / 'reward.py'}:some'}}]",
            *overrides,
        ],
    )


def run(one: RealJob, wanted: ExitStatus = ExitStatus.DONE, *, stop_after: int | None = None) -> RealJob:
    """Run a job to its end; rank 1 is asked to stop once a step is recorded."""
    one.start_ranks(forked=True)
    try:
        deadline = time.monotonic() + 120
        while stop_after and not any(record["step"] == stop_after for record in one.metrics()):
            assert time.monotonic() < deadline, one.logs()
            time.sleep(0.01)
        if stop_after and (pid := one.rank_pid(1)) is not None:
            os.kill(pid, signal.SIGTERM)
        assert one.wait(240) == [wanted] * 2, one.logs()
    finally:
        one.kill()
    return one


def steps_of(one: RealJob) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return each step's header and answers."""
    files = sorted((one.root / "rollouts").glob("step-*.jsonl"))
    lines = [[*map(json.loads, file.read_text().splitlines())] for file in files]
    return [(header, answers) for header, *answers in lines]


def recorded(one: RealJob) -> list[dict[str, float]]:
    """Return what a job logged of steps and evaluations, but not of its checkpoints."""
    return [record for record in course(one) if len(record) > 1]


def test_a_job_that_generates_ahead_is_one_step_behind_and_continues_to_the_bit_after_a_stop(folder: Path) -> None:
    with fake_server() as (server, url):
        whole = run(job(folder, "whole", url, "rollout.max_staleness=1"))
        asked, server.asked, server.loads = server.asked, [], 0
        stopped = job(folder, "stopped", url, "rollout.max_staleness=1")
        run(stopped, ExitStatus.STOPPED, stop_after=1)
        assert not (stopped.root / "export").exists()
        run(stopped)
        again = server.asked
    trained = [record for record in whole.metrics() if "loss" in record]
    assert [record["rollout/staleness/max"] for record in trained] == [0, 1, 1, 1]
    assert [record["rollout/staleness/mean"] for record in trained] == [0, 1, 1, 1]
    assert all(record["timing_s/rollout"] > 0 and record["timing_s/reward"] > 0 for record in trained)
    # Two updates a step; the server has got weights once more than there were steps before.
    versions = [[int(answer["weights"].partition("-")[0]) // 2 for answer in answers] for _, answers in steps_of(whole)]
    assert versions == [[version] * PROMPTS * SAMPLES for version in (0, 0, 1, 2)]
    sampled = Counter(loads for loads, body in asked if body["temperature"] > 0)
    assert sampled == {1: 2 * PROMPTS * SAMPLES, 2: PROMPTS * SAMPLES, 3: PROMPTS * SAMPLES}
    assert recorded(stopped) == recorded(whole) and stopped.weights() == whole.weights()
    assert steps_of(stopped) == steps_of(whole)
    assert len(again) == len(asked), "nothing was asked for twice"
