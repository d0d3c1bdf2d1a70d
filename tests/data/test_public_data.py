"""Public data: query-product pairs and questions become rows; the real files are used where they are."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.data.public_data import DATA_ROOT, ESCI_FILE, GSM8K_FILE, esci_rows, gsm8k_rows, locate, reason
from megatron_ads.data.split import split_by_group
from megatron_ads.errors import DataError
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label, RelevanceJudgement, parse

PAIR: dict[str, Any] = {
    "query": "red dog bowl",
    "asin": "B01",
    "esci": "S",
    "title": "Folding Bowls for Dogs",
    "brand": "Acme",
    "category": ["Pet Supplies", "Travel Bowls"],
}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_a_pair_becomes_a_row(tmp_path: Path):
    (row,) = esci_rows(write(tmp_path, PAIR))
    assert (row.id, row.group, row.label) == ("red dog bowl/B01", "red dog bowl", "Fair")
    assert row.prompt[0].content.splitlines()[1:] == [
        "Query: red dog bowl",
        "Ad: Folding Bowls for Dogs",
        "Seller: Acme",
        "Text: Travel Bowls",
    ]
    # dog ~ Dogs, bowl ~ Bowls; red is nowhere.
    assert row.target == (
        "<think>Found: dog, bowl. Missing: red. Kind: Travel Bowls. It could serve instead, or along with it.</think>"
        "<Label>Fair</Label>"
    )


@pytest.mark.parametrize(("judgment", "label"), [("E", "Good"), ("S", "Fair"), ("C", "Fair"), ("I", "Bad")])
def test_judgments_map_to_three_labels(tmp_path: Path, judgment: str, label: str):
    (row,) = esci_rows(write(tmp_path, PAIR | {"esci": judgment}))
    assert row.label == label


def test_reasoning_says_none_where_nothing_was_found_or_is_missing():
    assert reason("lamp", Ad("Sofa"), Label.bad) == "Found: none. Missing: lamp. It is something else."
    assert reason("sofa", Ad("Sofa"), Label.good) == "Found: sofa. Missing: none. It is what the query asks for."


def test_long_titles_are_cut_at_a_word(tmp_path: Path):
    (row,) = esci_rows(write(tmp_path, PAIR | {"title": "abcdefghi " * 20}))
    title = row.prompt[0].content.splitlines()[2].removeprefix("Ad: ")
    assert len(title) <= 100
    assert set(title.split()) == {"abcdefghi"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"esci": "X"}, "row 2: esci is 'X'; known: E, S, C, I"),
        ({"query": " "}, "row 2: query is ' '"),
        ({"title": None}, "row 2: title is None"),
        ({"category": "Pets"}, "row 2: brand is 'Acme' and category 'Pets'"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        esci_rows(write(tmp_path, PAIR, PAIR | change))


def test_limit_reads_no_further_pair(tmp_path: Path):
    assert len(esci_rows(write(tmp_path, PAIR, PAIR, {}), limit=2)) == 2


def test_the_file_is_the_given_path_or_below_the_data_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(DATA_ROOT, "/data")
    assert locate(None, ESCI_FILE, kind="esci") == Path("/data/esci_us/pairs.jsonl")
    assert locate("/elsewhere", ESCI_FILE, kind="esci") == Path("/elsewhere/pairs.jsonl")
    assert locate("/elsewhere/mine.jsonl", ESCI_FILE, kind="esci") == Path("/elsewhere/mine.jsonl")
    monkeypatch.delenv(DATA_ROOT)
    with pytest.raises(DataError, match="Set MEGATRON_ADS_DATA"):
        locate(None, ESCI_FILE, kind="esci")


REAL_PAIRS = Path(os.environ.get(DATA_ROOT, "")) / ESCI_FILE


@pytest.mark.skipif(
    not (os.environ.get(DATA_ROOT) and REAL_PAIRS.exists()), reason=f"{DATA_ROOT} names no folder with {ESCI_FILE}"
)
def test_the_real_pairs_are_all_read_and_split_by_query():
    rows = esci_rows(REAL_PAIRS)
    assert len(rows) > 1000
    assert {row.label for row in rows} == set(Label)
    assert all(isinstance(parse(row.target), RelevanceJudgement) for row in rows)
    split = split_by_group(rows, validation_rows=256, seed=0)
    assert {row.group for row in split.training}.isdisjoint(row.group for row in split.validation)


QUESTION = {"question": "What is 3 times 400?", "answer": "It is 3 * 400 = <<3*400=1200>>1,200.\n#### 1,200"}


def test_a_question_becomes_a_row(tmp_path: Path) -> None:
    (row,) = gsm8k_rows(write(tmp_path, QUESTION))
    assert (row.id, row.task, row.label, row.group) == ("gsm8k-train-1", "gsm8k", "1200", QUESTION["question"])
    assert row.messages[0].content == QUESTION["question"]
    assert row.target == "<think>It is 3 * 400 = 1,200.</think>#### 1200"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "row 2: question is ' '"),
        ({"answer": None}, "row 2: answer is None"),
        ({"answer": "12"}, "row 2: answer is '12'; a solution, then ####"),
        ({"answer": "Easy.\n####"}, "row 2: answer is"),
    ],
)
def test_a_question_that_cannot_be_used_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        gsm8k_rows(write(tmp_path, QUESTION, QUESTION | change))


def test_limit_reads_no_further_question(tmp_path: Path) -> None:
    assert len(gsm8k_rows(write(tmp_path, QUESTION, QUESTION, {}), limit=2)) == 2


REAL_QUESTIONS = Path(os.environ.get(DATA_ROOT, "")) / GSM8K_FILE


@pytest.mark.skipif(
    not (os.environ.get(DATA_ROOT) and REAL_QUESTIONS.exists()), reason=f"{DATA_ROOT} names no folder with {GSM8K_FILE}"
)
def test_the_real_questions_are_all_read() -> None:
    rows = gsm8k_rows(REAL_QUESTIONS)
    assert len(rows) > 7000
    assert all("<<" not in row.target and row.target.endswith(f"#### {row.label}") for row in rows)
