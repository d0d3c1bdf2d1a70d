"""Recipes of `users`: the shipped ones compose, a mistake is refused with the setting and what to do."""

from pathlib import Path

import pytest

from megatron_ads.config.recipes import shipped_recipes
from megatron_ads.config.user_simulation import (
    SIMULATIONS,
    AgentsConfig,
    BrowseConfig,
    ConverseConfig,
    load_users_recipe,
    users_recipe_yaml,
)
from megatron_ads.errors import ConfigError
from tests.config.test_synthesis import commands_of

SCHEMAS = {f"users/{name}": schema for name, schema in SIMULATIONS.items()}


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
    own.write_text(users_recipe_yaml(config))
    assert load_users_recipe(SCHEMAS[name], str(own)) == config


def test_every_shipped_recipe_is_covered_here() -> None:
    assert set(shipped_recipes("users")) == set(SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "override", "message"),
    [
        (BrowseConfig, "pages=0", "recipe.pages is 0; it must be from 1 to 50"),
        (BrowseConfig, "pages=51", "recipe.pages is 51; it must be from 1 to 50"),
        (BrowseConfig, "user.noise=1.5", "user.noise is 1.5"),
        (BrowseConfig, "user.patience=0", "user.patience is 0"),
        (BrowseConfig, "recommenders=[]", "recommenders is empty"),
        (BrowseConfig, "recommenders=[random,random]", "lists random more than once"),
        (BrowseConfig, "recommenders=[answers]", "answers.rows is None, and recommenders names answers. Name the file"),
        (BrowseConfig, "answers.file=x", "recommenders does not name answers"),
        (BrowseConfig, "model.model=x", "model.url is missing"),
        (BrowseConfig, "simulate=3", "did you mean simulated"),
        (AgentsConfig, "candidates=1", "recipe.candidates is 1"),
        (ConverseConfig, "turns=21", "recipe.turns is 21; it must be from 1 to 20"),
        (ConverseConfig, "calls=0", "recipe.calls is 0"),
    ],
)
def test_a_mistake_is_refused(schema: type, override: str, message: str) -> None:
    name = next(name for name, each in SCHEMAS.items() if each is schema)
    with pytest.raises(ConfigError, match=message):
        load_users_recipe(schema, name, [override])


def test_a_setting_of_what_is_made_here_has_no_effect_on_what_is_given() -> None:
    with pytest.raises(ConfigError, match=r"world\.users is 9, which has no effect with world\.logs 'x'"):
        load_users_recipe(BrowseConfig, "users/browse", ["world.logs=x", "world.users=9"])


def test_a_recipe_of_another_subcommand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^users/agents is a recipe of kind agents; one of kind browse, which begins"
    ):
        load_users_recipe(BrowseConfig, "users/agents")
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [users/browse, _self_]\nsimulated: 9\n")
    assert load_users_recipe(BrowseConfig, str(own)).simulated == 9
    with pytest.raises(ConfigError, match="is a recipe of kind browse; one of kind converse"):
        load_users_recipe(ConverseConfig, str(own))
    own.write_text(users_recipe_yaml(load_users_recipe(AgentsConfig, "users/agents")))  # as a run wrote it
    with pytest.raises(ConfigError, match="purchases is a setting of recipes of kind agents, and this is none"):
        load_users_recipe(BrowseConfig, str(own))
