"""From a teacher's answers to a student and a report, with a real server, a real training and a real evaluation."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conversion.sources import open_source
from megatron_ads import cli
from megatron_ads.config.distillation import Student, load_distill_recipe
from megatron_ads.config.recipes import load_job
from megatron_ads.data.corpus import read_corpus
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.split import group_of
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.distillation.corpus import write_corpus
from megatron_ads.distillation.questions import JUDGED, judged_rows, write_rows
from megatron_ads.observability.metrics import read_metrics
from tests.inference.scripted_server import Reply, scripted_server

PAIRS = "[{kind: builtin, rows: 60}]"
SMALL = CONFIGS[Preset.shallow] | {
    "num_hidden_layers": 2, "n_routed_experts": 4, "moe_intermediate_size": 64, "torch_dtype": "float32",
}  # fmt: skip


def answer(body: dict[str, Any], times: int) -> Reply:
    """Answer well; every fifth prompt without a word of its own, every seventh in a form that cannot be read."""
    asked = body["messages"][-1]["content"]
    number = sum(map(ord, asked))
    if number % 7 == 0:
        return Reply(content="<Label>Perhaps</Label>")
    said = "that is what one may want of such a thing" if number % 5 == 0 else " ".join(asked.split()[-30:])
    return Reply(content=f"<think>{said.replace('<', '')}</think><Label>{('Bad', 'Good')[number % 2]}</Label>")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    write_demo_model(tmp_path / "small", SMALL)
    settings = [
        "layout=pp1_ep1", "train.max_steps=1", "train.global_batch_size=2", "train.micro_batch_size=1",
        "train.evaluate_every=null", "optim.warmup_steps=0", "model.mtp_loss_weight=0", "log.tensorboard=false",
    ]  # fmt: skip
    judged = [f"data.sources={PAIRS}", "data.validation_rows=4"]
    return [
        f"sources={PAIRS}", "students=[checked]", f"student.load='{tmp_path / 'small'}'", "student.validation_rows=0",
        "student.recipe=sft/quickstart", f"student.settings={json.dumps(settings)}", "draws=2", "teacher.model=any",
        "teacher.concurrency=4",
        f"judged.settings={json.dumps(judged)}", "judged.recipe=sft/quickstart", "judged.max_new_tokens=4",
        "quality.min_probability=0", "quality.min_words=3", "quality.min_details=2", "attempts=1",
    ]  # fmt: skip


@pytest.mark.first
@pytest.mark.timeout(600)
def test_a_student_learns_from_what_passes_and_is_judged_beside_its_teacher(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with scripted_server(answer) as server:
        words = [*given, f"teacher.url={server.url}"]
        command = ["distill", "--recipe", "distill/simulated", "--out", str(out), "--json", *words]
        assert cli.main(command) == 0
        (printed,) = capsys.readouterr().out.splitlines()
        report = json.loads(printed)
        asked = len(server.bodies)
        assert cli.main(command) == 0  # all is complete
        assert len(server.bodies) == asked
    assert "was complete already" in capsys.readouterr().err
    config = load_distill_recipe("distill/simulated", words, out=str(out))
    questions, judged = jsonl_rows(out / "questions.jsonl"), judged_rows(config).tasks
    assert len(questions) == report["asked"]["rows"] and report["asked"]["left_out"][JUDGED] == 60 - len(questions) > 0
    assert not {group_of(row) for row in questions} & {group_of(row) for row in judged}

    kept = jsonl_rows(out / "rows" / "checked.jsonl")
    found = report["models"]["checked"]["rows"]
    assert found["kept"] == len(kept) == len(questions) - sum(found["removed"].values())
    assert {"unreadable", "boilerplate"} <= found["removed"].keys()
    assert "### Removed by boilerplate" in (out / "rows" / "checked.md").read_text()
    everything = write_corpus(config, out / "questions.jsonl", Student.unchecked)
    assert everything["kept"] == len(questions) - found["removed"]["unreadable"] > len(kept)
    assert Counter(row.label for row in kept).keys() == {"Bad", "Good"}

    assert (out / "checked" / "export" / "manifest.json").exists()
    teacher, student = (report["models"][name] for name in ("teacher", "checked"))
    assert student["agreement"]["query_ad_relevance"]["agreement"] == 0  # after one step it writes nothing readable
    assert teacher["scores"]["tasks"]["query_ad_relevance"]["readable_share"] > 0.5
    text = (out / "report.md").read_text()
    assert "| query_ad_relevance | checked | bad/balanced_accuracy |" in text


@pytest.mark.timeout(600)
def test_a_student_learns_from_its_own_answers_and_is_judged_again(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out", tmp_path / "answered.jsonl"
    settings = [f"data.sources={PAIRS}", "data.validation_rows=4"]
    (*training,) = read_corpus(load_job("sft/quickstart", settings, sections=["data"]).data).training
    write_rows(rows, [row for of_source in training for row in of_source])
    write_demo_model(tmp_path / "teacher", SMALL, seed=1)
    own = ["rollout.max_new_tokens=4", "train.global_batch_size=2", "train.micro_batch_size=1", "data.seq_length=256"]
    words = [
        *given, "teacher.kind=local", "teacher.url=null", f"teacher.model='{tmp_path / 'teacher'}'",
        "teacher.concurrency=8", "sources=[]", f"answered=[{{kind: jsonl, path: '{rows}'}}]", "draws=1",
        "quality.min_agreement=0", "quality.min_similarity=0", "quality.min_words=0", "quality.min_details=0",
        "on_policy.steps=1", f"on_policy.settings={json.dumps(own)}",
    ]  # fmt: skip
    assert cli.main(["distill", "--recipe", "distill/simulated", "--out", str(out), "--json", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    (step,) = (row for row in read_metrics(out / "on_policy") if "teacher/reverse_kl" in row)
    assert step["teacher/reverse_kl"] != 0
    before, after = (open_source(out / name / "export") for name in ("checked", "on_policy"))
    assert (before.read("output_layer.weight") != after.read("output_layer.weight")).any()
    assert report["models"].keys() == {"teacher", "checked", "on_policy"}
    assert report["on_policy_difference"]["of"] == "checked" and report["difference"] is None
    assert "| dataset | metric | checked | on_policy | difference |" in (out / "report.md").read_text()


def test_a_teacher_with_other_tokens_is_refused_before_it_is_asked(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo_model(tmp_path / "teacher", SMALL)
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with scripted_server(answer) as server:
        words = [*given, f"teacher.url={server.url}", f"teacher.tokenizer='{file.parent}'", "on_policy.steps=1"]
        assert cli.main(["distill", "--recipe", "distill/simulated", "--out", str(tmp_path / "out"), *words]) == 2
        assert not server.bodies
    assert "On-policy distillation compares tokens: choose a teacher with the policy's" in capsys.readouterr().err


def test_a_student_that_cannot_be_trained_is_refused_before_the_teacher_is_asked(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_server(answer) as server:
        words = [*given, f"teacher.url={server.url}", "student.settings=['train.max_steps=2', 'optim.warmup_steps=3']"]
        assert cli.main(["distill", "--recipe", "distill/simulated", "--out", str(tmp_path / "out"), *words]) == 2
        assert not server.bodies
    assert "optim.warmup_steps = 3 is more than train.max_steps = 2" in capsys.readouterr().err
