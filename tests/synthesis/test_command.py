"""The command, end to end in a process of its own: what it prints, writes and returns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.config.data import DataConfig, SourceConfig, SourceKind
from megatron_ads.data.corpus import read_corpus
from megatron_ads.errors import DataError
from megatron_ads.synthesis.pipeline import open_models
from tests.inference.scripted_server import Reply, scripted_server
from tests.synthesis.scripted_recipes import good_answer, recipe, write_rows


def run_command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ads.cli", "data", "cook", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)


def test_rows_go_in_and_a_corpus_that_training_reads_comes_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 6)
    with scripted_server(lambda body, _: Reply(content=good_answer(body))) as server:
        common = ["--recipe", "cook/simulated", "--out", "cooked, twice", f"teacher.url='{server.url}'"]
        common += ["teacher.model=scripted", "sources=[{kind: jsonl, path: rows.jsonl}]", "reject.max_similarity=1"]
        done = run_command(*common, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "18 candidates, 18 kept; removed: none." in done.stdout
        assert done.stdout.endswith("Report: cooked, twice/report.md\n")
        requests = len(server.bodies)
        assert requests == 18  # the golden rows' wordings are the candidates'
        again = run_command(*common, "--json", folder=tmp_path)
        assert json.loads(again.stdout)["models"]["teacher"]["from_journal"] == 18
        assert len(server.bodies) == requests
    out = tmp_path / "cooked, twice"
    corpus = read_corpus(DataConfig(sources=[SourceConfig(kind=SourceKind.jsonl, path=str(out / "train.jsonl"))]))
    assert len(corpus.training[0]) == 18
    assert corpus.faulty == []
    assert sorted(file.name for file in out.iterdir()) == [
        "journal.jsonl",
        "recipe.yaml",
        "report.json",
        "report.md",
        "train.jsonl",
    ]


def test_nothing_that_passes_is_status_1_and_a_mistake_status_2_in_one_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("of an earlier run")
    with scripted_server(lambda *_: Reply(content="no")) as server:
        common = ["--recipe", "cook/simulated", "--out", "out", f"teacher.url='{server.url}'", "teacher.model=scripted"]
        failed = run_command(*common, "sources=[{kind: jsonl, path: rows.jsonl}]", folder=tmp_path)
    assert failed.returncode == 1
    assert "The golden check failed for query_ad_relevance (schema (no_reasoning) 6): rows" in failed.stdout
    assert not (tmp_path / "out" / "train.jsonl").exists()
    wrong = run_command("--recipe", "cook/simulated", "teacher.modl=x", folder=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "megatron-ads: cook/simulated: teacher.modl is not a setting; did you mean teacher.model?\n"
    )


def test_a_place_that_is_a_file_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    config = recipe(tmp_path, "http://unused/v1")
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match=r"out cannot be a folder \(File exists\)"), open_models(config):
        pass


def test_synthesize_is_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for name in ("cook", "synthesize"):
        with pytest.raises(SystemExit):
            main(["data", name, "--help"])
        helps.append(capsys.readouterr().out)
    assert helps[0] == helps[1].replace("data synthesize", "data cook")
