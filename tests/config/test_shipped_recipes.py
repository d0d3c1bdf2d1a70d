"""Every shipped recipe composes, and runs on the ranks that its head comment names."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ads import demo_model
from megatron_ads.architecture import shape_from_config
from megatron_ads.cli import build_parser
from megatron_ads.config.labelling import load_label_recipe
from megatron_ads.config.recipes import (
    JOBS,
    load_job,
    load_recipe,
    recipe_yaml,
    recipes_folder,
    shipped_recipes,
    validate_job,
)
from megatron_ads.config.run import SftConfig, validate
from megatron_ads.errors import ConfigError
from tests.config.quickstart import published, quickstart

OPEN = {
    # What a shipped recipe leaves to the user.
    "sft/quickstart": ["model.load=runs/demo"],
    "sft/small": ["model.load=runs/shallow"],
    "sft/sid_new_tokens": ["model.load=runs/grown"],
    "sft/sid_mixed": ["model.load=runs/sid_new_tokens/export"],
    "sft/sid_next_advertiser": ["model.load=runs/sid_mixed/export"],
    "sft/deepseek_r1_671b_248gpu": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_lora": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_248gpu_mtp": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_248gpu_mtp_only": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_248gpu_vpp2": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_256h100": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_32xh20": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_v2_lite_8gpu": ["model.load=V2", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_distill_qwen_7b_8gpu": ["model.load=Q", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/moonlight_16b_8gpu": ["model.load=M", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "rl/quickstart": ["model.load=runs/sft-quickstart/export"],
    "rl/relevance_grpo": ["model.load=runs/sft/export"],
    "rl/advertiser_grpo": ["model.load=runs/sft/export"],
    "rl/deepseek_v2_lite_8gpu": ["model.load=V2", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "rl/deepseek_r1_671b": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "preference/sdpo": ["model.load=runs/sft/export"],
    "rl/downstream_reward": ["model.load=runs/sft/export"],
    "rl/taiji_popo": ["model.load=runs/sft/export"],
    "rl/recr1_query": ["model.load=runs/sft/export"],
    "rl/on_policy_distillation": ["model.load=runs/small/export", "teacher.model=runs/sft-quickstart/export"],
}


def test_every_shipped_recipe_is_covered_here() -> None:
    assert {name for kind in JOBS for name in shipped_recipes(kind)} == set(OPEN)


@pytest.mark.parametrize("name", sorted(OPEN))
def test_a_shipped_recipe_validates_on_the_ranks_its_head_comment_names_and_not_on_one_less(name: str) -> None:
    config = load_job(name, OPEN[name])
    head = (recipes_folder() / f"{name}.yaml").read_text()
    ranks = int(re.search(r"^# Ranks: (\d+)", head, re.MULTILINE)[1])  # type: ignore[index]
    validate_job(config, ranks)
    if ranks > 1:
        with pytest.raises(ConfigError, match=f"does not divide the {ranks - 1} ranks"):
            validate_job(config, ranks - 1)


@pytest.mark.parametrize("name", [name for name in sorted(OPEN) if "248gpu" in name])
def test_the_r1_recipes_fit_r1(name: str) -> None:
    config = load_recipe(name, OPEN[name])
    validate(config, 248, published("deepseek_r1"))
    layout = config.layout.runtime(248)
    assert (layout.dp, config.train.microbatches(layout)) == (4, 124)  # 496 rows / (1 row * 4 replicas)


@pytest.mark.parametrize("preset", [demo_model.Preset.tiny, demo_model.Preset.small])
def test_the_quickstart_fits_the_demo_models_and_leaves_stage_0_without_experts(preset: demo_model.Preset) -> None:
    shape = shape_from_config(demo_model.CONFIGS[preset])
    config = quickstart()
    validate(config, 4, shape)
    placement = config.layout.placement(shape, config.layout.runtime(4))
    assert placement.string.startswith("Ett|tttt")
    assert placement.expert_less_stages(shape) == (0,)


@pytest.mark.parametrize(
    ("twin", "others"),
    [("_vpp2", ["model", "layout"]), ("_mtp", ["model", "layout"]), ("_mtp_only", ["model"])],
)
def test_r1_recipes_differ_in_the_layout_what_is_trained_and_the_folders_only(twin: str, others: list[str]) -> None:
    name = "sft/deepseek_r1_671b_248gpu"
    plain, other = (load_recipe(each, OPEN[each]) for each in (name, name + twin))
    different = [field.name for field in fields(SftConfig) if getattr(plain, field.name) != getattr(other, field.name)]
    assert different == [*others, "checkpoint", "log"]


def test_every_job_has_a_folder_of_its_own_and_none_that_of_the_quickstart() -> None:
    folders = [load_job(name, OPEN[name]).log.dir for name in OPEN]
    folders.append(str(build_parser("quickstart").parse_args(["quickstart"]).out))  # each has its report.html
    assert [folder for folder in folders if folders.count(folder) > 1] == []


def test_the_general_mix_is_the_simulator_and_one_source_more() -> None:
    # Hydra replaces lists and does not lengthen them, so one file repeats the other.
    plain, general = (quickstart(f"data={name}").data for name in ("simulator", "simulator_general"))
    (added,) = general.sources[len(plain.sources) :]
    assert added.keep_share
    assert replace(general, sources=general.sources[:-1]) == plain


def _mentioned(composed: dict[str, Any], declared: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that ``declared`` mentions, inside sections too."""
    return {
        key: _mentioned(composed[key], value) if isinstance(value, dict) else composed[key]
        for key, value in declared.items()
    }


OTHER_COMMANDS = ("cook", "distill", "label", "users")
PARTS = sorted(file for file in recipes_folder().glob("*/*.yaml") if file.parent.name not in (*JOBS, *OTHER_COMMANDS))


def test_every_file_of_the_recipes_starts_with_its_instructions() -> None:
    files = sorted(recipes_folder().rglob("*.yaml"))
    of_others = sum(len(shipped_recipes(command)) for command in OTHER_COMMANDS)
    assert len(files) == len(PARTS) + len(OPEN) + of_others == 65
    assert [file for file in files if not file.read_text().startswith("# ")] == []


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.parent.name}/{part.stem}")
def test_every_setting_of_a_recipe_part_arrives(tmp_path: Path, part: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"defaults: [/base_sft, /{part.parent.name}: {part.stem}, _self_]\n")
    required = {
        "train.max_steps": 1,
        "log.dir": "l",
        "checkpoint.dir": "c",
        "model.load": "m",
        "optim.learning_rate": 0.5,
    }
    values = {key: value for key, value in yaml.safe_load(part.read_text()).items() if value != "???"}
    given = [f"{path}={value}" for path, value in required.items() if path.rpartition(".")[2] not in values]
    composed = yaml.safe_load(recipe_yaml(load_recipe(str(own), given)))[part.parent.name]
    if "sources" in values:  # without the defaults that the part does not mention
        pairs = zip(composed["sources"], values["sources"], strict=True)
        composed["sources"] = [_mentioned(source, declared) for source, declared in pairs]
    assert {key: composed[key] for key in values} == values


@pytest.mark.parametrize("recipe", shipped_recipes("label"))
def test_every_recipe_of_labels_composes_and_says_which_model_is_needed(recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.model is null"):
        load_label_recipe(recipe)
    config = load_label_recipe(recipe, ["model.model=m", "priorities={chat: 1}"])
    assert config.sources and config.priorities == {"chat": 1}
