import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.generate import RowAsker

PAIRS = "data.sources=[{kind: simulator, task: query_ad_relevance, rows: 300}]"
RECIPE = ["--recipe", "sft/quickstart", PAIRS, "data.validation_rows=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "model"
    write_demo_model(path, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    return path


def test_a_random_model_is_evaluated_on_the_held_out_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ["evaluate", "--model", str(folder), "--max-new-tokens", "4", "--batch-size", "4", "--json"]
    assert main([*arguments, "--answers", str(answers), *RECIPE]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = result["tasks"]["query_ad_relevance"]
    assert result["rows"] == scores["rows"] == 6
    assert scores["readable_share"] == 0.0  # four tokens cannot hold reasoning and label
    assert scores["views"]["bad"]["baseline"]["balanced_accuracy"] == 0.5
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(written) == 6
    assert {row["expected"] for row in written} <= {"Bad", "Fair", "Good"}


def test_for_people_it_prints_model_and_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(folder), "--max-new-tokens", "2", *RECIPE]) == 0
    out = capsys.readouterr().out
    assert "AdNanny, table 1: query-ad relevance, bad is a defect" in out
    assert re.search(r"accuracy over all labels +0\.\d+ +0\.\d+ \(always (Bad|Fair|Good)\)", out)


def test_a_recipe_without_reasoning_is_evaluated_without(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ["evaluate", "--model", str(folder), "--max-new-tokens", "2", "--json", "--answers", str(answers)]
    assert main([*arguments, *RECIPE, "data.reasoning=false"]) == 0
    assert json.loads(capsys.readouterr().out)["reasoning"] is False
    targets = [json.loads(line)["target"] for line in answers.read_text().splitlines()]
    assert all(target.startswith("<think></think><Label>") for target in targets)


def test_a_page_is_written_and_a_place_for_it_that_does_not_exist_is_refused_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--model", str(folder), "--max-new-tokens", "2", *RECIPE, "--html"]
    assert main([*arguments, str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "query_ad_relevance: confusion" in page
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "absent" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_no_held_out_rows_is_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(folder), *RECIPE[:-1], "data.validation_rows=0"]) == 2
    err = capsys.readouterr().err
    assert "raise data.validation_rows" in err
    assert err.count("\n") == 1


def test_rows_of_no_ads_task_are_not_answered_but_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, answers, page = (tmp_path / name for name in ("own.jsonl", "answers.jsonl", "page.html"))
    answer = {"role": "assistant", "content": "Hello."}
    rows = [{"messages": [{"role": "user", "content": f"Hello {number}?"}, answer]} for number in range(12)]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "--model", str(folder), "--answers", str(answers), "--html", str(page), "--json"]
    source = f"data.sources=[{{kind: jsonl, path: {own}}}]"
    assert main([*arguments, "--recipe", "sft/quickstart", "data.validation_rows=4", source]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["tasks"], result["general"]["chat"]["rows"]) == (0, {}, 4)
    assert result["general"]["chat"]["perplexity"] > 1
    assert answers.read_text() == ""
    assert "perplexity, 4 rows" in page.read_text()


ADVERTISERS = [
    "--recipe", "sft/quickstart", "data=simulator", "data.validation_rows=6",
    "data.sources=[{kind: simulator, task: next_advertiser, rows: 60}]",
]  # fmt: skip


def test_advertisers_are_ranked_by_constrained_beams_next_to_baselines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    arguments = ["evaluate", "--model", str(folder), "--decode", "constrained-beam", "--beams", "20", "--json"]
    assert main([*arguments, "--answers", str(file), *ADVERTISERS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["decoding"] == "constrained-beam"
    ranking = result["tasks"]["next_advertiser"]["ranking"]
    assert set(ranking["methods"]) == {"model", "popular", "recent, then popular", "best reachable"}
    for method in ranking["methods"].values():
        assert {"recall@1", "recall@5", "recall@20", "ndcg@20", "ndcg@20_95"} <= set(method)
    assert (ranking["valid_rate"], ranking["distinct_rate"]) == (1.0, 1.0)
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    for answer in answers:
        texts = [beam["text"] for beam in answer["beams"]]
        assert len(set(texts)) == min(20, ranking["valid_names"])
        assert answer["text"] == texts[0]
        scores = [beam["score"] for beam in answer["beams"]]
        assert scores == sorted(scores, reverse=True)


def test_for_people_rankings_stand_in_one_table_with_baselines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Acme\nBolt\n")
    arguments = ["evaluate", "--model", str(folder), "--decode", "constrained-beam", "--names", str(names)]
    assert main([*arguments, *ADVERTISERS]) == 0
    out = capsys.readouterr().out
    assert "recall@20" in out
    assert "recent, then popular" in out
    assert f"of 2 names from {names}; the true one is among them in 0.0% of the rows" in out


def test_constrained_beams_over_rows_without_names_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", str(folder), "--decode", "constrained-beam", *RECIPE]) == 2
    err = capsys.readouterr().err
    assert "--decode constrained-beam has no effect: none of the 6 held-out rows, of query_ad_relevance, is" in err
    assert err.count("\n") == 1


def test_a_sampled_evaluation_is_repeated_by_its_seed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for number, seed in enumerate(("1", "1", "2")):
        file = tmp_path / f"{number}.jsonl"
        arguments = ["evaluate", "--model", str(folder), "--decode", "sampled", "--seed", seed, "--max-new-tokens", "6"]
        assert main([*arguments, "--answers", str(file), *RECIPE]) == 0
        texts.append([json.loads(line)["text"] for line in file.read_text().splitlines()])
    assert texts[0] == texts[1] != texts[2]


def test_an_option_that_would_do_nothing_is_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(folder), "--beams", "4", *RECIPE]) == 2
    err = capsys.readouterr().err
    assert "--beams has no effect with --decode greedy" in err
    assert err.count("\n") == 1
    assert main(["evaluate", "--model", str(folder), "--batch-size", "0", *RECIPE]) == 2
    assert "--batch-size is 0; it must be at least 1." in capsys.readouterr().err
    assert main(["evaluate", "--model", str(folder), "--decode", "constrained-beam", "--ground", *RECIPE]) == 2
    assert "--ground has no effect with --decode constrained-beam" in capsys.readouterr().err


def _evaluate(model: Path, answers: Path, *arguments: str) -> str:
    assert main(["evaluate", "--model", str(model), "--answers", str(answers), *arguments, *RECIPE]) == 0
    return answers.read_text()


def test_an_interrupted_evaluation_goes_on_and_ends_as_if_it_had_not_been(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--decode", "sampled", "--max-new-tokens", "6", "--batch-size", "2"]
    expected = _evaluate(folder, tmp_path / "expected.jsonl", *arguments)
    answer = RowAsker.answer
    asked: list[int] = []

    def interrupted(self: RowAsker, batch: Sequence[int], *, draw: int) -> list[Answer]:
        asked.append(draw)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, batch, draw=draw)

    monkeypatch.setattr(RowAsker, "answer", interrupted)
    file = tmp_path / "answers.jsonl"
    assert main(["evaluate", "--model", str(folder), "--answers", str(file), *arguments, *RECIPE]) == 130
    assert not file.exists()
    capsys.readouterr()
    assert _evaluate(folder, file, *arguments) == expected
    assert asked == [0, 1, 1, 2]  # of three batches the first is not answered again
    assert "2 rows were answered before the interruption; continuing." in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("answers*")] == ["answers.jsonl"]


@pytest.mark.parametrize(
    ("kind", "options"), [("shards", ["--pp", "2", "--ep", "2"]), ("torch_dist", ["--format", "torch_dist"])]
)
def test_a_megatron_checkpoint_answers_as_the_folder_it_came_from(
    kind: str, options: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron = tmp_path / "megatron"
    assert main(["convert", "to-megatron", str(folder), str(megatron), *options]) == 0
    answers = [_evaluate(model, tmp_path / "answers.jsonl", "--max-new-tokens", "6") for model in (folder, megatron)]
    assert answers[0] == answers[1]
    assert f"{megatron} is a {kind} folder: exporting it to" in capsys.readouterr().err


def test_one_of_twenty_is_chosen_among_those_that_the_row_lists(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    source = "data.sources=[{kind: simulator, task: next_advertiser, rows: 60, variant: choose_one}]"
    arguments = ["--decode", "constrained-beam", "--beams", "3", "--collaborative", "0.5", "--answers", str(file)]
    assert main(["evaluate", "--model", str(folder), *arguments, *ADVERTISERS[:-1], source]) == 0
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(answers) == 6
    for answer in answers:
        listed = answer["prompt"].splitlines()[-20:]
        names = [beam["text"].removeprefix("<think></think>") for beam in answer["beams"]]
        assert len(set(names)) == 3
        assert set(names) <= set(listed)
        # The score is no longer the model's alone.
        assert any(beam["score"] != pytest.approx(beam["log_probability"]) for beam in answer["beams"])


LEAVE_IT, BEAMS = "leave it out, or take --decode", "beam or constrained-beam"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--decode beam --temperature 0.5", f"--temperature has no effect with --decode beam; {LEAVE_IT} sampled."),
        ("--top-p 0.5", f"--top-p has no effect with --decode greedy; {LEAVE_IT} sampled."),
        ("--decode sampled --beams 4", f"--beams has no effect with --decode sampled; {LEAVE_IT} {BEAMS}."),
        ("--decode sampled --temperature 0", "--temperature is 0.0; it must be above 0."),
        ("--decode sampled --top-p 1.1", "--top-p is 1.1; it must be above 0 and at most 1."),
        ("--decode beam --beams 0", "--beams is 0; it must be at least 1."),
        ("--decode constrained-beam --collaborative -0.1", "--collaborative is -0.1; it must be from 0 to 1."),
    ],
)
def test_a_wrong_option_is_named_as_it_was_typed(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", "unused", *options.split(), *RECIPE]) == 2
    assert capsys.readouterr().err == f"megatron-ads: {message}\n"
