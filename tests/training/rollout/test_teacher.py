"""What a teacher says of rollouts: by a server that fails for some, by a checkpoint, and only of the same tokens."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ads.config.generation import ModelKind
from megatron_ads.config.rl import RolloutConfig
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.inference.transformers_engine import open_engine
from megatron_ads.rollouts import Rollout
from megatron_ads.training.rollout.dump import ScoredStep, read_recorded, step_file, write_step
from megatron_ads.training.rollout.metrics import of_step
from megatron_ads.training.rollout.teacher import JobTeacher, _open_teacher, require_same_tokens
from parity_tests.harness.real_job import write_small_model
from tests.inference.scripted_server import Reply, scripted_server
from tests.training.rollout.test_rollouts import rollout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("teacher") / "model")


def taught_by_server(script: Any, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Counter[str]]:
    with scripted_server(script) as server:
        config = TeacherConfig(
            model="m", url=server.url, tokenizer="d", attempts=2, concurrency=1, first_wait_seconds=0.01
        )
        with _open_teacher(config, 64) as teacher:
            return JobTeacher(teacher, 20).teach(rollouts, alone=True)


def script(body: dict[str, Any], _: int) -> Reply:
    """Say -1/8 a token; refuse a text with a 9, fail for one with a 10, and know no number for an 11."""
    prompt = body["prompt"]
    if 9 in prompt:
        return Reply(status=400, content="too long")
    if 10 in prompt:
        return Reply(status=500, content="no memory")
    number = None if 11 in prompt else -0.125
    known = [{str(token): {"logprob": math.nan if number is None else number * token}} for token in prompt[1:]]
    return Reply(content="said", choice={"prompt_logprobs": [None, *known]})


def test_answers_that_the_teacher_fails_for_are_counted_told_and_left_to_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rollouts = [rollout(group, answer) for group, answer in enumerate([(7, 8), (9,), (10, 8), (11,), (8,)])]
    found, faults = taught_by_server(script, rollouts)
    assert [each.teacher_log_probabilities for each in found] == [(-0.875, -1.0), None, None, None, (-1.0,)]
    assert faults == {"teacher/refused": 1, "teacher/unanswered": 1, "teacher/not_finite": 1}
    assert "The teacher failed for 3 of 5 rollouts (1 refused, 1 unanswered, 1 not_finite; HTTP 400" in caplog.text
    # The policy said -0.7, -0.8 and -0.8 of the tokens that the teacher said -0.875, -1 and -1 of.
    metrics = of_step(ScoredStep(rollouts=found, rewards={}, faults=faults), {}, RolloutConfig())
    assert metrics["teacher/reverse_kl"] == pytest.approx((0.175 + 0.2 + 0.2) / 3)
    assert metrics["rollout/faults/teacher/unanswered"] == 1
    assert not any(name.startswith("critic/") for name in metrics)


def test_a_teacher_that_fails_for_every_answer_ends_the_job_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"The teacher failed for 2 of 2 rollouts \(2 refused; HTTP 400: .*too long"):
        taught_by_server(script, [rollout(0, (9,)), rollout(1, (9, 8))])
    with pytest.raises(DataError, match=r"1 of 1 requests to the teacher have no answer after 2 attempts"):
        taught_by_server(script, [rollout(0, (10,))])


def test_a_checkpoint_reads_in_batches_what_its_vocabulary_has(model: Path) -> None:
    config = TeacherConfig(kind=ModelKind.local, model=str(model), batch_size=2)
    rollouts = [rollout(group, answer) for group, answer in enumerate([(7, 8), (5000,), (30,), (4, 5, 6)])]
    with _open_teacher(config, 64) as teacher:
        found, faults = JobTeacher(teacher, 20).teach(rollouts, alone=True)
    assert faults == {"teacher/refused": 1} and found[1].teacher_log_probabilities is None
    engine = open_engine(model)
    for each in (found[0], found[2], found[3]):
        logits = engine._model(torch.tensor([[*each.prompt_tokens, *each.answer_tokens]])).logits[0]
        said = logits.log_softmax(-1)[2:-1].gather(1, torch.tensor(each.answer_tokens)[:, None])[:, 0]
        assert each.teacher_log_probabilities == pytest.approx(said.tolist(), abs=1e-5)
    too_long = r"positions for 16384 tokens, and data\.seq_length is 20000"
    with pytest.raises(ConfigError, match=too_long), _open_teacher(config, 20000):
        pass


def test_a_teacher_must_have_the_tokens_of_the_policy_under_the_same_ids_and_may_have_more(
    model: Path, tmp_path: Path
) -> None:
    own = load_tokenizer(model)
    require_same_tokens(TeacherConfig(kind=ModelKind.local, model=str(model)), own)
    grown = tmp_path / "grown"
    shutil.copytree(model, grown)
    own.fast.add_tokens(["<sid_0_1>"])
    own.fast.save_pretrained(grown)
    require_same_tokens(TeacherConfig(model="m", url="u", tokenizer=str(grown)), load_tokenizer(model))
    with pytest.raises(
        ConfigError, match=r"differs in 1 of the policy's \d+ tokens: '<sid_0_1>', here \d+, is missing"
    ):
        require_same_tokens(TeacherConfig(model="m", url="u", tokenizer=str(model)), load_tokenizer(grown))


def test_a_step_on_file_has_what_the_teacher_said_and_gives_it_to_jobs_with_a_teacher(tmp_path: Path) -> None:
    taught, _ = taught_by_server(script, [rollout(0, (7, 8)), rollout(1, (9,))])
    file, settings = step_file(tmp_path, 1), {"rollout.samples": 1}
    header = {"step": 1, "settings": settings}
    write_step(file, ScoredStep(rollouts=taught, rewards={}, faults=Counter({"teacher/refused": 1})), header)
    rows = {each.row.id: each.row for each in taught}
    assert read_recorded(tmp_path, 1, rows, [], settings, by_teacher=True).rollouts == taught
    untaught = read_recorded(tmp_path, 1, rows, [], settings).rollouts
    assert untaught == [rollout(0, (7, 8)), rollout(1, (9,))]
    write_step(file, ScoredStep(rollouts=untaught, rewards={}), header)
    assert "teacher" not in file.read_text()
    with pytest.raises(DataError, match=r"step-000001\.jsonl has nothing of a teacher, and teacher\.model names one"):
        read_recorded(tmp_path, 1, rows, [], settings, by_teacher=True)
