"""What the README tells people to type is accepted, and what it names is there."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_ads.cli import build_parser
from megatron_ads.config.distillation import DistillConfig
from megatron_ads.config.labelling import LabelConfig
from megatron_ads.config.recipes import JOBS, load_job
from megatron_ads.config.user_simulation import AgentsConfig, BrowseConfig, ConverseConfig

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    """Every command line of ``megatron-ads`` in the code blocks, continued lines joined."""
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("megatron-ads ")]


def test_the_readme_holds_commands() -> None:
    assert len(_commands()) >= 12


@pytest.mark.parametrize("line", _commands())
def test_each_command_is_one_the_program_accepts(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    assert callable(build_parser(arguments[0]).parse_args(arguments).run)


@pytest.mark.parametrize("line", [line for line in _commands() if line.startswith("megatron-ads train ")])
def test_each_recipe_has_the_settings_that_it_is_given(line: str) -> None:
    args = build_parser("train").parse_args(shlex.split(line, comments=True)[1:])
    assert load_job(args.recipe, args.overrides).model.load in line


def test_every_path_it_names_exists() -> None:
    named = re.findall(r"`((?:megatron_ads|conversion|recipes|launch|benchmarks|parity_tests|tests)/[\w./*]*)`", README)
    assert len(named) >= 10
    assert [path for path in named if not list(PROJECT.glob(path.rstrip("/")))] == []


def test_every_recipe_it_names_exists() -> None:
    named = set(re.findall(r"(?:--recipe |`)((?:sft|preference|rl|cook|label|users|distill)/\w+)", README))
    assert {name.split("/")[0] for name in named} == {"sft", "preference", "rl", "cook", "label", "users", "distill"}
    assert [name for name in named if not (PROJECT / "recipes" / f"{name}.yaml").exists()] == []


def test_it_names_every_recipe_of_reinforcement_learning_and_preferences() -> None:
    table = README.split("| recipe | for |")[1].split("\n\n")[0]
    recipes = [
        f"{kind}/{file.stem}" for kind in ("rl", "preference") for file in (PROJECT / "recipes" / kind).glob("*.yaml")
    ]
    assert len(recipes) >= 10
    assert sorted(re.findall(r"`((?:rl|preference)/\w+)`", table)) == sorted(recipes)


def test_every_setting_it_names_exists() -> None:
    settings = {
        name
        for job in (*JOBS.values(), LabelConfig, DistillConfig, BrowseConfig, AgentsConfig, ConverseConfig)
        for name in _settings(job)
    }
    sections = "|".join(name for name in settings if "." not in name)
    named = set(re.findall(rf"`((?:{sections})\.\w+(?:\.\w+)?)[`=]", README))
    assert len(named) >= 40
    elsewhere = {"data.train_files", "data.train_batch_size", "data.max_response_length"}  # verl's
    elsewhere |= {"layout.py", "train.jsonl", "model.safetensors"}  # files
    assert named - settings - elsewhere == set()


def _settings(section: type) -> Iterator[str]:
    """Yield the dotted names of all settings and sections."""
    for name, kind in get_type_hints(section).items():
        yield name
        for part in (kind, *get_args(kind)):
            if is_dataclass(part):
                yield from (f"{name}.{below}" for below in _settings(part))


def test_every_metric_it_names_is_documented() -> None:
    from megatron_ads.observability.metrics import METRICS

    table = README.split("| metric | unit |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    assert len(named) >= 10
    assert set(named) <= METRICS.keys()
