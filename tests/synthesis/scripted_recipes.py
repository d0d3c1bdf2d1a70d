"""Rows, recipes and good answers that the tests of synthesis share."""

import json
import re
from pathlib import Path
from typing import Any

from megatron_ads.config.synthesis import SynthesisConfig, load_synthesis_recipe

THINGS = ("kettle", "lantern", "saddle", "teapot", "hammock", "telescope", "violin", "toboggan", "anvil", "compass")


def write_rows(file: Path, count: int, *, prefix: str = "r") -> Path:
    """Write labelled rows of query-ad relevance; each has a thing, a colour of its own and a seller of its own."""
    rows = []
    for number in range(count):
        thing = THINGS[number % len(THINGS)]
        prompt = (
            f"Is the ad relevant to the query?\nQuery: crimson{number} {thing}\nAd: sturdy {thing} number{number}\n"
            f"Seller: shop{number}"
        )
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": f"<think></think><Label>{('Bad', 'Fair', 'Good')[number % 3]}</Label>"},
        ]
        row = {"id": f"{prefix}{number}", "task": "query_ad_relevance", "messages": messages, "group": f"q{number}"}
        rows.append(row | {"label": ("Bad", "Fair", "Good")[number % 3]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(tmp_path: Path, url: str, *overrides: str, rows: int = 4) -> SynthesisConfig:
    """Return a recipe for a scripted server, without golden check, at one candidate a row unless told otherwise."""
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [/base_cook, _self_]\n")
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return load_synthesis_recipe(
        str(own),
        [
            f"sources=[{{kind: jsonl, path: '{source}'}}]",
            f"teacher.url='{url}'",
            "teacher.model=scripted",
            "teacher.first_wait_seconds=0.01",
            "teacher.longest_wait_seconds=0.05",
            "candidates=1",
            "golden.rows=0",
            *overrides,
        ],
        out=str(tmp_path / "out"),
    )


def number_of(body: dict[str, Any]) -> int:
    """Return the number of the row that a request is about."""
    found = re.search(r"number(\d+)", body["messages"][0]["content"])
    assert found is not None
    return int(found[1])


def label_in(body: dict[str, Any]) -> str:
    """Return the answer that a request gives."""
    found = re.search(r"<Label>\w+</Label>", body["messages"][0]["content"])
    assert found is not None
    return found[0]


def good_reasoning(number: int) -> str:
    """Return reasoning that every filter lets pass: long enough, with three details of its row."""
    thing = THINGS[number % len(THINGS)]
    return f"The person wants a crimson{number} {thing}, and shop{number} sells exactly such sturdy things to people."


def good_answer(body: dict[str, Any]) -> str:
    """Return what a perfect teacher says."""
    return f"<Reasoning>{good_reasoning(number_of(body))}</Reasoning>{label_in(body)}"
