"""Tables of pairs, recipes and answers that the tests of labelling share."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_ads.config.labelling import LabelConfig, load_label_recipe
from tests.inference.scripted_server import Reply

LABELS = ("Bad", "Fair", "Good")


def write_pairs(file: Path, count: int, *, first: int = 0) -> Path:
    """Write pairs without a label, one JSON object a line."""
    rows = (
        {"key": f"p{number}", "search": f"thing {number}", "ad": f"sturdy thing number{number}"}
        for number in range(first, first + count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(folder: Path, path: Path, *overrides: str, out: str = "out") -> LabelConfig:
    """Return a job over pairs, by a server that is given with ``model.url``."""
    own = folder / "own.yaml"
    own.write_text("defaults: [/base_label, _self_]\n")
    columns = "{id: key, query: search, title: ad}"
    given = [
        f"sources=[{{kind: table, path: '{path}', task: query_ad_relevance, columns: {columns}}}]",
        "model.model=scripted", "model.first_wait_seconds=0.01", "model.longest_wait_seconds=0.05",
    ]  # fmt: skip
    return load_label_recipe(str(own), [*given, *overrides], out=str(folder / out))


def number_in(text: str) -> int:
    """Return the number of the pair that a prompt is about."""
    found = re.search(r"number(\d+)", text)
    assert found is not None
    return int(found[1])


def good_answer(number: int) -> str:
    """Return a readable answer."""
    return f"<think>thing {number} is asked for and sold</think><Label>{LABELS[number % 3]}</Label>"


def answer(body: dict[str, Any], _: int) -> Reply:
    """Answer every request well."""
    return Reply(content=good_answer(number_in(body["messages"][0]["content"])))


def labels_in(out: Path) -> list[dict[str, Any]]:
    """Return all labels, in the order of the epochs."""
    files = sorted((out / "labels").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]
