"""`megatron-ads sid`: from a file of items to IDs, which stay the items' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ads.cli import main
from megatron_ads.config.semantic_ids import load_semantic_ids
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.semantic_id_table import read_semantic_ids
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.semantic_ids.disambiguation import disambiguated
from megatron_ads.semantic_ids.report import measure
from megatron_ads.tasks.semantic_id import is_semantic_id, text_of

WORDS = ("ink", "pen", "desk", "lamp", "chair", "paper")
SIZES = ("levels=2", "codes=4", "epochs=3", "hidden=[8]", "latent=4", "dimensions=8")


def write_items(file: Path, numbers: range) -> Path:
    items = [
        {"item_id": number, "title": f"{WORDS[number % 6]} {WORDS[number // 6 % 6]}", "brand": f"b{number % 3}",
         "vector": [number % 5, number % 7]}
        for number in numbers
    ]  # fmt: skip
    file.write_text("".join(f"{json.dumps(item)}\n" for item in items))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def fit(capsys: pytest.CaptureFixture[str], items: Path, out: Path, *more: object) -> dict[str, Any]:
    of_texts = () if "--vectors" in more else ("--text", "title", "--text", "brand")
    return run(capsys, "sid", "fit", "--items", items, *of_texts, "--out", out, *SIZES, *more)


@pytest.mark.parametrize("quantizer", ["rqvae", "rqkmeans"])
def test_items_get_ids_of_their_own_and_the_report_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantizer: str
) -> None:
    report = fit(capsys, write_items(tmp_path / "items.jsonl", range(40)), tmp_path / "sid", f"quantizer={quantizer}")
    ids = read_semantic_ids(tmp_path / "sid")
    assert list(ids) == [str(number) for number in range(40)]
    assert len(set(ids.values())) == report["different_ids"] == report["items"] == 40
    assert all(map(is_semantic_id, ids.values()))
    assert report["collision_rate"] > 0  # 40 items, and at most 16 pairs of codes
    assert [level["codes"] for level in report["levels"]] == [4, 4]
    tokens = (tmp_path / "sid" / "tokens.txt").read_text().split()
    assert len(tokens) == len(set(tokens)) == 2 * 4 + 255
    used = {f"<{token}" for sid in ids.values() for token in sid.split("<")[1:]}
    assert used <= set(tokens)


def test_the_same_items_give_the_same_version_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = write_items(tmp_path / "items.jsonl", range(40))
    one, two, other = (
        fit(capsys, items, tmp_path / name, *more) for name, more in (("a", ()), ("b", ()), ("c", ("seed=1",)))
    )
    assert one["version"] == two["version"] != other["version"]
    for file in ("items.parquet", "codebook.safetensors", "codebook.json", "alignment.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_encoding_the_same_items_gives_the_same_ids_and_new_ones_do_not_move_the_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(capsys, write_items(tmp_path / "items.jsonl", range(10, 40)), tmp_path / "sid")
    before = read_semantic_ids(tmp_path / "sid")
    encode = ("sid", "encode", "--codebook", tmp_path / "sid", "--text", "title", "--text", "brand", "--items")
    run(capsys, *encode, tmp_path / "items.jsonl", "--out", tmp_path / "again")
    assert read_semantic_ids(tmp_path / "again") == before
    more = write_items(tmp_path / "more.jsonl", range(20))  # 10 of before, and 10 whose ids sort in front of them
    report = run(capsys, *encode, more, "--previous", tmp_path / "sid", "--out", tmp_path / "more")
    after = read_semantic_ids(tmp_path / "more")
    assert report["kept"] == 10
    assert {name: after[name] for name in before} == before
    assert len(after) == len(set(after.values())) == 40


def test_vectors_come_from_a_column_or_from_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = write_items(tmp_path / "items.jsonl", range(40))
    vectors = [json.loads(line)["vector"] for line in items.read_text().splitlines()]
    np.save(tmp_path / "vectors.npy", np.asarray(vectors, dtype=np.float64))
    fit(capsys, items, tmp_path / "column", "--vectors", "vector")
    fit(capsys, items, tmp_path / "file", "--vectors", tmp_path / "vectors.npy")
    assert read_semantic_ids(tmp_path / "column") == read_semantic_ids(tmp_path / "file")
    np.save(tmp_path / "vectors.npy", np.zeros((39, 2)))
    arguments = ["sid", "fit", "--items", str(items), "--vectors", str(tmp_path / "vectors.npy")]
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 2
    assert "shape (39, 2); the 40 items need numbers of shape (40, dimensions)" in capsys.readouterr().err


def test_alignment_rows_lead_from_id_to_text_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(capsys, write_items(tmp_path / "items.jsonl", range(40)), tmp_path / "sid")
    rows = jsonl_rows(tmp_path / "sid" / "alignment.jsonl")
    assert len(rows) == 80
    ids = read_semantic_ids(tmp_path / "sid")
    to_text, to_id = rows[:2]
    assert (to_text.group, to_text.target) == ("0", "ink ink; b0")
    assert ids["0"] in to_text.prompt[0].content
    assert to_id.target == ids["0"]
    assert "ink ink; b0" in to_id.prompt[0].content


def test_a_text_column_that_no_item_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = write_items(tmp_path / "items.jsonl", range(40))
    command = ["sid", "fit", "--items", items, "--text", "title", "--text", "brnd", "--out", tmp_path / "sid", *SIZES]
    assert main(list(map(str, command))) == 2
    assert "no column 'brnd'; it has brand, item_id, title, vector. Did you mean 'brand'?" in capsys.readouterr().err


def test_earlier_ids_from_a_folder_without_a_table_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = write_items(tmp_path / "items.jsonl", range(40))
    fit(capsys, items, tmp_path / "sid", "quantizer=rqkmeans")
    encode = ["sid", "encode", "--codebook", tmp_path / "sid", "--items", items, "--text", "title"]
    assert main([*map(str, encode), "--previous", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "has no items.parquet: it is no folder of semantic IDs" in capsys.readouterr().err


def test_a_table_of_another_codebook_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = write_items(tmp_path / "items.jsonl", range(40))
    for seed in (0, 1):
        fit(capsys, items, tmp_path / f"sid{seed}", f"seed={seed}")
    encode = ["sid", "encode", "--codebook", tmp_path / "sid0", "--items", items, "--text", "title"]
    assert main([*map(str, encode), "--previous", str(tmp_path / "sid1"), "--out", str(tmp_path / "x")]) == 2
    assert "is of the codebook" in capsys.readouterr().err


def test_a_damaged_codebook_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = write_items(tmp_path / "items.jsonl", range(40))
    fit(capsys, items, tmp_path / "sid")
    record = tmp_path / "sid" / "codebook.json"
    record.write_text(record.read_text().replace('"codes": 4', '"codes": 5'))
    encode = ["sid", "encode", "--codebook", tmp_path / "sid", "--items", items, "--text", "title"]
    assert main([*map(str, encode), "--out", str(tmp_path / "x")]) == 2
    assert "is damaged (its version is another)" in capsys.readouterr().err


def test_items_that_share_their_codes_are_told_apart_in_the_order_of_their_ids() -> None:
    ids, codes = ("b", "a", "c", "d"), [(1, 2), (1, 2), (0, 0), (1, 2)]
    given = disambiguated(ids, codes, most=3, levels=2)
    assert given == [(1, 2, 1), (1, 2), (0, 0), (1, 2, 2)]
    assert disambiguated(ids[::-1], codes[::-1], most=3, levels=2) == given[::-1]
    # "b" and "d" have theirs already, so "a" takes the next that is free.
    assert disambiguated(("a",), [(1, 2)], most=3, levels=2, known={"b": (1, 2), "d": (1, 2, 1)}) == [(1, 2, 2)]
    with pytest.raises(DataError, match="3 items share the codes of all 2 levels, and disambiguation_codes = 2"):
        disambiguated(ids, codes, most=2, levels=2)


def test_measures_of_a_small_table() -> None:
    codes = np.array([[0, 1], [0, 1], [1, 1], [1, 0]])
    found = measure(codes, [(0, 1), (0, 1, 1), (1, 1), (1, 0)], size=4, lost=0.5)
    assert (found["collision_rate"], found["largest_collision"], found["items_with_another_code"]) == (0.5, 2, 1)
    # Level 0: half and half, perplexity 2. Level 1: 3/4 and 1/4, exp(3/4 ln 4/3 + 1/4 ln 4) = 1.7548.
    assert [level["used"] for level in found["levels"]] == [2, 2]
    assert [level["perplexity"] for level in found["levels"]] == pytest.approx([2.0, 1.7548], abs=1e-4)


def test_text_and_tokens_of_an_id() -> None:
    assert text_of((3, 0, 12)) == "<sid_0_3><sid_1_0><sid_2_12>"
    assert not any(map(is_semantic_id, ("", "<sid_0_3> ", "<sid_0_3", "pen", "<sid_0_3><b_1>")))


@pytest.mark.parametrize("setting", ["codes=1", "levels=0", "commitment=-1", "hidden=[0]", "learning_rate=0"])
def test_impossible_settings_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"sid\.{setting.split('=')[0]} is "):
        load_semantic_ids([setting], "sid fit")
