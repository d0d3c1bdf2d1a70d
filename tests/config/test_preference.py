"""Recipes of preference training: what composes, and what is refused."""

import pytest

from megatron_ads.config.preference import PreferenceConfig
from megatron_ads.config.recipes import load_job, load_recipe, recipe_kind, shipped_recipes, validate_job
from megatron_ads.errors import ConfigError
from megatron_ads.planning.job import load_job as planned_job

LOADED = ["model.load=x"]


def test_every_shipped_recipe_composes_and_is_possible() -> None:
    assert shipped_recipes("preference") == ("preference/sdpo",)
    for name in shipped_recipes("preference"):
        config = load_job(name, LOADED)
        assert isinstance(config, PreferenceConfig) and recipe_kind(name) == "preference"
        validate_job(config, config.layout.fewest_ranks())
        with pytest.raises(ConfigError, match="is a recipe of kind preference; one of kind sft is needed"):
            load_recipe(name, LOADED)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("preference.loss=dpo", "preference.negatives is 3, but preference.loss dpo has a single rejected answer"),
        ("preference.beta=0", "preference.beta is 0"),
        ("preference.negatives=0", "preference.negatives is 0"),
        ("preference.sft_weight=-1", "preference.sft_weight is -1"),
        ("preference.reference_steps=0", "preference.reference_steps is 0"),
        ("model.mtp_loss_weight=0.1", "the MTP layer would be trained on rejected answers"),
    ],
)
def test_impossible_settings_are_refused(setting: str, message: str) -> None:
    config = load_job("preference/sdpo", [*LOADED, setting])
    with pytest.raises(ConfigError, match=message):
        validate_job(config, 4)
    if setting == "preference.loss=dpo":
        validate_job(load_job("preference/sdpo", [*LOADED, setting, "preference.negatives=1"]), 4)


def test_a_plan_has_a_row_for_every_answer() -> None:
    given = ["layout=pp1_ep1", "train.global_batch_size=8"]
    job = planned_job("preference/sdpo", given, model="deepseek_v2_lite", ranks=2)
    assert job.microbatches == 8 // 2 * (1 + 3)  # two replicas share the prompts
