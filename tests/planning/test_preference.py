"""Plans of preference training: numbers worked out by hand for a small model, and the shipped recipe."""

import json
from dataclasses import replace

import pytest

from megatron_ads.cli import main
from megatron_ads.config.model import LoraConfig
from megatron_ads.planning.hardware import CARDS
from megatron_ads.planning.job import PlannedJob
from megatron_ads.planning.plan import make_plan
from megatron_ads.planning.preference import PreferenceCosts, preference_costs
from tests.planning.jobs import small_job

# Of the small model: attention and norms 128,112 a layer, dense feed-forward 294,912, an expert 73,728, a router 2,048.
OUTSIDE = 2 * 1000 * 256 + 256  # embedding, output layer, final norm
DENSE = OUTSIDE + 4 * 128_112 + 2 * 294_912 + 2 * (2_048 + 73_728)  # shared experts
EXPERTS = 2 * 8 * 73_728
PLAN = ["plan", "--recipe", "preference/sdpo", "--model", "deepseek_v2_lite"]


def job_with(lora: LoraConfig | None = None) -> PlannedJob:
    """Return a job on 4 ranks: dp 4, and half of the experts on each."""
    return replace(small_job(world=4, ep=2, mtp_loss_weight=0, lora=lora), has_preferences=True)


def costs_of(job: PlannedJob) -> PreferenceCosts:
    found = preference_costs(job, pipeline_seconds=30.0, update_seconds=1.0)
    assert found is not None
    return found


def test_a_step_has_passes_of_policy_and_reference_before_its_update() -> None:
    costs = costs_of(job_with())
    # A forward pass is a third of 30 s.
    assert costs.parts == {"passes": pytest.approx(2 * 10), "updates": 31.0}
    assert costs.bound_by == "updates" and costs.step_seconds == pytest.approx(51)


def test_a_reference_is_what_a_rank_trains_and_adapters_need_none() -> None:
    assert costs_of(job_with()).reference_host_bytes == 4 * (DENSE + EXPERTS // 2), "the MTP layer is not trained"
    assert costs_of(job_with(LoraConfig(rank=4, alpha=8))).reference_host_bytes == 0


def test_only_a_job_with_preferences_has_them_planned() -> None:
    plan = make_plan(job_with(), CARDS["cpu"])
    assert plan.preference is not None and plan.rollouts is None
    assert plan.preference.update_seconds == pytest.approx(plan.step_seconds)
    assert make_plan(replace(plan.job, has_preferences=False), plan.card).preference is None


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ([], r"GB a rank in its host's memory, on the card only while it takes the place of the weights"),
        (["model.lora.rank=4", "model.lora.alpha=8"], "reference: no copy, the adapters are switched off"),
    ],
    ids=["weights", "adapters"],
)
def test_the_command_says_what_the_reference_and_a_whole_step_take(
    settings: list[str], reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*PLAN, *settings])
    lines = capsys.readouterr().out.splitlines()
    printed = " ".join(" ".join(lines).split())
    assert reference in printed and "whole step: an estimated" in printed and "s, bound by updates (passes" in printed
    assert max(map(len, lines)) <= 120
    main([*PLAN, *settings, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["preference"]["bound_by"] == "updates" and values["rollouts"] is None
