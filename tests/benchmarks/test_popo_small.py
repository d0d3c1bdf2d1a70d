"""The benchmark of weighed rewards: its table, and settings that the recipe takes."""

from pathlib import Path

import pytest

from benchmarks.popo_small import COMBINED, RECIPE, _PopoPath, parse, table
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.quickstart.stages import Stage, StageRecord

ROWS = {"SFT": (0.25, 0.5), "fixed": (0.5, 0.5), "popo_light": (0.5, 0.25), "popo": (0.75, 1.0)}
"""The semantic reward and CTCVR of every row."""


def _path(out: Path) -> _PopoPath:
    return _PopoPath(out, parse(["--out", str(out), "--seeds", "2"]))


def test_each_way_is_trained_from_the_same_model_with_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[RlConfig] = []

    def stage(name: str, title: str, settings: list[str], *others: object, recipe: str, after: list[str]) -> Stage:
        job = load_job(recipe, settings)
        assert isinstance(job, RlConfig)
        loaded.append(job)
        return Stage(name=name, title=title, settings={}, outputs=[], run=dict, after=after)

    monkeypatch.setattr("benchmarks.popo_small.train_stage", stage)
    list(_path(tmp_path).stages())
    assert [job.rewards.combine for job in loaded] == [*COMBINED, *COMBINED]
    assert {job.model.load for job in loaded} == {str(tmp_path / "sft-none-0" / "export")}
    assert [job.train.seed for job in loaded] == [0, 0, 0, 1, 1, 1]
    assert RECIPE == "rl/taiji_popo"


def test_the_table_compares_row_by_row_with_fine_tuning_and_with_fixed_weights(tmp_path: Path) -> None:
    def record(way: str) -> StageRecord:
        semantic, ctcvr = ROWS[way]
        result = {"semantic": [semantic] * 8, "ctcvr": [ctcvr] * 8, "readable": 1.0}
        return StageRecord(fingerprint="", seconds=1.0, result=result)

    records = {"sft-none-0-scores": record("SFT")}
    for seed in range(2):
        for way in COMBINED:
            records[f"{way}-{seed}-scores"] = record(way)
            (tmp_path / f"{way}-{seed}").mkdir()
            line = '{"step": 1, "reward_weight/semantic": 0.25, "reward_weight/ctcvr": 0.75}\n'
            (tmp_path / f"{way}-{seed}" / "metrics.jsonl").write_text(line)
    results = _path(tmp_path).results(records)
    assert results["weights"]["popo"] == [{"semantic": 0.25, "ctcvr": 0.75}] * 2
    assert results["against"]["fixed"]["popo"]["semantic"]["value"] == pytest.approx(0.25)
    text = table(results)
    assert "| fixed | 0.500 (0.500, 0.500) | +0.2500 (+0.2500 to +0.2500) |" in text
    # 0.25 less than with fixed weights, in every row.
    assert "| popo_light against fixed |  | +0.0000 (+0.0000 to +0.0000) |  | -0.2500 (-0.2500 to -0.2500) |  |" in text
