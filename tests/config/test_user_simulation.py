"""Recipes of `users`: the shipped ones compose, a mistake is refused with the setting and what to do."""

from pathlib import Path

import pytest

from megatron_ads.config.recipes import shipped_recipes
from megatron_ads.config.user_simulation import (
    AgentsConfig,
    BrowseConfig,
    ConverseConfig,
    load_users_recipe,
    users_recipe_yaml,
)
from megatron_ads.errors import ConfigError
from tests.config.test_synthesis import commands_of

SCHEMAS = {"users/agents": AgentsConfig, "users/browse": BrowseConfig, "users/converse": ConverseConfig}


@pytest.mark.parametrize("name", shipped_recipes("users"))
def test_a_shipped_recipe_composes_and_so_do_its_commands(name: str, tmp_path: Path) -> None:
    config = load_users_recipe(SCHEMAS[name], name)
    assert config.model.model is None
    given = commands_of(name)
    assert len(given) == 2
    for command in given:
        assert command[:4] == ["users", name.split("/")[1], "--recipe", name]
        load_users_recipe(SCHEMAS[name], name, [word for word in command[6:] if "=" in word])
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [/base_users, _self_]\n" + users_recipe_yaml(config))
    assert load_users_recipe(SCHEMAS[name], str(own)) == config


def test_every_shipped_recipe_is_covered_here() -> None:
    assert set(shipped_recipes("users")) == set(SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "override", "message"),
    [
        (BrowseConfig, "pages=0", "browse.pages is 0; it must be at least 1"),
        (BrowseConfig, "pages=51", "browse.pages is 51; it must be from 1 to 50"),
        (BrowseConfig, "user.noise=1.5", "user.noise is 1.5"),
        (BrowseConfig, "user.patience=0", "user.patience is 0"),
        (BrowseConfig, "recommenders=[]", "recommenders is empty"),
        (BrowseConfig, "recommenders=[random,random]", "lists random more than once"),
        (BrowseConfig, "recommenders=[answers]", "answers.rows is None, and recommenders names answers. Name the file"),
        (BrowseConfig, "answers.file=x", "recommenders does not name answers"),
        (BrowseConfig, "model.model=x", "model.url is missing"),
        (BrowseConfig, "simulate=3", "did you mean simulated"),
        (AgentsConfig, "candidates=1", "agents.candidates is 1"),
        (ConverseConfig, "turns=21", "converse.turns is 21; it must be from 1 to 20"),
        (ConverseConfig, "calls=0", "converse.calls is 0"),
    ],
)
def test_a_mistake_is_refused(schema: type, override: str, message: str) -> None:
    name = next(name for name, each in SCHEMAS.items() if each is schema)
    with pytest.raises(ConfigError, match=message):
        load_users_recipe(schema, name, [override])


def test_a_setting_of_what_is_made_here_has_no_effect_on_what_is_given() -> None:
    with pytest.raises(ConfigError, match=r"world\.users is 9, which has no effect with world\.logs 'x'"):
        load_users_recipe(BrowseConfig, "users/browse", ["world.logs=x", "world.users=9"])
