import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.run import SftConfig
from megatron_ads.quickstart.content import gather_facts, page, summary_lines, training_facts
from megatron_ads.quickstart.stages import Stage, StageRecord
from megatron_ads.quickstart.workflow import QuickstartFolder, QuickstartPlan

NAMES = ("demo-model", "evaluate-before", "train", "compare-logits", "evaluate-after", "verify-fp8", "evaluate-fp8",
         "evaluate-rl")  # fmt: skip


def _metrics(steps: int) -> list[dict[str, Any]]:
    """A plausible run: the loss decays, with a wobble; every 50 steps an evaluation."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append({
            "step": step,
            "loss": 0.4 + 5.0 * math.exp(-step / 30) + 0.1 * math.sin(step * 1.7),
            "grad_norm": 0.5 + 4 * math.exp(-step / 20) + 0.2 * math.sin(step),
            "learning_rate": 1e-3 * min(step / 10, 0.5 * (1 + math.cos(math.pi * step / steps))),
            "tokens_per_second": 2500.0 + step % 7,
            "tflops_per_gpu": 0.31,
            "step_seconds": 0.71,
            "expert_load_max_over_mean": 1.8 - 0.5 * step / steps,
            "max_memory_allocated": 9.0e8 + step,
        })  # fmt: skip
        if step % 50 == 0:
            rows.append({"step": step, "validation_loss": 0.45 + 5.0 * math.exp(-step / 30)})
    return rows


def _evaluation(balanced: float | None) -> dict[str, Any]:
    view = {
        "model": {"balanced_accuracy": balanced},
        "baseline": {"balanced_accuracy": 0.5},
        "balanced_accuracy_95": [0.71, 0.92],
    }
    scores = {
        "rows": 256, "queries": 50, "accuracy": 0.7, "baseline_accuracy": 0.41, "baseline_label": "Good",
        "readable_share": 0.98, "label_counts": {"Good": 100, "Bad": 156}, "views": {"bad": view, "fair": view},
    }  # fmt: skip
    return {"rows": 256, "seconds": 9.0, "tasks": {"query_ad_relevance": scores}}


def _facts(
    folder: Path, *, difference: float = 1.4e-6, after: float | None = 0.81, of_rl: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {
        "evaluate-before": _evaluation(0.0),
        "evaluate-after": _evaluation(after),
        "evaluate-fp8": _evaluation(after),
        "evaluate-rl": _evaluation(0.9),
        "verify-fp8": {"equal": True, "compared": 256},
        "compare-logits": {"max_abs_difference": difference, "tokens": 256, "passed": difference < 1e-5},
    }
    records = {name: StageRecord(fingerprint=name, seconds=12.5, result=results.get(name, {})) for name in NAMES}
    answers = [
        {"prompt": f"Is it {label}?", "expected": label, "text": f"<{label}>"} for label in ("Good", "Bad", "Good")
    ]
    QuickstartFolder(folder).answers("after").write_text("\n".join(map(json.dumps, answers)))
    stages = [Stage(name=name, title=name, settings={}, outputs=[], run=dict) for name in NAMES]
    provenance = {
        "host": {"cpu": "Some CPU <1>", "cores": 2, "memory_bytes": 24 * 2**30, "system": "Linux", "gpus": []},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformer-engine": None},
        "revision": "abc-dirty",
    }
    data = {"source": "simulated_pairs", "description": "query-ad pairs of a simulated ads business"}
    plan = QuickstartPlan(tuple(stages), {}, SftConfig(), "Qwen2")
    told = {"data": data, "provenance": provenance, "of_rl": of_rl}
    facts = gather_facts(QuickstartFolder(folder), plan, records, _metrics(200), **told)
    facts["layout"] |= {"pp": 2, "ep": 2}
    return facts


def test_losses_at_both_ends_are_means_of_ten_steps() -> None:
    rows = [{"step": step, "loss": float(step), "tokens_per_second": 1.0, "tflops_per_gpu": 1.0,
             "step_seconds": 1.0} for step in range(1, 31)]  # fmt: skip
    facts = training_facts(rows)
    assert facts["steps"] == 30
    assert facts["loss_first"] == 5.5  # mean of 1 .. 10
    assert facts["loss_last"] == 25.5  # mean of 21 .. 30


def test_a_short_run_averages_what_it_has() -> None:
    row = {"tokens_per_second": 1.0, "tflops_per_gpu": 1.0, "step_seconds": 1.0}
    facts = training_facts([{"step": 1, "loss": 3.0, **row}, {"step": 2, "loss": 1.0, **row}])
    assert (facts["loss_first"], facts["loss_last"], facts["loss_averaged_over_steps"]) == (2.0, 2.0, 2)


def test_reinforcement_learning_has_its_reward_curve_and_its_figure(tmp_path: Path) -> None:
    of_rl: list[dict[str, Any]] = [{"step": step, "critic/rewards/mean": step / 20} for step in range(1, 21)]
    of_rl.append({"step": 20, "validation/reward": 0.625})
    facts = _facts(tmp_path, of_rl=of_rl)
    # The means of 1..10 and of 11..20, each over 20.
    assert (facts["rl"]["reward_first"], facts["rl"]["reward_last"]) == pytest.approx((0.275, 0.775))
    text = page(facts, _metrics(200), of_rl)
    assert "<h2>Reinforcement learning</h2>" in text and "0.28 → 0.78" in text
    assert "balanced accuracy afterwards: 0.90" in text and "held-out prompts: 0.625 at 20" in text
    assert "Reinforcement learning" not in page(_facts(tmp_path), _metrics(200))


def test_the_facts_are_standard_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(_facts(tmp_path), allow_nan=False))["evaluation"]["after"]["rows"] == 256


def test_the_page_tells_data_machine_versions_and_revision(tmp_path: Path) -> None:
    text = page(_facts(tmp_path), _metrics(200))
    for part in (
        "A small random Qwen2 checkpoint",
        "simulated ads business",
        "Some CPU &lt;1&gt;, 2 cores, 24 GiB",
        "torch 2.13.0",
        "abc-dirty",
        "pp 2 x ep 2",
    ):
        assert part in text
    assert "transformer-engine" not in text  # not installed


def test_one_example_of_each_label_is_shown(tmp_path: Path) -> None:
    assert [example["expected"] for example in _facts(tmp_path)["examples"]] == ["Bad", "Good"]
    assert "&lt;Bad&gt;" in page(_facts(tmp_path), _metrics(20))


@pytest.mark.parametrize(("difference", "passed"), [(9.9e-6, True), (0.2, False)])
def test_logits_that_differ_are_marked(tmp_path: Path, difference: float, passed: bool) -> None:
    facts = _facts(tmp_path, difference=difference)
    assert ("NOT below the limit" in page(facts, _metrics(20))) is not passed


def test_the_terminal_shows_the_metric_next_to_its_baseline(tmp_path: Path) -> None:
    (line,) = [line for line in summary_lines(_facts(tmp_path)) if "balanced accuracy" in line]
    assert "0.00 → 0.81" in line
    assert line.endswith("always the commonest label: 0.50")


def test_numbers_on_the_terminal_can_be_copied(tmp_path: Path) -> None:
    assert any("1.4e-6" in line for line in summary_lines(_facts(tmp_path)))


def test_an_undefined_metric_is_a_dash(tmp_path: Path) -> None:
    assert any("0.00 → –" in line for line in summary_lines(_facts(tmp_path, after=None)))


def test_a_metric_below_its_baseline_is_not_marked_good(tmp_path: Path) -> None:
    good, poor = (page(_facts(tmp_path, after=value), _metrics(20)) for value in (0.81, 0.49))
    assert good.count('class="figure good"') == poor.count('class="figure good"') + 1


def test_answers_names_and_paths_cannot_become_markup(tmp_path: Path) -> None:
    script = "<script>x</script>"
    facts = json.loads(json.dumps(_facts(tmp_path)).replace("Good", script).replace("Some CPU <1>", script))
    facts["files"] = {f"/runs/{script}": "report"}
    facts["data"] |= {"path": f"/data/{script}"}
    facts["stages"] = [{"name": "a", "title": script, "seconds": 1.0}]
    text = page(facts, [{**row, script: 1.0} for row in _metrics(20)])
    assert "<script" not in text
    for shown in ("Is it ", "always ", "/runs/", "/data/", "<td>"):
        assert f"{shown}&lt;script&gt;" in text
