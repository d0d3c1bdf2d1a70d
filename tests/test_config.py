"""Recipes compose onto the schema; what is misspelt, mistyped or impossible is refused with the remedy."""

import ast
import re
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from conversion.layer_specs import LayerSpec
from megatron_ads import demo_model
from megatron_ads.architecture import ModelShape, read_model_shape, shape_from_config
from megatron_ads.config.data import SourceKind
from megatron_ads.config.model import FrozenPart, LayerSpecChoice, RouterBias
from megatron_ads.config.optim import Schedule
from megatron_ads.config.recipe_files import recipes_folder, shipped_recipes
from megatron_ads.config.recipes import load_layout, load_recipe, recipe_yaml
from megatron_ads.config.sft import SftConfig, validate
from megatron_ads.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = Path(__file__).parent / "fixtures" / "configs"
OPEN = {
    # What a shipped recipe leaves to the user.
    "sft/quickstart": ["model.load=runs/demo"],
    "sft/deepseek_r1_671b_248gpu": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_lora": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_248gpu_vpp2": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_256h100": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_r1_671b_32xh20": ["model.load=R1", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/deepseek_v2_lite_8gpu": ["model.load=V2", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
    "sft/moonlight_16b_8gpu": ["model.load=M", "data.sources=[{kind: jsonl, path: rows.jsonl}]"],
}


def quickstart(*overrides: str) -> SftConfig:
    return load_recipe("sft/quickstart", ["model.load=runs/demo", *overrides])


def published(name: str) -> ModelShape:
    return read_model_shape(CONFIGS / f"{name}.json")


# ---- the shipped recipes ----


def test_every_shipped_recipe_is_covered_here() -> None:
    assert set(shipped_recipes()) == set(OPEN)


@pytest.mark.parametrize("name", sorted(OPEN))
def test_a_shipped_recipe_validates_on_the_ranks_its_head_comment_names_and_not_on_one_less(name: str) -> None:
    config = load_recipe(name, OPEN[name])
    head = (recipes_folder() / f"{name}.yaml").read_text()
    ranks = int(re.search(r"^# Ranks: (\d+)", head, re.MULTILINE)[1])  # type: ignore[index]
    validate(config, ranks)
    with pytest.raises(ConfigError, match=f"does not divide the {ranks - 1} ranks"):
        validate(config, ranks - 1)


@pytest.mark.parametrize("name", [name for name in sorted(OPEN) if "248gpu" in name])
def test_the_r1_recipes_fit_r1(name: str) -> None:
    config = load_recipe(name, OPEN[name])
    validate(config, 248, published("deepseek_r1"))
    layout = config.layout.runtime(248)
    assert (layout.dp, config.train.microbatches(layout)) == (8, 62)  # 496 rows / (1 row * 8 replicas)


@pytest.mark.parametrize("preset", sorted(demo_model.CONFIGS))
def test_the_quickstart_fits_the_demo_models_and_leaves_stage_0_without_experts(preset: demo_model.Preset) -> None:
    shape = shape_from_config(demo_model.CONFIGS[preset])
    config = quickstart()
    validate(config, 4, shape)
    placement = config.layout.placement(shape, config.layout.runtime(4))
    assert placement.string.startswith("Ett|tttt")
    assert placement.expert_less_stages(shape) == (0,)


def test_the_two_r1_recipes_differ_in_the_layout_and_the_folders_only() -> None:
    plain, twin = (load_recipe(name, OPEN[name]) for name in sorted(OPEN) if "248gpu" in name)
    different = [field.name for field in fields(SftConfig) if getattr(plain, field.name) != getattr(twin, field.name)]
    assert different == ["layout", "checkpoint", "log"]


PARTS = sorted(file for file in recipes_folder().glob("*/*.yaml") if file.parent.name not in ("sft", "cook"))


def test_every_file_of_the_recipes_starts_with_its_instructions() -> None:
    files = sorted(recipes_folder().rglob("*.yaml"))
    assert len(files) == len(PARTS) + len(OPEN) + len(shipped_recipes("cook")) == 33
    assert [file for file in files if not file.read_text().startswith("# ")] == []


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.parent.name}/{part.stem}")
def test_every_setting_of_a_recipe_part_arrives(tmp_path: Path, part: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"defaults: [/base_sft, /{part.parent.name}: {part.stem}, _self_]\n")
    required = {"train.steps": 1, "log.dir": "l", "checkpoint.dir": "c", "model.load": "m", "optim.learning_rate": 0.5}
    values = {key: value for key, value in yaml.safe_load(part.read_text()).items() if value != "???"}
    given = [f"{path}={value}" for path, value in required.items() if path.rpartition(".")[2] not in values]
    composed = yaml.safe_load(recipe_yaml(load_recipe(str(own), given)))[part.parent.name]
    if "sources" in values:  # without the defaults that the part does not mention
        pairs = zip(composed["sources"], values["sources"], strict=True)
        composed["sources"] = [{key: source[key] for key in declared} for source, declared in pairs]
    assert {key: composed[key] for key in values} == values


def test_a_group_chosen_on_the_command_line_arrives() -> None:
    config = quickstart("layout=pp31_vpp2_ep8", "data=esci", "optim=adamw_constant")
    assert (config.layout.pp, config.layout.vpp, config.layout.pipeline) == (31, 2, "Et|(t|)*60mL")
    assert [source.kind for source in config.data.sources] == [SourceKind.esci]
    assert config.optim.schedule is Schedule.constant


def test_plain_objects_come_out_with_interpolations_resolved() -> None:
    config = quickstart("log.dir=runs/a b")
    assert config.checkpoint.dir == "runs/a b/checkpoints"
    assert config.model.layer_spec is LayerSpecChoice.auto
    assert type(config) is SftConfig
    assert all(is_dataclass(getattr(config, field.name)) for field in fields(config))


def test_a_recipe_of_ones_own_builds_on_a_shipped_one(tmp_path: Path) -> None:
    folder = tmp_path / "it's my folder"
    folder.mkdir()
    own = folder / "mine.yaml"
    own.write_text("defaults: [/sft/quickstart, override /layout: pp4_ep2, _self_]\nmodel: {load: abc}\n")
    config = load_recipe(str(own), ["train.steps=7"])
    assert (config.model.load, config.layout.pp, config.train.steps) == ("abc", 4, 7)


def test_a_shipped_recipe_can_be_given_as_a_file() -> None:
    file = recipes_folder() / "sft" / "quickstart.yaml"
    assert load_recipe(str(file), ["model.load=runs/demo"]) == quickstart()


def test_the_written_recipe_reads_back_to_an_equal_one(tmp_path: Path) -> None:
    config = quickstart(
        "model.frozen=[experts,router]", "data.sources=[{kind: jsonl, path: 'a: b', weight: 2.5}]", "layout=pp31_ep8"
    )
    file = tmp_path / "resolved.yaml"
    file.write_text(recipe_yaml(config))
    assert load_recipe(str(file)) == config


def test_every_setting_is_described_below_it() -> None:
    files = sorted((ROOT / "megatron_ads" / "config").glob("*.py"))
    classes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    sections = [node for node in classes if node.name.endswith("Config")]
    settings = 0
    for section in sections:
        for statement, following in pairwise(section.body):
            if isinstance(statement, ast.AnnAssign) and section.name != "SftConfig":
                described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert described, f"{section.name}.{ast.unparse(statement.target)} has no description"
                settings += 1
    assert settings > 50


def test_the_layer_specs_of_a_recipe_are_auto_and_those_of_the_conversion() -> None:
    assert {*LayerSpecChoice} == {"auto", *LayerSpec}


# ---- unknown, mistyped, missing ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train\.stepz is not a setting; did you mean train\.steps\?"),
        ("+train.stepz=3", r"train\.stepz is not a setting; did you mean train\.steps\?"),
        ("steps=3", r"steps is not a setting; did you mean train\.steps\?"),
        ("trian.steps=3", r"trian is not a setting; did you mean train\?"),
        ("+model.zzz=1", r"model\.zzz is not a setting\. Known: model\.load, model\.layer_spec"),
        ("data.sources=[{kind: builtin, weigth: 2}]", r"data\.sources\[\]\.weigth is not .* data\.sources\[\]\.weight"),
        (
            "data.sources=[{kind: esi}]",
            r"data\.sources\[\]\.kind must be one of builtin, simulator, esci, next_brand, gsm8k, jsonl, table",
        ),
        (
            "data.sources=[{kind: simulator, history: {mots_entries: 2}}]",
            r"data\.sources\[\]\.history\.mots_entries is not .* data\.sources\[\]\.history\.most_entries",
        ),
        ("data.sources=3", r"data\.sources must be a list"),
        ("train.steps=many", r"train\.steps must be a whole number: Value 'many'"),
        ("train.steps=1.5", r"train\.steps must be a whole number: Value '1\.5'"),
        ("train.steps=null", r"train\.steps must be a whole number"),
        ("train.deterministic=3.5", r"train\.deterministic must be true or false: .*'3\.5'"),
        ("train.evaluate_every=often", r"train\.evaluate_every must be a whole number or null"),
        ("optim.learning_rate=fast", r"optim\.learning_rate must be a number"),
        ("optim.schedule=cosin", r"optim\.schedule must be one of cosine, linear, constant"),
        ("model.frozen=[expert]", r"model\.frozen\[0\] must be one of embedding, attention"),
        ("layout=pp3_ep2", r"there is no recipe part 'layout/pp3_ep2'\. Did you mean pp\w+\? Available: pp16_ep16"),
        ("layout.pp=[1", r"no viable alternative"),
        ("log.dir=${logs.root}", r"Interpolation key 'logs\.root' not found"),
    ],
)
def test_a_wrong_override_is_refused_with_its_path_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"sft/quickstart: .*{message}"):
        quickstart(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", r"trian is not a setting; did you mean train\?"),
        ("train: {stepz: 3}", r"train\.stepz is not a setting; did you mean train\.steps\?"),
        ("train: {steps: soon}", r"train\.steps must be a whole number: Value 'soon'"),
        ("train: 3", r"train is 3; it must be a section with steps, global"),
        ("data: {sources: [{kind: jsonl, file: a}]}", r"data\.sources\[\]\.file is not a setting"),
        ("train: {steps: 3", r"line \d+"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    for defaults in ("", "defaults: [/sft/quickstart, _self_]\n"):  # with and without the schema below it
        own = tmp_path / "mine.yaml"
        own.write_text(f"{defaults}{text}\n")
        with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
            load_recipe(str(own))


def test_the_layout_alone_can_be_read_from_a_recipe_with_open_settings() -> None:
    layout = load_layout("sft/deepseek_r1_671b_248gpu", ["layout.tp=2"])
    assert (layout.pp, layout.ep, layout.tp, layout.last_stage_layers) == (31, 8, 2, 1)
    with pytest.raises(ConfigError, match=r"layout\.piplin is not a setting; did you mean layout\.pipeline\?"):
        load_layout("sft/quickstart", ["layout.piplin=2"])


def test_settings_left_open_are_listed_together() -> None:
    with pytest.raises(ConfigError, match=r"model\.load must be set, in the recipe or on the command line"):
        load_recipe("sft/quickstart")
    with pytest.raises(ConfigError, match=r"log\.dir, model\.load must be set"):
        load_recipe("sft/quickstart", ["log.dir=???", "checkpoint.dir=c"])


def test_an_unknown_recipe_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'sft/quickstrat'\. Did you mean sft/quickstart\?"):
        load_recipe("sft/quickstrat")
    with pytest.raises(ConfigError, match=r"no recipe 'qqq'\. Shipped: sft/deepseek_r1_671b_248gpu, "):
        load_recipe("qqq")
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load_recipe("absent.yaml")


# ---- combinations ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout=pp1_ep1", "layout.vpp=2"], r"layout\.vpp is 2 with layout\.pp = 1"),
        (["layout.pp=3"], r"pp \* cp \* tp = 3 \* 1 \* 1 = 3, which does not divide the 4 ranks"),
        (["layout.tp=0"], r"layout\.tp is 0; it must be at least 1"),
        (["layout=pp1_ep1", "layout.last_stage_layers=1"], r"layout\.last_stage_layers is 1, which has no effect"),
        (["layout.pipeline='Et|tL'", "layout.first_stage_layers=1"], r"layout\.first_stage_layers is 1, which has no"),
        (["train.global_batch_size=6"], r"= 6 is not a multiple of .* 2 \* 2 = 4\. Choose a multiple of 4"),
        (["train.micro_batch_size=0"], r"train\.micro_batch_size is 0; it must be at least 1"),
        (["train.steps=0"], r"train\.steps is 0; it must be at least 1"),
        (
            ["data.sources=[{kind: jsonl, path: a, rejected: r}, {kind: jsonl, path: b, rejected: r}]"],
            r"r is the rejected file of several of data\.sources",
        ),
        (["reweight.exact=true"], r"reweight\.exact is true, which has no effect while reweight\.instances is false"),
        (["train.steps=5"], r"warmup_steps = 10 is more than train\.steps = 5: .* Set optim\.warmup_steps=0, or raise"),
        (["data.validation_rows=0"], r"train\.evaluate_every is 100, but data\.validation_rows is 0"),
        (["data.sources=[]"], r"data\.sources is empty"),
        (["data.sources=[{kind: jsonl}]"], r"data\.sources\[0\]\.path is missing"),
        (["data.sources=[{kind: builtin, path: a}]"], r"data\.sources\[0\]\.path is 'a', which has no effect"),
        (["data.sources=[{kind: simulator}]"], r"data\.sources\[0\]\.task is missing; .*next_advertiser"),
        (
            ["data.sources=[{kind: esci, task: user_profile}]"],
            r"data\.sources\[0\]\.task is user_profile, .*effect",
        ),
        (
            ["data.sources=[{kind: simulator, task: query_generation, history: {most_entries: 2}}]"],
            r"data\.sources\[0\]\.history has no effect",
        ),
        (
            ["data.sources=[{kind: simulator, task: user_profile, history: {window_days: {clicks: 0}}}]"],
            r"data\.sources\[0\]\.history\.window_days\.clicks is 0",
        ),
        (["data.sources=[{kind: table, path: a.csv}]"], r"data\.sources\[0\]\.columns is missing"),
        (
            ["data.sources=[{kind: table, path: a.csv, task: next_advertiser, columns: {user: u}}]"],
            r"data\.sources\[0\]\.anchor is None; kind table with task next_advertiser needs one",
        ),
        (["data.sources=[{kind: esci, anchor: 2025-03-01}]"], r"data\.sources\[0\]\.anchor is 2025-03-01; .* no use"),
        (["data.sources=[{kind: esci, columns: {a: b}}]"], r"data\.sources\[0\]\.columns has no effect"),
        (["data.sources=[{kind: esci, rejected: a}]"], r"data\.sources\[0\]\.rejected is 'a', .* no effect"),
        (["data.sources=[{kind: builtin}, {kind: esci, weight: 0}]"], r"data\.sources\[1\]\.weight is 0\.0; .*above 0"),
        (["data.sources=[{kind: builtin, rows: 0}]"], r"data\.sources\[0\]\.rows is 0; it must be at least 1"),
        (
            ["layout=pp1_ep1", "layout.cp=2", "data.seq_length=255"],
            r"255 \* 2 = 510 tokens cannot be cut into 4",
        ),
        (["optim.learning_rate=-1"], r"optim\.learning_rate is -1\.0; it must be at least 0"),
        (["optim.learning_rate=0"], r"optim\.learning_rate is 0\.0; it must be above 0"),
        (["optim.learning_rate=nan"], r"optim\.learning_rate is nan"),
        (["optim.beta2=1"], r"optim\.beta2 is 1\.0; it must be at least 0 and below 1"),
        (["optim.min_learning_rate=1"], r"optim\.min_learning_rate 1 is above optim\.learning_rate 0\.002"),
        (["optim=adamw_constant", "optim.min_learning_rate=1e-6"], r"min_learning_rate is 1e-06, which has no effect"),
        (["model.router_bias_update_rate=0.001"], r"router_bias_update_rate is 0\.001, which has no effect"),
        (["model.router_bias=update"], r"router_bias is update, but model\.router_bias_update_rate is None"),
        (["model.mtp_loss_weight=-0.1"], r"model\.mtp_loss_weight is -0\.1; it must be at least 0"),
        (["model.frozen=[mtp]", "model.mtp_loss_weight=0"], r"model\.frozen lists mtp, which has no effect"),
        (["model.frozen=[router,router]"], r"model\.frozen lists router more than once"),
        (["model.lora.rank=0"], r"model\.lora\.rank is 0; it must be at least 1"),
        (["model.lora={rank: 4, alpha: 0}"], r"model\.lora\.alpha is 0; it must be above 0"),
        (
            ["model.lora={rank: 4, targets: []}"],
            r"model\.lora\.targets is empty\. Choose from attention, dense",
        ),
        (["model.lora={rank: 4, targets: [dense, dense]}"], r"model\.lora\.targets lists dense more than once"),
        (["model.lora.alpha=8"], r"model\.lora has no effect while model\.lora\.rank is null"),
        (
            ["model.lora.rank=4", "model.frozen=[router]"],
            r"model\.frozen lists router, but with model\.lora every",
        ),
        (
            ["model.lora.rank=4", "model.router_bias=update", "model.router_bias_update_rate=0.001"],
            r"router_bias is update, but model\.lora keeps the routers",
        ),
        (["reweight.interval=0"], r"reweight\.interval is 0; it must be at least 1"),
        (["reweight.beta=0"], r"reweight\.beta is 0; it must be above 0"),
        (["reweight.lowest=1.5"], r"reweight\.lowest = 1\.5 and reweight\.highest = 5 must have 1 between them"),
        (["reweight.tasks=true", "train.evaluate_every=null"], r"reweight\.tasks needs a validation metric"),
        (
            ["data.validation_rows_per_group=4", "data.validation_rows=0", "train.evaluate_every=null"],
            r"validation_rows_per_group is 4, but data\.validation_rows is 0",
        ),
        (["checkpoint.save_every=0"], r"checkpoint\.save_every is 0; it must be at least 1"),
        (["runtime.timeout_seconds=0"], r"runtime\.timeout_seconds is 0"),
    ],
)
def test_an_impossible_or_idle_combination_is_refused_with_the_numbers(overrides: list[str], message: str) -> None:
    config = quickstart(*overrides)
    with pytest.raises(ConfigError, match=message):
        validate(config, 4)


def test_interleaving_asks_for_microbatches_in_groups_of_the_stages() -> None:
    # dp 2, 1 row each: 4 rows are 2 microbatches, a group of pp = 2; 6 rows are 3.
    even = ["layout=pp2_ep2", "layout.vpp=2", "train.micro_batch_size=1", "train.global_batch_size=4"]
    validate(quickstart(*even), 4)
    with pytest.raises(ConfigError, match=r"6 / \(1 \* 2\) = 3 microbatches\. .* a multiple of 4"):
        validate(quickstart(*even, "train.global_batch_size=6"), 4)


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (
            "moonlight_16b_a3b",
            ["model.mtp_loss_weight=0.1"],
            r"mtp_loss_weight is 0\.1, but the model has no MTP layer",
        ),
        (
            "no_shared",
            ["model.frozen=[shared_experts]"],
            r"model\.frozen lists shared_experts, which the model does not",
        ),
        (
            "no_shared",
            ["model.lora={rank: 4, targets: [attention, shared_experts]}"],
            r"model\.lora\.targets lists shared_experts, which the model does not",
        ),
        ("moonlight_16b_a3b", ["data.seq_length=8193"], r"data\.seq_length = 8193 is longer than the model's 8192"),
        ("moonlight_16b_a3b", ["layout.pp=2"], r"27 decoder layers = 27, which 2 chunks"),
        ("moonlight_16b_a3b", ["layout.ep=3"], r"64 routed experts cannot be spread evenly over layout\.ep = 3"),
        (
            "deepseek_v2_lite",
            ["model.router_bias=update", "model.router_bias_update_rate=0.001"],
            r"router_bias is update, but the model's router has no selection bias",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(model: str, overrides: list[str], message: str) -> None:
    shape = replace(published("moonlight_16b_a3b"), num_shared_experts=0) if model == "no_shared" else published(model)
    base = ["layout=pp1_ep1", "model.mtp_loss_weight=0", "train.global_batch_size=12", "train.micro_batch_size=1"]
    validate(quickstart(*base), 6, shape)
    config = quickstart(*base, *overrides)
    validate(config, 6)
    with pytest.raises(ConfigError, match=message):
        validate(config, 6, shape)


def test_freezing_and_the_moving_router_bias_are_accepted_where_they_have_an_effect() -> None:
    config = quickstart(
        "model.frozen=[experts,mtp]",
        "model.router_bias=update",
        "model.router_bias_update_rate=0.001",
        "layout.last_stage_layers=59",
    )
    validate(config, 4, published("deepseek_r1"))
    assert config.model.frozen == [FrozenPart.experts, FrozenPart.mtp]
    assert config.model.router_bias is RouterBias.update
