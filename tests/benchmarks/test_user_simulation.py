"""The benchmark of simulated users: stages build on earlier ones, rows say what users did, tables are whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.user_simulation import NOISES, UsersPath, parse, write_rows
from benchmarks.user_simulation_table import tables
from megatron_ads.inference.engine import Completion
from megatron_ads.user_simulation.browse_run import BEST
from megatron_ads.user_simulation.figures import FIGURES, TRUTHS
from megatron_ads.user_simulation.language_users import read_page_answer


@pytest.mark.parametrize("own", [True, False])
def test_every_stage_builds_on_earlier_ones(own: bool, tmp_path: Path) -> None:
    given = ["--model", str(tmp_path)] if own else []
    stages = list(UsersPath(tmp_path, parse(["--out", str(tmp_path), *given])).stages())
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) == (8 if own else 11) + len(NOISES)
    assert ("taught" in names) != own
    for number, stage in enumerate(stages):
        assert set(stage.after) <= set(names[:number]), stage.name


def test_rows_to_teach_are_what_users_did_in_the_form_that_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", tmp_path / "other", people=160, rows=60)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert 40 <= len(rows) <= 60 and len({row["id"] for row in rows}) == len(rows)
    answers = [read_page_answer(Completion(text=row["messages"][1]["content"]), 4) for row in rows]
    assert all(answer.unreadable is None for answer in answers)
    assert any(answer.leaves for answer in answers) and not all(answer.leaves for answer in answers)


def score(value: float | None) -> dict[str, Any]:
    return {"value": value, "interval": None if value is None else [value - 0.1, value + 0.1], "users": 9}


def test_tables_have_each_recommender_and_tau() -> None:
    taus = {figure: {"tau": 0.5, "interval": [0.25, 1.0], "p_value": None} for figure in FIGURES}
    browse = {
        "users": 9, "played_by": "scripted rules", "pages": 6, "page_size": 5, "unreadable": {"popular": {}, BEST: {}},
        "usage": None, "agreement": dict.fromkeys(TRUTHS, taus),
        "recommenders": {name: dict.fromkeys((*FIGURES, *TRUTHS), score(2.0)) for name in ("popular", BEST)},
    }  # fmt: skip
    line = {
        "success": [score(0.5), score(0.75)],
        "change": score(0.25),
        "searches": 1.5,
        "questions": None,
        "failures": {},
    }
    talk = {"users": 9, "turns": 2, "shown": 3, "history": True, "assistants": {"rules": line}}
    agents = {
        "users": 9, "candidates": 10, "played_by": "fixed rules", "change": score(0.25), "unreadable_reflections": 0,
        "lines": {"popular": {**{f"ndcg@{k}": score(0.5) for k in (1, 5, 10)}, "unreadable": 0}},
        "rounds": [{"right": score(0.5), "lessons": 9, "mistakes": 4, "unreadable": 0}],
    }  # fmt: skip
    text = tables(
        {"runs": {"browse": browse, "browse-noise-0.2": browse, "converse-history-true": talk, "agents": agents}}
    )
    assert "| browse-noise-0.2 | 0.50 [0.25, 1.00] |" in text
    assert text.count("| popular | 2.000 [1.900, 2.100] | 2.00 [1.90, 2.10] |") == 1
    assert "| rules | 0.500 [0.400, 0.600] | 0.750 [0.650, 0.850] | 0.250 [0.150, 0.350] | 1.5 | – |" in text
    assert "| 1 | 0.500 [0.400, 0.600] | 9 | 4 | 0 |" in text
