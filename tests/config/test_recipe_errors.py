"""Old names of settings: refused with the new ones on a command line, understood in what an old run wrote down."""

import re

import pytest

from megatron_ads.config.recipe_errors import RENAMED, current_settings, field_type
from megatron_ads.config.run import SftConfig
from megatron_ads.errors import ConfigError
from tests.config.quickstart import quickstart

OVERRIDES = {
    "train.steps": "train.steps=3",
    "checkpoint.keep_last": "checkpoint.keep_last=3",
    "model.router_bias_update_rate": "model.router_bias_update_rate=0.001",
    "model.router_bias": "model.router_bias=update",
    "data.sources[].history.most_entries": "data.sources=[{kind: esci, history: {most_entries: 2}}]",
    "data.sources[].history.most_tokens": "data.sources=[{kind: esci, history: {most_tokens: 2}}]",
}


# A list is replaced as a whole: nothing can be added to one of its entries.
@pytest.mark.parametrize(
    ("plus", "old"), [*(("", old) for old in RENAMED), *(("+", old) for old in RENAMED if "[]" not in old)]
)
def test_an_old_name_is_refused_with_the_new_one(old: str, plus: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{old} is called {RENAMED[old]}.")):
        quickstart(plus + OVERRIDES[old])


@pytest.mark.parametrize("old", RENAMED)
def test_a_new_name_is_a_setting_and_the_old_one_is_not(old: str) -> None:
    assert field_type(SftConfig, RENAMED[old].partition(" ")[0]) is not None
    assert field_type(SftConfig, old) is None


def test_the_recipe_of_an_old_run_is_understood() -> None:
    old = {
        "train": {"steps": 20, "seed": 1},
        "checkpoint": {"keep_last": 3},
        "model": {"router_bias": "update", "router_bias_update_rate": 0.001},
        "data": {"sources": [{"kind": "esci", "history": {"most_entries": 2}}]},
    }
    new = {
        "train": {"max_steps": 20, "seed": 1},
        "checkpoint": {"save_total_limit": 3},
        "model": {"expert_bias_update_rate": 0.001},
        "data": {"sources": [{"kind": "esci", "history": {"max_entries": 2}}]},
    }
    assert current_settings(old) == new == current_settings(new)
