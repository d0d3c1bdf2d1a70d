"""Several samples of a row are one answer: what most of them say first."""

import json
import math
from pathlib import Path

import pytest

from megatron_ads.cli import main
from megatron_ads.demo_model import CONFIGS, Preset, write_demo_model
from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.page import judge
from megatron_ads.evaluation.ranking_scores import advertiser_rankings, ranking_scores
from megatron_ads.evaluation.sampled_answers import ranked_samples
from megatron_ads.inference.name_answers import AdvertiserNames
from tests.evaluation.advertiser_rows import name_row


def test_names_stand_by_how_many_say_them_then_by_their_mean_log_probability() -> None:
    row = name_row("1", "Acme")
    texts = ["Bolt", "<think>x</think>Acme", "acme", "two\nlines", "two\nlines", "two\nlines", "Cord", "Dyn", "Cord"]
    beams = ranked_samples(row, texts, [-1, -4, -2, -1, -1, -1, -3, -0.5, -2])
    # Acme and Cord twice: means of -3 and -2.5; Dyn before Bolt; what cannot be read is last, however frequent.
    assert [beam.text for beam in beams] == ["Cord", "<think>x</think>Acme", "Dyn", "Bolt", "two\nlines"]
    assert [beam.samples for beam in beams] == [2, 2, 1, 1, 3]
    assert [beam.log_probability for beam in beams] == [-2.5, -3, -0.5, -1, -1]
    assert sum(beam.score for beam in beams) == pytest.approx(1)


def test_samples_are_judged_as_a_ranking_beside_beams() -> None:
    names = AdvertiserNames(tuple(f"N{number}" for number in range(30)), "here")
    answers = []
    for number, label in enumerate(["N1", "N0", "N29"]):
        row = name_row(str(number), label)
        beams = ranked_samples(row, ["N0"] * 12 + ["N1"] * 8, [-1.0] * 20)
        answers.append(Answer(row, beams[0].text, True, beams))
    assert advertiser_rankings(answers) == [["N0", "N1"]] * 3
    model = ranking_scores(answers, [name_row("t", "N0")], names)["methods"]["model"]
    # Twenty were asked for, although only two names came: second, first, not there.
    assert [model[f"recall@{k}"] for k in (1, 5, 20)] == [1 / 3, 2 / 3, 2 / 3]
    assert model["ndcg@20"] == pytest.approx((1 / math.log2(3) + 1) / 3)
    assert judge(answers)[0].probability == pytest.approx(0.6)


RECIPE = [
    "--recipe", "sft/quickstart", "data=simulator", "data.validation_rows=4",
    "data.sources=[{kind: simulator, task: next_advertiser, rows: 40}]",
]  # fmt: skip


def test_a_model_is_sampled_from_and_its_answers_can_be_scored_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = tmp_path / "model", tmp_path / "answers.jsonl"
    write_demo_model(model, CONFIGS[Preset.tiny] | {"torch_dtype": "float32"})
    options = ["--decode", "sampled", "--samples", "20", "--temperature", "0.3", "--max-new-tokens", "3", "--json"]
    assert main(["evaluate", "--model", str(model), "--answers", str(file), *options, *RECIPE]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"]
    assert {"recall@1", "recall@5", "recall@20"} <= set(scores["next_advertiser"]["ranking"]["methods"]["model"])
    for line in map(json.loads, file.read_text().splitlines()):
        assert sum(beam["samples"] for beam in line["beams"]) == 20
        assert line["text"] == line["beams"][0]["text"]
        assert all(beam["log_probability"] < 0 for beam in line["beams"])
    assert main(["evaluate", "--answers", str(file), "--json", *RECIPE]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == scores
    assert main(["evaluate", "--model", str(model), "--samples", "2", *RECIPE]) == 2
    assert "--samples has no effect with --decode greedy" in capsys.readouterr().err
