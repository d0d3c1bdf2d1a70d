"""The report of a run shows what the run wrote: its losses, and what each task weighs."""

import json
from pathlib import Path

import pytest

from megatron_ads.reporting.run_report import run_page, write_run_report

RUN = {"recipe": {"model": {"load": "runs/demo"}, "train": {"max_steps": 20}}, "ranks": 4, "revision": None}


def page_of(folder: Path, *metrics: dict[str, float]) -> str:
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return run_page(folder)


def test_the_page_tells_how_far_the_run_is_and_its_losses(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"step": 1, "loss": 3.0}, {"step": 7, "loss": 2.0}, {"step": 7, "validation_loss": 2.5})
    assert "runs/demo: 7 of 20 steps" in page
    assert "3.000 → 2.000" in page and "held-out rows: 2.5 at 7" in page
    assert "<td>recipe.train.max_steps</td><td>20</td>" in page
    assert "Tasks" not in page and "Instance weights" not in page


def test_shares_and_weights_of_every_task_are_curves(tmp_path: Path) -> None:
    weights = {"instance_weight_p10/a": 0.5, "instance_weight_p50/a": 0.75, "instance_weight_p90/a": 1.25}
    shares = [{"step": 4, "task_share/a": 0.25, "task_share/b <c>": 0.75}, {"step": 8, "task_share/a": 0.125}]
    page = page_of(tmp_path, {"step": 1, "loss": None}, {"step": 2, **weights}, *shares)
    for shown in ("a: 0.25 at 4", "a: 0.125 at 8", "b &lt;c&gt;: 0.75 at 4", "50 %: 0.75 at 2"):
        assert shown in page
    assert "<c>" not in page


def test_the_rewards_of_a_policy_are_curves_and_its_loss_may_be_negative(tmp_path: Path) -> None:
    rewards = {"critic/rewards/mean": 0.25, "critic/rewards/rank/mean": 0.5, "critic/rewards/fit/mean": 0.125}
    weights = {"reward_weight/rank": 0.75, "reward_weight/fit": 0.375}
    page = page_of(tmp_path, {"step": 1, "loss": -0.5, **rewards, **weights}, {"step": 1, "validation/reward": 0.625})
    for shown in ("0.250 → 0.250", "held-out prompts: 0.625 at 1", "rank: 0.5 at 1", "fit: 0.375 at 1"):
        assert shown in page
    assert "-0.500 → -0.500" in page and "Reinforcement learning" in page
    page = page_of(tmp_path, {"step": 1, "loss": -0.5, "teacher/reverse_kl": 0.75})
    assert "Reward" not in page and "smoothed: 0.75 at 1" in page and "Reinforcement learning" in page
    page = page_of(tmp_path, {"step": 1, "loss": 0.5})
    assert "Reward" not in page and "Teacher" not in page and "Fine-tuning" in page


def test_faults_and_lost_servers_are_counted(tmp_path: Path) -> None:
    raised, unanswered, lost = (
        "rollout/faults/brief/raised",
        "rollout/faults/teacher/unanswered",
        "rollout/server_losses",
    )
    page = page_of(
        tmp_path,
        {"step": 1, "loss": 0.5, raised: 2, lost: 0},
        {"step": 2, "loss": 0.5, raised: 1, unanswered: 4, lost: 2},
        {"step": 3, "loss": 0.5, lost: 2},
        {"step": 4, "loss": 0.5, lost: 1},  # of a job that continued: 1 more
    )
    assert "<h2>Faults</h2>" in page
    for fault, count, steps, last in (
        ("brief/raised", 3, 2, 2),
        ("teacher/unanswered", 4, 1, 2),
        ("inference server lost", 3, 2, 4),
    ):
        numbers = "".join(f'<td class="number">{number}</td>' for number in (count, steps, last))
        assert f"<tr><td>{fault}</td>{numbers}</tr>" in page


def test_a_run_without_faults_does_not_speak_of_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"step": 1, "loss": 0.5, "rollout/faults/brief/raised": 0, "rollout/server_losses": 0})
    assert "Faults" not in page and "server" not in page


def test_a_run_goes_on_where_its_report_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run_report(tmp_path)
    assert "report.html could not be written: " in caplog.text and "no run has written metrics there" in caplog.text
    page_of(tmp_path, {"step": 1, "loss": 3.0})
    write_run_report(tmp_path)
    assert "1 of 20 steps" in (tmp_path / "report.html").read_text()


def test_the_report_of_an_older_run_knows_its_steps_under_their_old_name(tmp_path: Path) -> None:
    page_of(tmp_path, {"step": 1, "loss": 3.0})
    old = RUN | {"recipe": {"model": {"load": "runs/demo"}, "train": {"steps": 30}}}
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert "1 of 30 steps" in run_page(tmp_path)


def test_names_and_paths_cannot_become_markup(tmp_path: Path) -> None:
    script = "<script>x</script>"
    weight = {"step": 1, f"instance_weight_p50/{script}": 0.5, f"task_share/{script}": 0.5, "loss": 1.0}
    page_of(tmp_path, weight, {"step": 1, f"validation_loss/{script}": 2.0})
    recipe = {"model": {"load": script}, "train": {"max_steps": 20}, "data": {script: script}}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "ranks": 4}))
    page = run_page(tmp_path)
    assert "<script" not in page
    for shown in ('class="lead">', "<td>", "<td>recipe.data.", "<figcaption>", "<title>"):
        assert f"{shown}&lt;script&gt;" in page
