"""The benchmark of semantic IDs: stages build on earlier ones, arms are paired and fair, tables are whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sid_small import SidPath, main, parse
from benchmarks.sid_small_rows import IDS, ITEM, TEXT, write_training_rows
from benchmarks.sid_small_table import tables
from megatron_ads.config.recipes import load_job
from megatron_ads.data.corpus import read_corpus
from megatron_ads.quickstart.stages import Stage, StageRecord
from tests.semantic_ids.tables import simulated_ids


@pytest.fixture(autouse=True)
def public_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_ADS_DATA", str(tmp_path / "data"))


def stages(out: Path, *options: str) -> dict[str, Stage]:
    found = list(SidPath(out, parse(["--out", str(out), *options])).stages())
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(found):
        assert set(stage.after) <= set(names[:number]), stage.name
    return {stage.name: stage for stage in found}


@pytest.mark.parametrize("data", ["simulator", "real"])
def test_every_stage_builds_on_earlier_ones(tmp_path: Path, data: str) -> None:
    names = stages(tmp_path, "--data", data)
    assert {"sid", "grown", "phase1", "phase2", "tuned-text", "scores-sid", "scores-item", "general-phase1"} < set(
        names
    )
    assert ("simulated" in names) == (data == "simulator")


def test_one_arm_needs_the_stages_of_no_other(tmp_path: Path) -> None:
    names = stages(tmp_path, "--arms", "text")
    assert "scores-text" in names
    assert not [name for name in names if name.startswith(("phase", "grown", "sid"))]


def test_text_and_ids_take_the_same_number_of_steps(tmp_path: Path) -> None:
    options = ("--phase1-steps", "20", "--phase2-steps", "50", "--task-steps", "70")
    found = stages(tmp_path, *options)

    def steps(name: str) -> int:
        settings: dict[str, Any] = dict(found[name].settings)
        return int(load_job(settings["recipe"], settings["settings"]).train.max_steps)

    assert steps("text-mixed") == steps("phase1") + steps("phase2") == 70
    assert steps("tuned-text") == steps("tuned-sid") == 70


def test_no_form_of_a_row_that_is_answered_is_trained_on(tmp_path: Path) -> None:
    known = simulated_ids(tmp_path / "sid")
    source = "kind: simulator, task: next_advertiser, rows: 200"
    history = f", history: {{semantic_ids: {known}}}"
    forms = {TEXT: source, IDS: f"{source}{history}", ITEM: f"{source}, variant: next_item{history}"}
    sections = {
        view: ["data=jsonl", f"data.sources=[{{{form}}}]", "data.validation_rows=40"] for view, form in forms.items()
    }
    counted = write_training_rows(tmp_path, sections)
    corpora = {
        view: read_corpus(load_job("sft/small", section, sections=["data"]).data) for view, section in sections.items()
    }
    answered = {row.group for corpus in corpora.values() for row in corpus.validation}
    assert [row.id for row in corpora[TEXT].validation] == [row.id for row in corpora[IDS].validation]
    for view in forms:
        rows = [json.loads(line) for line in (tmp_path / f"train-{view}.jsonl").read_text().splitlines()]
        assert len(rows) == counted["rows"][view] > 100
        assert not {row["group"] for row in rows} & answered
    text, ids = (corpora[view].validation[0].prompt[0].content for view in (TEXT, IDS))
    assert ids.startswith(f"{text}\nRecent items: <sid_0_")


def test_the_arm_of_items_needs_that_of_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--arms", "item"]) == 2
    assert "The arm item continues from phase 2 of sid" in capsys.readouterr().err


def test_tables_have_each_arm_its_difference_and_each_phase() -> None:
    cuts = ("recall@1", "recall@5", "recall@20")
    scores = dict.fromkeys(cuts, 0.25) | {f"{cut}_95": [0.2, 0.3] for cut in cuts}
    popular = dict.fromkeys(cuts, 0.1)
    plain = {"rows": 40, "ranking": {"methods": {"model": scores, "popular": popular}}}
    deltas = {cut: {"delta": 0.05, "relative": 0.25, "delta_95": [0.01, 0.09]} for cut in cuts}
    arms = {
        "text": {"tasks": {"next_advertiser": plain}},
        "sid": {"tasks": {"next_advertiser": plain | {"comparison": {"metrics": deltas}}}},
    }
    level = {"codes": 4, "used": 3, "use": 0.75, "perplexity": 2.5}
    codebook = {"items": 9, "collision_rate": 0.5, "reconstruction_error": 0.125, "levels": [level]}
    general = {"language": {"math": {"perplexity": 3.5}}, "phase1": {"math": {"perplexity": 3.75}}}
    text = tables({"codebook": codebook, "arms": arms, "general": general})
    assert "9 items, of which 50.0% share the codes" in text
    assert "| text alone | 0.250 (0.200 to 0.300) | 0.250 (0.200 to 0.300) | 0.250 (0.200 to 0.300) | 40 |" in text
    assert "minus text alone | +0.050 (+0.010 to +0.090, +25.0%)" in text
    assert "| phase1 | 3.75 |" in text


def test_results_tell_general_ability_from_the_scores_of_arms(tmp_path: Path) -> None:
    general = {"gsm8k": {"rows": 4, "perplexity": 3.5}}
    scores = {"tasks": {}, "general": {}}
    results = {"rows": {"rows": {}}, "general-language": {"general": general}, "scores-text": scores}
    records = {name: StageRecord(fingerprint="", seconds=60.0, result=result) for name, result in results.items()}
    found = SidPath(tmp_path, parse(["--out", str(tmp_path), "--arms", "text"])).results(records)
    assert found["general"] == {"language": general}
    assert found["arms"] == {"text": scores}
    assert found["minutes"]["rows"] == 1.0
