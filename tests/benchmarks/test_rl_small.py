"""The benchmark of reinforcement learning: its tables, and one line where it is asked for what it does not have."""

import json
import shlex
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rl_small import RlPath, _parse, main
from benchmarks.rl_small_lists import recalls_by_length
from benchmarks.rl_small_pipeline import gain, reward_of
from benchmarks.rl_small_rows import write_rows_of_logs
from benchmarks.rl_small_table import tables
from benchmarks.rl_small_tracks import TRACKS
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.config.run import SftConfig
from megatron_ads.evaluation.held_out_rows import held_out as held_out_rows
from megatron_ads.quickstart.stages import StageRecord
from megatron_ads.tasks.next_advertiser import Ranking, parse_ranking, ranking_answer


def seed(value: float, *, cost: dict[str, float] | None = None) -> dict[str, Any]:
    def scored(gain: float) -> dict[str, Any]:
        beside = {"recall@1": gain, "names": 20 * gain}
        scores = {"name": "recall@20", "value": value + gain, "interval": [0.1, 0.9], "readable": 0.5, "beside": beside}
        return scores | {"lines": {}}

    scores = {"zero-shot": scored(0.0) | {"lines": {"popular": 0.452}}, "SFT": scored(0.25), "SFT + GRPO": scored(0.5)}
    return {"scores": scores, "phases": {"timing_s/rollout": [1.0, 2.0, 6.0]}, "cost": cost}


COST = {
    "answers": 4, "tokens_per_answer": 50, "rollout_seconds": 2.0, "generate_seconds": 5.0,
    "update_weights_seconds": 0.03, "copy_seconds": 0.01,
}  # fmt: skip


def test_the_table_has_the_mean_of_the_seeds_next_to_each_and_the_baselines() -> None:
    text = tables({"with": [seed(0.0, cost=COST), seed(0.125)]}, {"with": None})
    assert (
        "| SFT + GRPO | with | 0.562 | 0.500 (0.100 to 0.900), 0.625 (0.100 to 0.900) | 0.50 | recall@1 0.5, names 10 |"
        in text
    )
    assert "| popular |  | 0.452 |" in text
    assert "| timing_s/rollout, s | 2.00 (1.00 to 6.00) |" in text
    # 4 x 50 tokens in 2 s and in 5 s.
    assert "| rollouts, tokens/s | 100 |" in text and "| transformers.generate, tokens/s | 40 |" in text
    assert "| their ratio | 2.50 |" in text and "| their ratio | 3.00 |" in text


def test_what_is_gained_is_a_mean_of_differences_of_rows_with_their_interval() -> None:
    found = gain([0.0, 1.0] * 50, [1.0, 1.0] * 50)
    assert found is not None and found["value"] == 0.5 and found["interval"] == pytest.approx([0.4, 0.6], abs=0.02)
    shown = tables({"with": [seed(0.0, cost=COST) | {"gain": found}]}, {"with": found})
    assert "| what GRPO adds, row by row | with | +0.500 (0." in shown
    assert gain(None, None) is None


def test_results_have_the_gain_of_the_rows_and_not_the_rows(tmp_path: Path) -> None:
    (tmp_path / "grpo-none-0").mkdir()
    step = {"step": 1, "step_seconds": 3.0, "timing_s/rollout": 1.0, "critic/rewards/mean": 0.25}
    (tmp_path / "grpo-none-0" / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    found = {
        "zero-none-0": {"value": 0.0, "of_rows": [0.0, 0.0]},
        "sft-none-0-scores": {"value": 0.5, "of_rows": [1.0, 0.0]},
        "grpo-none-0-scores": {"value": 1.0, "of_rows": [1.0, 1.0]},
        "cost-none": {},
    }
    records = {name: StageRecord(fingerprint="", seconds=1.0, result=result) for name, result in found.items()}
    results = RlPath(tmp_path, TRACKS["downstream"], Namespace()).results(0, "none", records)
    assert results["scores"] == {"zero-shot": {"value": 0.0}, "SFT": {"value": 0.5}, "SFT + GRPO": {"value": 1.0}}
    whole = RlPath(tmp_path, TRACKS["downstream"], Namespace()).gain_of_seeds(1, "none", records)
    assert whole is not None and whole["value"] == 0.5
    assert results["gain"]["value"] == 0.5 and results["phases"] == {"timing_s/rollout": [1.0]}
    assert found["sft-none-0-scores"]["of_rows"] == [1.0, 0.0]  # of the stage's record, which is read again


@pytest.mark.parametrize("name", list(TRACKS))
def test_the_recipes_of_a_track_take_its_settings(name: str, tmp_path: Path) -> None:
    track = TRACKS[name]
    reward = [reward_of(tmp_path)] if track.pipeline else []
    own = ["model.load=x", "data.validation_rows=64", *track.data]
    fine_tuned = load_job(track.sft, [*own, *track.of_sft])
    reinforced = load_job(track.rl, [*own, *track.of_rl, *reward])
    assert isinstance(fine_tuned, SftConfig) and isinstance(reinforced, RlConfig)
    assert fine_tuned.data.sources == reinforced.data.sources
    assert fine_tuned.data.split_by == reinforced.data.split_by


def test_logs_tell_the_true_advertiser_of_users_that_are_not_held_out(tmp_path: Path) -> None:
    task = "data.sources=[{{kind: simulator, task: {}, rows: 300}}]".format
    ranking = ["data=simulator", task("next_advertiser_ranking"), "data.validation_rows=64"]
    write_rows_of_logs(tmp_path, ranking, ["data=simulator", task("next_advertiser")])
    forms, singles, lists = ([*map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())]
                             for name in ("forms", "singles", "lists"))  # fmt: skip
    held_out = {row.group for row in held_out_rows(load_job("sft/small", ranking, sections=["data"]).data).tasks}
    assert len(held_out) == 64 and not held_out & {row["group"] for row in (*forms, *singles, *lists)}
    true = {row["group"]: row["messages"][-1]["content"].removeprefix("<think></think>") for row in singles}
    named = {row["group"]: advertisers_in(row["messages"][-1]["content"]) for row in lists}
    assert named.keys() == true.keys() and all(names[0] == true[user] for user, names in named.items())
    assert all(len({*names}) == len(names) for names in named.values())
    assert {len(names) for names in named.values()} == {*range(1, 21)}
    evenly = [advertisers_in(row["messages"][-1]["content"]) for row in forms]
    # Of 120 names an even draw has each in one of six lists of 20; one that is popular is drawn more often.
    popular, _ = Counter(true.values()).most_common(1)[0]
    assert sum(popular in names[1:] for names in named.values()) > 1.5 * sum(popular in names[1:] for names in evenly)


def test_what_is_gained_by_longer_lists_is_told_apart(tmp_path: Path) -> None:
    def answers(name: str, lists: list[list[str]]) -> Path:
        texts = [f"<think></think>{ranking_answer(names, ['tea'])}" for names in lists]
        lines = [json.dumps({"expected": "true", "text": text}) + "\n" for text in (*texts, "nothing")]
        (tmp_path / name).write_text("".join(lines))
        return tmp_path / name

    popular = [json.dumps({"label": label}) + "\n" for label in ("true", "true", "other")]
    (tmp_path / "singles.jsonl").write_text("".join(popular))
    before = answers("before", [["a", "a"], ["true"], [f"n{number}" for number in range(20)]])
    after = answers("after", [["a", "true"], ["b", "true"], ["true"]])
    assert recalls_by_length(before, after, tmp_path / "singles.jsonl") == {
        # Of four rows: the third has the true name at the first place; two are cut in front of it.
        "SFT + GRPO, cut to the length of SFT's": 0.25,
        # The unreadable answer and the short list are filled up, the list of 20 has no room.
        "SFT, filled up with popular names": 0.75,
        "SFT + GRPO, filled up with popular names": 1.0,
    }


def advertisers_in(answer: str) -> list[str]:
    found = parse_ranking(answer, reasoning_required=False)
    assert isinstance(found, Ranking)
    return [*found.advertisers]


def test_reasoning_that_the_rows_do_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--reasoning", "with"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.rl_small: --reasoning is with, which --track advertiser does not have. Leave it out.\n"
    )


def test_the_commands_of_the_readme_are_those_of_the_kept_results() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    lines = (benchmarks / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[3:] for line in lines if line.startswith("python -m benchmarks.rl_small ")]
    kept = {
        track: json.loads((benchmarks / "results" / f"rl_small_{track}.json").read_text(encoding="utf-8"))
        for track in TRACKS
    }
    assert len(commands) == len(kept) == 4
    for command in commands:
        asked = {name: value for name, value in vars(_parse(command)).items() if name not in ("out", "reasoning")}
        if "--ranks" not in command:
            asked["ranks"] = 2  # of the machine of these results; the default is this machine's
        assert {name: kept[asked["track"]][name] for name in asked} == asked
