"""Real jobs of reinforcement learning: what they leave, how they continue, and what their modes do."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ads.runtime.health.rank_record import ExitStatus
from parity_tests.harness.real_job import RealJob, write_small_model

pytestmark = pytest.mark.first

STEPS, SAVED, PROMPTS, SAMPLES = 4, 2, 4, 4
MEASURED_TIME = ("seconds", "per_second", "slowest_rank", "max_memory_allocated", "tflops_per_gpu", "timing_s")
"""In names of metrics that tell of the machine, not of the training."""
REWARDS = """
def some(completions, **columns):
    return [sum(map(ord, message["content"])) % 7 / 7 for [message] in completions]


def longer(completions, **columns):
    return [len(message["content"]) / 100 for [message] in completions]
"""
"""A random model's answers deserve nothing; these tell them apart all the same."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    write_small_model(folder / "model")
    (folder / "reward.py").write_text(REWARDS)
    return folder


def prepared(folder: Path, name: str, *overrides: str, ranks: int = 4, layout: dict[str, int] | None = None) -> RealJob:
    """Return a job that is not started; by default pp 2 x ep 2, stage 0 without experts."""
    return RealJob(
        recipe="rl/quickstart",
        model=folder / "model",
        root=folder / name,
        ranks=ranks,
        layout=layout or {"pp": 2, "ep": 2, "first_stage_layers": 2},
        steps=STEPS,
        save_every=SAVED,
        timeout_seconds=120,
        overrides=[
            f"train.global_batch_size={PROMPTS}",
            f"rollout.samples={SAMPLES}",
            "rollout.max_new_tokens=12",
            "rollout.batch_size=8",
            "policy.minibatches=2",
            "policy.router_replay=R2",
            "policy.kl_coef=0.05",
            "optim.warmup_steps=0",
            "optim.learning_rate=1e-3",
            "checkpoint.save_total_limit=9",
            f"rewards.use=[{{name: '{folder / 'reward.py'}:some'}}, {{name: '{folder / 'reward.py'}:longer'}}]",
            "rewards.combine=popo",
            *overrides,
        ],
    )


def job(folder: Path, name: str, *overrides: str, ranks: int = 4, layout: dict[str, int] | None = None) -> RealJob:
    """Run a job to its end from whatever checkpoint it has."""
    one = prepared(folder, name, *overrides, ranks=ranks, layout=layout)
    one.run_to_end(forked=True)
    return one


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[RealJob]:
    """The job without an interruption."""
    yield job(folder, "whole", "train.evaluate_every=2", "data.validation_rows=4")


def course(job: RealJob, *, after: int = 0) -> list[dict[str, float]]:
    """Return what a job logged behind a step, without what is measured time."""
    return [
        {name: value for name, value in record.items() if not any(part in name for part in MEASURED_TIME)}
        for record in job.metrics()
        if record["step"] > after
    ]


def test_a_job_on_two_stages_with_shared_experts_leaves_metrics_rollouts_and_weights(whole: RealJob) -> None:
    steps = [record for record in whole.metrics() if "actor/pg_loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    odds = 1.0
    for record in steps:
        assert 0 < record["rollout/logprob_abs_diff"] < 1e-4 and record["rollout/probe_logprob_abs_diff"] < 1e-4
        assert record["rollout/answers"] == PROMPTS * SAMPLES and record["actor/entropy"] > 0
        assert 0 < record["critic/rewards/mean"] < record["critic/rewards/max"]
        weights = _reward_weights(record)
        products = [value for name, value in record.items() if name.startswith("reward_inner_product/")]
        odds *= math.exp(0.1 * (products[0] - products[1]))  # POPO: w_k <- w_k exp(eta I_k / mu), normalised
        assert weights == [pytest.approx(odds / (1 + odds)), pytest.approx(1 / (1 + odds))] and products[0] != 0
        for phase in ("rollout", "reward", "update", "sync"):
            assert record[f"timing_s/{phase}"] > 0
    # Two updates a step: the first has the ratio 1, the second does not.
    assert steps[0]["actor/ppo_kl"] != 0 and steps[-1]["actor/kl_loss"] > 0
    assert [record["step"] for record in whole.metrics() if "validation/reward" in record] == [2, 4]
    assert len(whole.weights()) == 4
    assert "What each counts." in (whole.root / "report.html").read_text()


def test_a_step_s_file_has_every_answer_with_its_reward_and_the_weights_that_made_it(whole: RealJob) -> None:
    files = sorted((whole.root / "rollouts").glob("step-*.jsonl"))
    assert [file.name for file in files] == [f"step-{step:06d}.jsonl" for step in range(1, STEPS + 1)]
    weights = []
    for file in files:
        header, *answers = map(json.loads, file.read_text().splitlines())
        assert [answer["group"] for answer in answers] == [i // SAMPLES for i in range(PROMPTS * SAMPLES)]
        for answer in answers:
            text = answer["text"]
            assert [*answer["rewards"].values()] == [sum(map(ord, text)) % 7 / 7, len(text) / 100]
            assert answer["weights"] == header["weights"]
            assert len(answer["log_probabilities"]) == len(answer["answer_tokens"]) <= 12
        weights.append(header["weights"])
    assert [name.partition("-")[0] for name in weights] == ["0", "2", "4", "6"] and len(set(weights)) == STEPS
    assert all(not file.read_bytes() for file in (whole.root / "rollouts").glob("journal-*.jsonl"))


def test_a_resumed_job_draws_answers_and_learns_the_same_to_the_bit(folder: Path, whole: RealJob) -> None:
    name = f"step-{SAVED:08d}"
    shutil.copytree(whole.checkpoints / name, folder / "resumed" / "checkpoints" / name)
    resumed = job(folder, "resumed", "train.evaluate_every=2", "data.validation_rows=4")
    assert course(resumed) == course(whole, after=SAVED)
    assert resumed.weights() == whole.weights()
    for step in range(SAVED + 1, STEPS + 1):
        file = f"rollouts/step-{step:06d}.jsonl"
        assert (resumed.root / file).read_bytes() == (whole.root / file).read_bytes()


def test_one_rank_repeats_an_update_from_its_rollouts_as_the_job_made_it_and_itself_to_the_bit(
    folder: Path, whole: RealJob
) -> None:
    replay = ("rollout.mode=train_only", f"rollout.dump={whole.root / 'rollouts'}", "train.max_steps=2")
    alone, again = (job(folder, name, *replay, ranks=1, layout={"pp": 1, "ep": 1}) for name in ("alone", "again"))
    assert course(alone) == course(again) and alone.weights() == again.weights()
    for here, there in zip(course(alone), [record for record in course(whole) if "loss" in record], strict=False):
        if "loss" in here:
            for name in ("loss", "grad_norm", "actor/ppo_kl", "actor/kl_loss", "actor/entropy"):
                assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), (here["step"], name)
            assert _reward_weights(here) == pytest.approx(_reward_weights(there), rel=1e-4)


def test_answers_of_which_engine_and_trainer_differ_end_the_job_on_every_rank(folder: Path) -> None:
    limit = ("rollout.probe_rows=0", "rollout.max_logprob_diff=1e-12")  # FP32 is no nearer than 1e-8
    one = prepared(folder, "differs", *limit, ranks=2, layout={"pp": 1, "ep": 2})
    one.start_ranks(forked=True)
    try:
        assert one.wait(one.longest_wait) == [ExitStatus.USER_ERROR] * 2, one.logs()
    finally:
        one.kill()
    for rank in range(2):
        assert "at step 1, engine and trainer differ by " in one.log(rank).read_text()
    assert not any("loss" in record for record in one.metrics())


def test_rollouts_alone_train_nothing_and_export_nothing(folder: Path) -> None:
    settings = (
        "rollout.mode=rollout_only",
        "rewards.combine=popo_light",
        "train.max_steps=2",
        "policy.kl_coef=0",
        "checkpoint.save_every=null",
    )
    only = job(folder, "only", *settings, ranks=2, layout={"pp": 1, "ep": 2})
    names = [json.loads(file.read_text().partition("\n")[0])["weights"] for file in _steps(only)]
    assert len(names) == 2 and names[0] == names[1] and names[0].startswith("0-")
    assert not (only.root / "export").exists() and not any("loss" in record for record in only.metrics())


def test_answers_are_valid_names_in_training_and_in_evaluation_with_the_policys_own_log_probabilities(
    folder: Path,
) -> None:
    (folder / "empty_block.py").write_text(
        "def written(completions, task, **columns):\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    named = [None if name != 'next_advertiser' else text for text, name in zip(texts, task)]\n"
        "    return [text and float(text.startswith('<think></think>')) for text in named]\n"
    )
    written = f"{folder / 'empty_block.py'}:written"
    settings = (
        "rollout.valid_names=true",
        "rollout.max_new_tokens=48",
        "data.seq_length=512",
        "data.sources=[{kind: simulator, task: next_advertiser, rows: 40}, {kind: simulator, task: query_ad_relevance, "
        "rows: 40}]",
        "data.validation_rows=8",
        "train.evaluate_every=1",
        "train.max_steps=2",
        "rewards.combine=fixed",
        f"rewards.use=[{{name: '{folder / 'reward.py'}:some'}}, {{name: '{written}'}}]",
        "policy.kl_coef=0",
        "checkpoint.save_every=null",
    )
    named = job(folder, "named", *settings, ranks=1, layout={"pp": 1, "ep": 1})
    answers = [json.loads(line) for file in _steps(named) for line in file.read_text().splitlines()[1:]]
    of_names = [answer for answer in answers if answer["rewards"][written] is not None]
    assert {answer["rewards"][written] for answer in of_names} == {1.0}
    assert 0 < len(of_names) < len(answers) and not any(answer["cut_off"] for answer in of_names)
    assert len({answer["text"] for answer in of_names}) > 4
    judged = [record for record in named.metrics() if "validation/reward" in record]
    assert [record[f"validation/reward/{written}/mean"] for record in judged] == [1.0, 1.0]
    for record in named.metrics():
        assert "actor/pg_loss" not in record or 0 < record["rollout/logprob_abs_diff"] < 1e-4


def _reward_weights(record: dict[str, float]) -> list[float]:
    return [value for name, value in record.items() if name.startswith("reward_weight/")]


def _steps(job: RealJob) -> list[Path]:
    return sorted((job.root / "rollouts").glob("step-*.jsonl"))
