"""The benchmark of features: stages build on earlier ones, stand-ins say what they should, tables are whole."""

import json
from pathlib import Path
from typing import Any

from benchmarks.features_small import FeaturePath, parse
from benchmarks.features_small_answers import BEAMS, stand_in
from benchmarks.features_small_table import tables
from megatron_ads.config.data import AdsTask
from megatron_ads.data.simulator.folder import Scale, write_simulation
from megatron_ads.downstream.anchored_rows import question_rows
from megatron_ads.downstream.simulated_logs import read_logs
from megatron_ads.tasks.user_history import FULL_VIEW, Section, shown_history
from tests.downstream.logs import settings


def test_every_stage_builds_on_earlier_ones(tmp_path: Path) -> None:
    stages = list(FeaturePath(tmp_path, parse(["--out", str(tmp_path), "--seeds", "1"])).stages())
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) >= 18
    assert {"tuned", "answers-model", "scores-best", "scores-random"} < set(names)
    for number, stage in enumerate(stages):
        assert set(stage.after) <= set(names[:number]), stage.name


def test_the_best_stand_in_knows_who_is_bought_from_and_the_random_one_does_not(tmp_path: Path) -> None:
    simulated = tmp_path / "simulated"
    write_simulation(simulated, Scale(users=300, days=35))
    logs, config = read_logs(simulated), settings()
    asked = list(question_rows(logs, config, AdsTask.next_advertiser, lambda history: FULL_VIEW))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row.as_dict()) + "\n" for row in asked))
    found = {}
    for kind in ("best", "random"):
        stand_in(tmp_path / "rows.jsonl", tmp_path / kind, simulated, kind)
        said = [json.loads(line) for line in (tmp_path / kind).read_text().splitlines()]
        assert [one["id"] for one in said] == [row.id for row in asked]
        assert all(len(one["beams"]) <= BEAMS and one["beams"][0]["text"] == one["text"] for one in said)
        past = [shown_history(row).get(Section.past_advertisers, ()) for row in asked]
        repeated = [one["text"] in names for one, names in zip(said, past, strict=True) if names]
        found[kind] = sum(repeated) / len(repeated)
    assert found["best"] > 0.5 > 3 * found["random"]


def score(value: float) -> dict[str, Any]:
    return {"value": value, "relative": 0.0125, "relative_interval": [-0.005, 0.03]}


def test_tables_have_each_line_and_what_is_reachable() -> None:
    metrics = {name: score(0.25) for name in ("loss", "auc", "pr_auc")}
    line = dict.fromkeys(("click", "conversion", "ctcvr"), metrics)
    reachable = {target: {"loss": 0.1, "auc": 0.9, "pr_auc": 0.5} for target in line}
    lifted = {**line, "ctcvr": {**metrics, "pr_auc": {**score(0.25), "relative_interval": [0.01, 0.03]}}}
    lines = {"without features": line, "predicted": lifted, "predicted, of other users": line}
    part = {"lines": lines, "conversions": 7, "impressions": 90, "reachable": reachable}
    channel = {
        "recall": 0.5, "change": 0.25, "change_interval": [0.125, 0.375], "clicked": None, "survival": 0.5,
        "repeated_share": 0.5, "new_share": 0.75, "different_items": 12, "effective_items": 8.5,
    }  # fmt: skip
    ranking = {"all": part, "long_tail": part, "seeds": 2, "users": {"judged": 4}, "impressions": {"learned": 100}}
    retrieval = {"quotas": {"5": channel}, "objectives": {"clicks": channel}}
    recall = {"recall@1": 0.1, "recall@5": 0.2, "recall@20": 0.3}
    text = tables({"best": {"ranking": ranking, "retrieval": retrieval, "recall": recall, "minutes": 3.0}})
    assert "| best | predicted | +1.25% (-0.50 to +3.00) |" in text
    assert "answers of best: predicted: a lift; predicted, of other users: no lift." in text
    assert text.count("|  | best reachable | 0.5000 | 0.5000 | 0.5000 | 0.1000 | 0.9000 |") == 2
    assert "| best | 5 | 0.500 | +0.250 (0.125 to 0.375) | – | 0.500 | 0.500 | 0.750 | 12 | 8.5 |" in text
    assert "4 users held out with 90 impressions and 7 conversions; 2 rankers a line" in text
