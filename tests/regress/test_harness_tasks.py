import gzip
import json
from pathlib import Path

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.regress import harness_tasks
from megatron_ads.regress.harness_tasks import load_benchmark, local_files, require_lm_eval
from megatron_ads.regress.suite import SUITE, Kind, chosen


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def test_lm_eval_has_every_task_of_the_suite_as_it_is_pinned() -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    require_lm_eval()
    root, found = Path(lm_eval.tasks.__file__).parent, []
    for benchmark in SUITE:
        if benchmark.described_in is None:
            continue
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / benchmark.described_in])
        assert benchmark.task in manager.all_tasks
        if benchmark.task in manager.all_groups:  # its tasks are known when its questions are
            continue
        settings = load_yaml(manager.task_index[benchmark.task].yaml_path, resolve_func=False)
        found.append(benchmark.name)
        assert settings["metadata"]["version"] == benchmark.version
        assert benchmark.metric in [metric["metric"] for metric in settings["metric_list"]]
        readings = [one["name"] for one in settings.get("filter_list") or [{"name": "none"}]]
        assert benchmark.reading in readings
        assert (settings["output_type"] == "multiple_choice") == (benchmark.kind is Kind.choice)
    assert len(found) == 10


def test_the_suite_is_that_of_the_papers_table() -> None:
    names = [benchmark.name for benchmark in chosen([])]
    assert len(names) == len(set(names)) == 17
    assert [benchmark.name for benchmark in chosen(["piqa", "anli_r3"])] == ["anli_r3", "piqa"]


def test_another_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "LM_EVAL", "0.0.1")
    with pytest.raises(ConfigError, match=r"need lm-eval 0\.0\.1.*here it is 0\.4"):
        require_lm_eval()


def test_files_are_found_by_split_and_a_single_one_is_the_test(tmp_path: Path) -> None:
    assert local_files(tmp_path / "absent") == {}
    (tmp_path / "LICENSE").touch()
    (tmp_path / "HumanEval.jsonl.gz").touch()
    assert local_files(tmp_path) == {"test": tmp_path / "HumanEval.jsonl.gz"}
    for name in ("test.parquet", "train.parquet", "other.jsonl"):
        (tmp_path / name).touch()
    assert local_files(tmp_path) == {"test": tmp_path / "test.parquet", "train": tmp_path / "train.parquet"}


def test_questions_come_from_local_files(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    row = {"question": "How much is 6 x 7?", "answer": "It is 42.\n#### 42"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (gsm8k,) = chosen(["gsm8k"])
    (task,) = load_benchmark(gsm8k, tmp_path, chat=True).tasks.values()
    assert task.config.num_fewshot == gsm8k.shots == 8
    assert task.doc_to_text(task.eval_docs[0]) == "Q: How much is 6 x 7?\nA:"
    assert task.doc_to_target(task.eval_docs[0]) == "42"


@pytest.mark.parametrize("chat", [True, False])
def test_a_program_is_asked_for_in_words_where_a_model_is_spoken_to(tmp_path: Path, chat: bool) -> None:
    (tmp_path / "humaneval").mkdir()
    problem = {"task_id": "HumanEval/0", "prompt": "def six():\n", "canonical_solution": "    return 6\n"}
    problem |= {"test": "def check(six):\n    assert six() == 6\n", "entry_point": "six"}
    with gzip.open(tmp_path / "humaneval" / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(problem) + "\n")
    (human_eval,) = chosen(["humaneval"])
    (task,) = load_benchmark(human_eval, tmp_path, chat=chat).tasks.values()
    asked = task.doc_to_text(task.eval_docs[0])
    assert asked.startswith("Complete this function") if chat else asked == "def six():\n"
    right = "```python\ndef six():\n    return 6\n```" if chat else "    return 6\n"
    assert task.process_results(task.eval_docs[0], [right]) == {"pass@1": 1.0}
    assert task.process_results(task.eval_docs[0], ["    return 7\n"]) == {"pass@1": 0.0}
