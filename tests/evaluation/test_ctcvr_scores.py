"""CTCVR of the first item that an answer names, by a frozen ranker."""

import json
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.evaluation import judging
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.ctcvr_scores import ctcvr_scores
from megatron_ads.evaluation.held_out_rows import held_out
from megatron_ads.tasks import relevance
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label
from tests.evaluation.advertiser_rows import name_row
from tests.rewards.frozen import by_hand

PIPELINE = by_hand(Path())


def test_it_is_the_mean_chance_of_click_and_conversion_and_0_for_what_is_no_item() -> None:
    said = [("Acme", "Dune"), ("Blue", "blue"), ("Nobody", "Nobody"), ("Acme", "two\nlines")]
    answers = [Answer(name_row(str(number), label), text, True) for number, (label, text) in enumerate(said)]
    scores = ctcvr_scores(answers, PIPELINE)
    assert scores is not None
    # Dune 0.4 * 0.5, Blue 0.2 * 0.5, two that are none; true: Acme twice 0.1 * 0.5, Blue 0.1, one that is none.
    assert scores["model"] == pytest.approx((0.2 + 0.1) / 4)
    assert scores["truth"] == pytest.approx((0.05 + 0.1 + 0.05) / 4)
    assert (scores["named_share"], scores["truth_named_share"]) == (0.5, 0.75)


def test_a_task_that_names_no_items_has_none() -> None:
    row = relevance.chat_row("1", "q", Ad("a"), Label.good, "r")
    assert ctcvr_scores([Answer(row, row.target, True)], PIPELINE) is None


RECIPE = [
    "--recipe", "sft/quickstart", "data=simulator", "data.validation_rows=6",
    "data.sources=[{kind: simulator, task: next_advertiser, rows: 60}]",
]  # fmt: skip


def test_a_command_compares_two_models_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ads.config.recipes import load_job

    monkeypatch.setattr(judging, "load_pipeline", by_hand)
    rows = held_out(load_job(RECIPE[1], RECIPE[2:], sections=["data"]).data).tasks
    for name in ("Dune", "Acme"):
        lines = [json.dumps({"id": row.id, "text": name}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = ["--answers", str(tmp_path / "Dune.jsonl"), "--compare", str(tmp_path / "Acme.jsonl")]
    assert main(["evaluate", *files, "--pipeline", "here", *RECIPE]) == 0
    out = capsys.readouterr().out
    assert "Taiji, table 1: CTCVR by the frozen ranker" in out
    assert "+0.150000 (+0.150000 to +0.150000)" in out  # 0.4 * 0.5 - 0.1 * 0.5, of every row
    pairs = ["--recipe", "sft/quickstart", "data.sources=[{kind: builtin, rows: 60}]", "data.validation_rows=6"]
    assert main(["evaluate", *files[:2], "--pipeline", "here", *pairs]) == 2
    assert "--pipeline has no effect: no held-out row, of query_ad_relevance, is" in capsys.readouterr().err
