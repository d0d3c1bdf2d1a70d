"""Everything that would stop a job is found before it starts, each problem in one line."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.cli import main
from megatron_ads.config.recipes import load_recipe
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.disk import readable_bytes
from megatron_ads.launching import job_check
from megatron_ads.launching.job_check import check_job, needs_gpu
from megatron_ads.observability import trackers
from megatron_ads.training.checkpoint_folder import FORMAT
from megatron_ads.training.folder_lock import hold
from parity_tests.harness.real_job import FEW_ROWS, write_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("check") / "model")


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str]:
    few = [FEW_ROWS, "data.validation_rows=20"]
    return [f"model.load={model}", f"log.dir={tmp_path / 'run'}", "layout.first_stage_layers=2", *few]


def _checkpoint(folder: Path, *, listed_bytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"12345")
    files = {"data": {"bytes": listed_bytes, "crc32": 0}}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": 4, "files": files}))


def test_a_job_that_can_start_has_no_problem(words: list[str]) -> None:
    found = check_job("sft/quickstart", words, 4)
    assert found.problems == []
    assert [line.split(":")[0] for line in found.passed] == [
        "recipe", "weights", "tokenizer", "layout", "settings", "data", "checkpoint", "disk", "trackers", "folders",
    ]  # fmt: skip
    assert "4 ranks: pp 2 x dp 2 x tp 1, experts over 2" in found.passed[3]


def test_the_data_are_read_and_their_repeats_counted(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [("a", "Good"), ("A ", "Bad"), ("b", "Good")]
    rows = [
        {
            "task": "query_ad_relevance",
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"<Label>{label}</Label>"}],
        }
        for q, label in texts
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [*words, f"data.sources=[{{kind: jsonl, path: {file}}}]", "data.validation_rows=1"]
    (line,) = (line for line in check_job("sft/quickstart", own, 4).passed if line.startswith("data:"))
    assert "1 rows ask what an earlier one asks, 1 of them with another answer" in line
    assert "targets give no reasoning, so answers need none" in line
    (problem,) = check_job("sft/quickstart", [*own[:-1], "data.validation_rows=3"], 4).problems
    assert problem.startswith("data: data.validation_rows = 3 leaves none of the 3 rows")


def test_a_tracker_that_is_not_installed_is_a_problem(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (problem,) = check_job("sft/quickstart", [*words, "log.trackers=[wandb]"], 4).problems
    assert problem.startswith("trackers: log.trackers names wandb")


def test_context_parallelism_is_planned_but_not_trained_with(words: list[str]) -> None:
    (problem,) = check_job("sft/quickstart", [*words, "layout.cp=2"], 4).problems
    assert problem.startswith("layout: layout.cp is 2: the training step does not cut rows")


def test_a_problem_is_named_by_the_check_that_found_it(words: list[str]) -> None:
    wrong = [*words, "rollout.samples=1"]
    (problem,) = check_job("rl/quickstart", wrong, 4).problems
    assert problem.startswith("settings: rollout.samples is 1")
    layout, settings = check_job("rl/quickstart", [*wrong, "layout.cp=2"], 4).problems
    assert layout.startswith("layout: layout.cp is 2") and settings.startswith("settings: rollout.samples is 1")


def test_rollouts_of_fewer_steps_than_are_to_be_trained_are_found_before_the_job(
    words: list[str], tmp_path: Path
) -> None:
    recorded = [*words, "model.mtp_loss_weight=0", "rollout.mode=train_only", f"rollout.dump={tmp_path}"]
    recorded += ["train.evaluate_every=null", "train.max_steps=2"]
    (tmp_path / "step-000001.jsonl").write_text("")
    (problem,) = check_job("rl/quickstart", recorded, 4).problems
    assert problem.startswith(f"rollouts: {tmp_path} (rollout.dump) has no step-000002.jsonl. Name the folder")
    made_with = {"train.global_batch_size": 8, "rollout.samples": 8, "rollout.max_new_tokens": 64}
    (tmp_path / "step-000002.jsonl").write_text(json.dumps({"settings": made_with}) + "\n")
    found = check_job("rl/quickstart", recorded, 4)
    assert found.problems == [] and f"rollouts: {tmp_path} has those of 2 steps" in found.passed
    (problem,) = check_job("rl/quickstart", [*recorded, "rollout.max_new_tokens=32"], 4).problems
    assert problem.startswith(
        f"rollouts: {tmp_path}/step-000002.jsonl was made with rollout.max_new_tokens = 64, and this job has 32. Set it"
    )


def test_a_teacher_with_other_tokens_is_found_before_the_job(words: list[str], model: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(model, other)
    taught = [*words, "layout.first_stage_layers=null", f"teacher.model={other}"]
    found = check_job("rl/on_policy_distillation", taught, 1)
    assert found.problems == [] and f"teacher: {other} has the tokens of the policy" in found.passed
    assert "rewards: none; the teacher judges" in found.passed
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (problem,) = check_job("rl/on_policy_distillation", taught, 1).problems
    assert problem.startswith(f"teacher: the tokenizer of the teacher, {other}, differs in 2 of the policy's")


def test_all_problems_are_found_at_once(words: list[str], tmp_path: Path) -> None:
    _checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004", listed_bytes=6)
    wrong = [*words, f"model.load={tmp_path}/none", "data.sources=[{kind: jsonl, path: none.jsonl}]"]
    problems = check_job("sft/quickstart", wrong, 3).problems
    told = {problem.partition(": ")[0]: problem for problem in problems}
    parts = ("none does not exist", "does not divide the 3 ranks", "none.jsonl (data.sources)", "5 bytes long")
    assert len(problems) == len(parts)
    for check, part in zip(("weights", "layout", "data", "checkpoint"), parts, strict=True):
        assert part in told[check]
    assert all("\n" not in problem for problem in problems)


def test_a_recipe_that_does_not_compose_is_the_only_problem(words: list[str]) -> None:
    (problem,) = check_job("sft/quickstart", [*words, "train.stepz=3"], 4).problems
    assert "train.stepz" in problem


def test_a_whole_checkpoint_is_where_the_job_goes_on(words: list[str], tmp_path: Path) -> None:
    _checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004", listed_bytes=5)
    found = check_job("sft/quickstart", words, 4)
    assert any("the job continues from step 4" in line for line in found.passed)
    (problem,) = check_job("sft/quickstart", [*words, "checkpoint.resume=false"], 4).problems
    assert "checkpoint.resume is false" in problem
    few = [*words, "train.max_steps=3", "optim.warmup_steps=0"]
    (problem,) = check_job("sft/quickstart", few, 4).problems
    assert "train.max_steps is 3: the job would train nothing, and export the weights of step 4" in problem
    assert check_job("sft/quickstart", [*few, "train.max_steps=4"], 4).problems == []


@pytest.mark.parametrize("name", ["step-00000004", "step-00000300"])
@pytest.mark.parametrize("content", [[], ["data"]])
@pytest.mark.parametrize("complete", [0, 2])
def test_a_folder_in_the_way_of_a_later_save_is_found_before_the_job_starts(
    name: str, content: list[str], complete: int, words: list[str], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / name).mkdir(parents=True)
    for file in content:
        (checkpoints / name / file).touch()
    if complete:
        _checkpoint(checkpoints / f"step-{complete:08d}", listed_bytes=5)
    (problem,) = check_job("sft/quickstart", words, 4).problems
    assert problem.startswith(f"checkpoint: {checkpoints / name} has no manifest.json, so it is no complete checkpoint")


@pytest.mark.parametrize("name", ["step-00000001", "step-00000301", "step-4", "step-00000004 (copy)", ".DS_Store"])
def test_what_no_save_will_need_the_name_of_is_in_nobodys_way(name: str, words: list[str], tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    _checkpoint(checkpoints / "step-00000002", listed_bytes=5)
    (checkpoints / name).mkdir()
    assert check_job("sft/quickstart", words, 4).problems == []


def test_a_tokenizer_larger_than_the_embedding_is_a_problem_of_one_line(words: list[str], tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    token = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"] += [token | {"id": 9000 + number, "content": f"<{number}>"} for number in range(1536)]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (problem,) = check_job("sft/quickstart", [*words, f"model.load={model}"], 4).problems
    last = load_tokenizer(model).size - 1
    assert last > config["vocab_size"]
    assert f"has token ids up to {last}, but the model's embedding has {config['vocab_size']} rows" in problem
    (model / "tokenizer.json").unlink()
    (problem,) = check_job("sft/quickstart", [*words, f"model.load={model}"], 4).problems
    assert "holds no tokenizer.json" in problem


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok / topk_group is 6 / 2: "),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ],
)
def test_a_model_that_megatron_routes_differently_is_a_problem_of_one_line(
    changed: dict[str, Any], message: str, words: list[str], tmp_path: Path
) -> None:
    model = write_small_model(tmp_path / "routed")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changed))
    (problem,) = check_job("sft/quickstart", [*words, f"model.load={model}"], 4).problems
    assert problem.startswith(f"layout: {message}") and problem.endswith("This routing is not supported.")


def test_a_job_that_works_in_the_folder_is_a_problem(words: list[str], tmp_path: Path) -> None:
    with hold({"log.dir": tmp_path / "run"}, {}):
        (problem,) = check_job("sft/quickstart", words, 4).problems
    assert problem.startswith(
        f"folders: log.dir {tmp_path / 'run'} is in use by another job: process {os.getpid()} on "
    )
    assert check_job("sft/quickstart", words, 4).problems == []


def test_sizes_are_told_in_a_unit_that_suits_them(words: list[str]) -> None:
    (room,) = [line for line in check_job("sft/quickstart", words, 4).passed if line.startswith("disk: ")]
    assert " 0.0 " not in room and " MB" in room
    assert [readable_bytes(size) for size in (999, 13_600, 2.1e9, 1.5e12)] == [
        "999 bytes",
        "13.6 kB",
        "2.1 GB",
        "1.5 TB",
    ]


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_rendezvous_that_cannot_work_is_one_line_within_seconds(
    node: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_check, "RENDEZVOUS_SECONDS", 1.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # taken, and nobody listens
        port = other.getsockname()[1]
        variables = {"NNODES": "2", "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        assert job_check.run(Namespace(recipe="sft/quickstart", overrides=words, ranks=4, ranks_here=2)) == 2
        assert time.monotonic() - started < 30
    told = [line for line in capsys.readouterr().err.splitlines() if str(port) in line]
    assert len(told) == 1 and told[0].startswith("megatron-ads: node 0 cannot ")
    assert ("listen on port" if node == "0" else "be reached at 127.0.0.1") in told[0]


def test_checkpoints_that_the_disk_cannot_hold_are_a_problem(words: list[str]) -> None:
    (problem,) = check_job("sft/quickstart", [*words, "checkpoint.save_total_limit=100000000"], 4).problems
    assert "free, but" in problem and "checkpoint.save_total_limit = 100000000" in problem


def test_transformer_engine_layers_want_gpus_anywhere(words: list[str]) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert not needs_gpu(load_recipe("sft/quickstart", words), hidden)
    assert needs_gpu(load_recipe("sft/quickstart", [*words, "model.layer_spec=te"]), hidden)


def test_the_command_prints_what_is_well_and_exits_2_over_what_is_not(words: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_ads.cli", "check", "--recipe", "sft/quickstart", *words]
    well = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "GPU" not in well.stderr:  # a machine with fewer GPUs than ranks is told so
        assert (well.returncode, well.stderr) == (0, "")
    assert "ok    layout: 4 ranks" in well.stdout
    ill = subprocess.run([*command, "--ranks=3"], capture_output=True, text=True, timeout=120, check=False)
    assert ill.returncode == 2
    assert "megatron-ads: layout: layout.pp" in ill.stderr


def test_large_files_are_not_read_and_what_is_prepared_is_told(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    file.write_text("".join(json.dumps({"messages": messages, "group": f"g{n}"}) + "\n" for n in range(30)))
    own = [*words, f"data.sources=[{{kind: jsonl, path: {file}}}]"]
    monkeypatch.setattr(job_check, "_READ_AT_ONCE_BYTES", 0)

    def said() -> str:
        (line,) = (line for line in check_job("sft/quickstart", own, 4).passed if line.startswith("data:"))
        return line

    assert said().endswith("not read here; `megatron-ads data prepare` checks every row")
    assert main(["data", "prepare", "--recipe", "sft/quickstart", "--workers", "1", *own]) == 0
    assert "; 30 rows, " in said() and f"are prepared in {tmp_path / 'run' / 'prepared'}" in said()
