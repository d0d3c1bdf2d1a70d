"""`megatron-ads data preview` from the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ads.cli import main
from megatron_ads.config.data import AdsTask, RowVariant
from megatron_ads.data.demo_tokenizer import write_tokenizer
from tests.data.tokenizers import V31, model_tokenizer


def chat_line(row_id: str, target: str, task: str = "query_ad_relevance") -> str:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": target}]
    return json.dumps({"id": row_id, "task": task, "messages": messages})


def test_a_task_of_the_simulator_is_shown_with_a_summary(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "preview", "--task", "query_ad_relevance", "--rows", "2", "--sample", "20"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Rows of: simulated ads business: query_ad_relevance\n")
    assert len(re.findall(r"\[\[<think>.*?</think><Label>\w+</Label>.*?\]\]", out)) == 2
    assert "20 rows read." in out
    assert "\x1b" not in out  # not a terminal


@pytest.mark.parametrize("task", list(AdsTask))
def test_every_task_can_be_previewed(task: AdsTask, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "preview", "--task", task, "--rows", "1", "--sample", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["shown"]
    assert found["rows"] == 5
    assert found["left_out"] == {}
    assert row["tokens_with_loss"] == row["spans"][-1]["tokens"] > 0
    assert [span["loss_weight"] for span in row["spans"]] == [0.0, 1.0]


@pytest.mark.parametrize("variant", [variant for variant in RowVariant if variant is not RowVariant.next_item])
def test_rows_can_be_asked_another_way(variant: RowVariant, capsys: pytest.CaptureFixture[str]):
    words = ["data", "preview", "--task", "next_advertiser", "--variant", variant, "--sample", "200", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == f"simulated ads business: next_advertiser, asked as {variant}"
    assert found["left_out"] == {}
    assert found["rows"] == 200
    if variant is not RowVariant.several_forms:
        assert {row["task"] for row in found["shown"]} == {variant}


def test_rows_of_one_task_among_others_can_be_asked_another_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ad = {"role": "user", "content": "Is the ad relevant to the query?\nQuery: hotel\nAd: Hotel"}
    answer = {"role": "assistant", "content": "<think>So.</think><Label>Good</Label>"}
    line = json.dumps({"id": "r1", "task": "query_ad_relevance", "messages": [ad, answer]})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{line}\n{chat_line('r2', '4', 'own')}", encoding="utf-8")
    words = ["--source", str(file), "--task", "query_ad_relevance", "--variant", "yes_no"]
    assert main(["data", "preview", *words]) == 0
    assert "[[<think>So.</think><Answer>Yes</Answer>" in capsys.readouterr().out


def test_rows_of_a_file_with_a_tokenizer_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tokenizer(tmp_path, 600)
    file = tmp_path / "rows.jsonl"
    lines = [
        chat_line("r1", "<Label>Good</Label>"),
        chat_line("r2", "<Label>Great</Label>"),
        chat_line("r3", "4", "own"),
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert main(["data", "preview", "--source", str(file), "--tokenizer", str(tmp_path), "--seq-length", "6"]) == 0
    out = capsys.readouterr().out
    assert "r1 of query_ad_relevance" in out and "r3 of own" in out and "r2 of" not in out
    assert "unreadable_target (unknown_label) 1" in out
    assert "target_longer_than_seq_length 1" in out
    assert out.rstrip().endswith("The first that cannot be used: r2.")


def test_rows_of_a_recipe_are_those_of_its_sources(capsys: pytest.CaptureFixture[str]):
    words = ["data", "preview", "--recipe", "sft/quickstart", "data=builtin", "--rows", "1", "--sample", "10"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("Rows of: built-in query-ad pairs\n")


def test_every_source_of_a_recipe_has_its_share_of_the_sample(capsys: pytest.CaptureFixture[str]):
    tasks = ("query_ad_relevance", "ad_rewriting")
    sources = ", ".join(f"{{kind: simulator, task: {task}, rows: 30}}" for task in tasks)
    recipe = ["--recipe", "sft/quickstart", f"data.sources=[{sources}]"]
    assert main(["data", "preview", *recipe, "--rows", "4", "--sample", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 20
    assert [row["task"] for row in found["shown"]] == [*tasks, *tasks]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--task is None; the simulator draws query_ad_relevance, "),
        (["--task", "nonsense"], "--task is nonsense; the simulator draws "),
        (
            ["--source", "builtin", "--task", "user_profile"],
            "no row of built-in query-ad pairs is of task 'user_profile'",
        ),
        (["--source", "table"], "--source is 'table'; it is one of builtin, esci, gsm8k, next_brand, or a .jsonl file"),
        (["--source", "absent.jsonl"], "absent.jsonl is not a file"),
        (["--task", "user_profile", "--variant", "no"], "--variant is no; known: yes_no, choose_one, list_ranking, "),
        (["--task", "user_profile", "--variant", "yes_no"], "is of task user_profile, which cannot be asked as yes_no"),
        (["--task", "user_profile", "--rows", "-1"], "--rows is -1; it must be at least 0"),
        (["--task", "user_profile", "--seq-length", "1"], "--seq-length is 1; it must be at least 2"),
        (["--task", "user_profile", "data.seed=1"], "'data.seed=1' has no effect without --recipe"),
        (["pairs.csv"], "'pairs.csv' has no effect without --recipe. Did you mean --source pairs.csv?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "preview", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_recipe_decides_how_long_a_row_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "rows.jsonl"
    lines = [chat_line("short", "fine", task="chat"), chat_line("long", "word " * 200, task="chat")]
    file.write_text("\n".join(lines))
    recipe = ["--recipe", "sft/quickstart", f"data.sources=[{{kind: jsonl, path: {file}}}]", "data.seq_length=100"]
    assert main(["data", "preview", "--json", *recipe]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"target_longer_than_seq_length": 1}
    assert main(["data", "preview", "--json", "--seq-length", "1000", *recipe]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {}


def test_a_source_that_is_not_complete_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "preview", "--recipe", "sft/quickstart", "data.sources=[{kind: jsonl}]"]) == 2
    assert "data.sources[0].path is missing; kind jsonl reads a file of rows." in capsys.readouterr().err


PAIRS = "id,search_term,adTitle,relevance\n1,tent,Big Tent,E\n2,sofa,Sofa,C\n3,lamp,Lamp,S\n"
EVENTS = (
    "uid,ts,action,item,shop\nu1,1740614400000,Search,tent,\nu1,1741100000000,order,,Acme\nu1,1740614400000,ad,,\n"
    "u1,1741100000001,view,x,\nu1,1741100000002,view,x,\n"
)
SCORES = "user_id,headline,rating,click\n7,Tent,0,tents\n8,Sofa,3,sofas\n9,Sofa,4,x\n"


@pytest.mark.parametrize(
    ("name", "content", "task", "columns", "values"),
    [
        ("pairs.csv", PAIRS, "query_ad_relevance",
         {"id": "id", "query": "search_term", "title": "adTitle", "label": "relevance"},
         {"label": {"C": "Bad", "E": "Good", "S": "Fair"}}),
        ("events.CSV", EVENTS, "next_advertiser",
         {"user": "uid", "time": "ts", "event": "action", "text": "item", "advertiser": "shop"},
         {"event": {"Search": "onsite_search", "order": "matched_conversion", "ad": None, "view": "page_view"}}),
        ("scores.csv", SCORES, "ad_user_relevance",
         {"user": "user_id", "title": "headline", "score": "rating", "click": "click"}, {"score": {4: "0"}}),
        ("chat.csv", "question,answer\n2 + 2?,4\n", None, {"prompt": "question", "target": "answer"}, {}),
    ],
)  # fmt: skip
def test_a_table_is_shown_with_a_mapping_that_reads_it(
    name: str,
    content: str,
    task: str | None,
    columns: dict[str, str],
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / name).write_text(content)
    assert main(["data", "preview", "--source", str(tmp_path / name), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    head, _, pasted = out.partition("check what is guessed:\n")
    assert all(column in head for column in content.splitlines()[0].split(","))
    assert "text" in head
    (source,) = yaml.safe_load(pasted.partition("\n\n\n")[0])["data"]["sources"]
    assert (source.get("task"), source["columns"], source.get("values", {})) == (task, columns, values)
    assert "Rows of: own rows" in out and "1 with loss" not in head
    recipe = tmp_path / "mine.yaml"
    shipped = "defaults: [base_sft, /layout: pp1_ep1, /model: demo, _self_]\n"
    recipe.write_text(shipped + pasted.partition("\n\n\n")[0])
    assert main(["data", "preview", "--recipe", str(recipe), "--rows", "1"]) == 0
    assert "Rows of: own rows" in capsys.readouterr().out


def test_fields_that_no_column_looks_like_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.jsonl").write_text('{"q": "tent", "blob": {"a": 1}, "title": "Tent"}\n')
    words = ["data", "preview", "--source", str(tmp_path / "t.jsonl"), "--task", "query_ad_relevance"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "label: COLUMN" in out and "No column looks like label." in out
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["label"]
    assert [column["type"] for column in report["columns"]] == ["str", "dict", "str"]
    assert main(["data", "preview", "--source", str(tmp_path / "t.jsonl"), "--task", "nonsense"]) == 2
    assert "a table can be read as query_ad_relevance, " in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("q,t\n")
    assert main(["data", "preview", "--source", str(tmp_path / "t.csv")]) == 2
    assert "t.csv holds no row that can be read.\n" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("q,t\na\nb,c,d\n")
    assert main(["data", "preview", "--source", str(tmp_path / "t.csv")]) == 2
    first = "the first, row 1 of t.csv: unreadable_row: 1 cells; the head has 2.\n"
    assert f"t.csv holds no row that can be read; {first}" in capsys.readouterr().err


def test_a_folder_is_known_by_all_of_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for day, event, item, shop in (("2025-02-27", "find_search", "tent", ""), ("2025-03-05", "purchase", "", "Acme")):
        (tmp_path / f"dt={day}").mkdir()
        (tmp_path / f"dt={day}" / "part-0.csv").write_text(f"user_id,event_type,item,shop\n1,{event},{item},{shop}\n")
    assert main(["data", "preview", "--source", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "anchor: '2025-03-05'" in out and "time: dt" in out
    assert "event: {find_search: onsite_search, purchase: matched_conversion}" in out
    assert "label 'Acme'" in out


def test_a_preview_gives_the_template_what_training_gives_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_tokenizer(V31, tmp_path)
    command = ["data", "preview", "--recipe", "sft/quickstart", "--tokenizer", str(tmp_path), "--rows", "1"]
    assert main(command) == 2
    assert "Set 'data.template_arguments={thinking: true}', or data.reasoning=false." in capsys.readouterr().err
    assert main([*command, "data.template_arguments={thinking: true}"]) == 0
    assert "<｜Assistant｜><think>[[" in capsys.readouterr().out
    assert main([*command, "data.template_arguments={thinkng: true}"]) == 2
    assert "'thinkng', which the chat template of" in capsys.readouterr().err


def test_a_file_that_is_no_table_is_told_by_its_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    assert main(["data", "preview", "--source", str(tmp_path / "notes.md")]) == 2
    assert "notes.md ends in '.md'; known: .jsonl, .parquet, .csv" in capsys.readouterr().err
