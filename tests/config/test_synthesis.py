"""Cooking recipes: the shipped ones compose, a mistake is refused with the setting and what to do."""

import shlex
from pathlib import Path

import pytest

from megatron_ads.config.generation import ModelKind
from megatron_ads.config.recipes import load_recipe, recipes_folder, shipped_recipes
from megatron_ads.config.synthesis import Style, SynthesisConfig, load_synthesis_recipe, synthesis_recipe_yaml
from megatron_ads.errors import ConfigError

SHIPPED = shipped_recipes("cook")


def load(*overrides: str) -> SynthesisConfig:
    return load_synthesis_recipe("cook/simulated", ["teacher.model=m", *overrides])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_needs_a_teacher_and_nothing_else(name: str) -> None:
    assert load_synthesis_recipe(name, ["teacher.model=m"]).teacher.model == "m"
    with pytest.raises(ConfigError, match=r"teacher\.model is null"):
        load_synthesis_recipe(name)


def commands_of(recipe: str) -> list[list[str]]:
    """Return the words of each command that a recipe's head comment gives, behind ``megatron-ads``."""
    lines = (recipes_folder() / f"{recipe}.yaml").read_text().replace("\\\n#", "").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("#   megatron-ads ")]


def test_the_commands_that_recipes_give_compose() -> None:
    assert len(SHIPPED) == 2
    given = [command for name in SHIPPED for command in commands_of(name)]
    for command in given:
        if command[:3] == ["data", "cook", "--recipe"]:
            assert load_synthesis_recipe(command[3], command[4:]).teacher.model == "NAME"
    (train,) = (command for command in given if command[0] == "train")
    (source,) = load_recipe(train[2], train[3:]).data.sources
    assert source.path == f"{load_synthesis_recipe('cook/simulated', ['teacher.model=m']).out}/train.jsonl"


def test_a_checkpoint_takes_the_place_of_a_server_as_the_recipe_says() -> None:
    told = "teacher.kind=local teacher.url=null teacher.model=FOLDER"
    assert told in (recipes_folder() / "cook/simulated.yaml").read_text()
    assert load(*told.split()).teacher.kind is ModelKind.local


def test_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    config = load("style=reverse_engineered", "keep_per_row=2", "golden.path=g.jsonl", "verifier.url='http://h/v1'")
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [/base_cook, _self_]\n" + synthesis_recipe_yaml(config))
    assert load_synthesis_recipe(str(own)) == config
    assert config.style is Style.reverse_engineered
    assert load_synthesis_recipe(str(own), out="a=b, c").out == "a=b, c"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.modle=x", "teacher.modle is not a setting; did you mean teacher.model?"),
        ("teacher.most_cost=5", "teacher.most_cost is not a setting; did you mean teacher.max_cost?"),
        ("golden.pass_rat=1", "did you mean golden.pass_rate?"),
        ("style=backwards", "style must be one of auto, label_given, reverse_engineered"),
        ("candidates=0", "candidates is 0; it must be at least 1"),
        ("sources=[]", "sources is empty"),
        ("sources=[{kind: jsonl}]", "sources[0].path is missing"),
        ("teacher.url=null", "teacher.url is missing"),
        ("teacher.url=localhost", "teacher.url is 'localhost'; it must be like http"),
        ("teacher.url='http://localhost:80a/v1'", "it must be like http"),
        ("teacher.url='http://local host/v1'", "it must be like http"),
        ("teacher.url='http://me:secret@host/v1'", "holds a user name or password"),
        ("teacher.kind=local", "teacher.url is 'http://localhost:8000/v1', which has no effect"),
        ("teacher.max_cost=5", "teacher.max_cost is 5.0, which has no effect without"),
        ("teacher.input_price=5", "set both, or neither"),
        ("teacher.timeout_seconds=0", "teacher.timeout_seconds is 0.0; it must be above 0"),
        ("teacher.top_p=2", "teacher.top_p is 2.0; it must be above 0 and at most 1"),
        ("verifier.model=v", "verifier.url is missing"),
        ("reject.min_similarity=0.99", "reject.min_similarity = 0.99 must be below"),
        ("templates=[{name: a}]", "templates[0].wordings is []"),
        ("templates=[{wordings: [x]}]", "templates[0].name must be set"),
        ("templates=[{name: a, wordings: [x]}, {name: a, wordings: [y]}]", "templates lists a more than once"),
        ("perplexity.threshold=3", "has no effect without perplexity.model"),
        ("perplexity.quantile=1.5", "perplexity.quantile is 1.5; it must be from 0 to 1"),
        ("golden.rows=0; golden.path=x", "has no effect with golden.rows = 0"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(*override.split("; "))
    assert message in str(refused.value)


def test_the_nearest_recipe_is_offered() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean cook/simulated\?"):
        load_synthesis_recipe("cook/simulate")
