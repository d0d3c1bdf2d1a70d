"""Recipes compose onto the schema; what is misspelt, mistyped or missing is refused with the remedy."""

import ast
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from conversion.layer_specs import LayerSpec
from megatron_ads.config.data import SourceKind
from megatron_ads.config.model import LayerSpecChoice
from megatron_ads.config.recipes import JOBS, load_job, load_layout, load_recipe, recipe_yaml, recipes_folder
from megatron_ads.config.rl import RlConfig
from megatron_ads.config.run import SftConfig
from megatron_ads.config.training import Schedule
from megatron_ads.errors import ConfigError
from tests.config.quickstart import quickstart

ROOT = Path(__file__).parents[2]


def test_a_group_chosen_on_the_command_line_arrives() -> None:
    config = quickstart("layout=pp31_tp2_vpp2_ep8", "data=esci", "optim=adamw_constant")
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
    config = load_recipe(str(own), ["train.max_steps=7"])
    assert (config.model.load, config.layout.pp, config.train.max_steps) == ("abc", 4, 7)


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


@pytest.mark.parametrize("name", ["preference/sdpo", "rl/taiji_popo"])
def test_the_written_recipe_of_another_kind_is_known_by_its_sections(name: str, tmp_path: Path) -> None:
    config, file = load_job(name, ["model.load=x"]), tmp_path / "resolved.yaml"
    file.write_text(recipe_yaml(config))
    assert load_job(str(file)) == config


def test_every_setting_is_described_below_it() -> None:
    files = sorted((ROOT / "megatron_ads" / "config").glob("*.py"))
    classes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    wholes = {"RunConfig", *(schema.__name__ for schema in JOBS.values())}  # made of sections, which say what they are
    sections = [node for node in classes if node.name.endswith("Config") and node.name not in wholes]
    settings = 0
    for section in sections:
        for statement, following in pairwise(section.body):
            if isinstance(statement, ast.AnnAssign):
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
        ("train.stepz=3", r"train\.stepz is not a setting; did you mean train\.max_steps\?"),
        ("+train.stepz=3", r"train\.stepz is not a setting; did you mean train\.max_steps\?"),
        ("max_steps=3", r"max_steps is not a setting; did you mean train\.max_steps\?"),
        ("trian.max_steps=3", r"trian is not a setting; did you mean train\?"),
        ("rollout.samples=4", r"rollout is a section of recipes of kind rl, and this is none\. Remove it, or take"),
        ("+preference.beta=1", r"preference is a section of recipes of kind preference, and this is none"),
        ("+model.zzz=1", r"model\.zzz is not a setting\. Known: model\.load, model\.layer_spec"),
        ("data.sources=[{kind: builtin, weigth: 2}]", r"data\.sources\[\]\.weigth is not .* data\.sources\[\]\.weight"),
        (
            "data.sources=[{kind: esi}]",
            r"data\.sources\[\]\.kind must be one of builtin, simulator, esci, next_brand, gsm8k, jsonl, table",
        ),
        (
            "data.sources=[{kind: simulator, history: {mots_entries: 2}}]",
            r"data\.sources\[\]\.history\.mots_entries is not .* data\.sources\[\]\.history\.max_entries",
        ),
        ("data.sources=3", r"data\.sources must be a list"),
        ("data.sources=[{kind: esci, history: 3}]", r"data\.sources\[\]\.history is 3; it must be a section with wi"),
        ("data.sources=[{kind: table, columns: 3}]", r"data\.sources\[\]\.columns must be a mapping, each value text"),
        (
            "data.sources=[{kind: esci, history: {window_days: {clicks: soon}}}]",
            r"data\.sources\[\]\.history\.window_days\.clicks must be a number: Value 'soon'",
        ),
        ("train.max_steps=many", r"train\.max_steps must be a whole number: Value 'many'"),
        ("train.max_steps=1.5", r"train\.max_steps must be a whole number: Value '1\.5'"),
        ("train.max_steps=null", r"train\.max_steps must be a whole number"),
        ("train.deterministic=3.5", r"train\.deterministic must be true or false: .*'3\.5'"),
        ("train.evaluate_every=often", r"train\.evaluate_every must be a whole number or null"),
        ("optim.learning_rate=fast", r"optim\.learning_rate must be a number"),
        ("optim.schedule=cosin", r"optim\.schedule must be one of cosine, linear, constant"),
        ("model.frozen=[expert]", r"model\.frozen\[0\] must be one of embedding, attention"),
        ("layout=pp3_ep2", r"there is no recipe part 'layout/pp3_ep2'\. Did you mean pp\w+\? Available: pp16_ep16"),
        ("layout.pp=[1", r"layout\.pp=\[1 cannot be read. Close every bracket"),
        ("data.sources=[{kind: jsonl, path: /a=b.jsonl}]", r"a=b\.jsonl\}\] cannot be read.*path: \"/a=b.jsonl\"\}\]'"),
        ("log.dir=runs/lr=1e-5", "the value of log.dir has signs that need quotes; write 'log.dir=\"runs/lr=1e-5\"'"),
        ("log.dir=runs/ünï 你好", "write 'log.dir=\"runs/ünï 你好\"'"),
        ("log.dir=~/x", "write 'log.dir=\"~/x\"' .~ is not replaced by your home folder"),
        ("log.dir=a,b", "write 'log.dir=\"a,b\"'"),
        ("++data.sources[0].weight=2", r"data\.sources\[0\]\.weight is one item of a list.*'data\.sources=\["),
        ("train.max_steps", "train.max_steps is not of the form KEY=VALUE"),
        ("~optim.schedule", "optim.schedule cannot be removed; set it to another value, or to null"),
        ("log.dir=${logs.root}", r"Interpolation key 'logs\.root' not found"),
    ],
)
def test_a_wrong_override_is_refused_with_its_path_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"sft/quickstart: .*{message}"):
        quickstart(override)


@pytest.mark.parametrize(
    "override",
    [
        *[
            f"log.dir={text}"
            for text in ("a=b", "~", "a#b", "a'b", 'a"b', "(x)", "[a", "{a", "a,b", "ü", "a]", "a}", "@{x")
        ],
        *["data.sources[0].weight=2", "data.sources=[{path: ü}]", "train.max_steps", "~train.max_steps", "x=y=z"],
    ],
)
def test_no_refusal_of_an_override_is_hydras_own(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        quickstart(override)
    assert not any(word in str(caught.value) for word in ("hydra", "Exception", "multirun", "\n", "input '"))


@pytest.mark.parametrize(
    ("setting", "value", "wrong"),
    [
        ("log.dir", "", "empty"),
        ("log.dir", "'  '", "empty"),
        ("log.dir", "/", "'/', the root of the file system"),
        ("log.dir", "/./", "'/./', the root"),
        ("log.dir", "/runs_of_nobody", "'/runs_of_nobody', something new at the root"),
        ("log.dir", "//runs_of_nobody/", "'//runs_of_nobody/', something new at the root"),
        ("checkpoint.dir", "", "empty"),
        ("checkpoint.dir", "/checkpoints_of_nobody", "'/checkpoints_of_nobody', something new"),
        ("model.load", "", "empty"),
        ("model.load", "/", "'/', the root"),
        ("data.sources", "[{kind: jsonl, path: ''}]", "empty"),
        ("data.sources", "[{kind: jsonl, path: a, rejected: ''}]", "empty"),
        ("data.sources", "[{kind: jsonl, path: a, rejected: /nobody.jsonl}]", "'/nobody.jsonl', something new"),
    ],
)
def test_a_path_that_an_unset_variable_leaves_is_refused(setting: str, value: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}\S* is {wrong}.* as an unset variable leaves it"):
        quickstart(f"{setting}={value}")


@pytest.mark.parametrize("value", [".", "..", "runs", "/tmp", "/tmp/new/run", "./x"])
def test_other_paths_are_free(value: str) -> None:
    assert quickstart(f"log.dir={value}").log.dir == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {max_steps: 3}", r"trian is not a setting; did you mean train\?"),
        ("train: {stepz: 3}", r"train\.stepz is not a setting; did you mean train\.max_steps\?"),
        ("rewards: {use: [{name: a}]}", "of kind rl"),
        ("train: {max_steps: soon}", r"train\.max_steps must be a whole number: Value 'soon'"),
        ("train: 3", r"train is 3; it must be a section with max_steps, global"),
        ("data: {sources: [{kind: jsonl, file: a}]}", r"data\.sources\[\]\.file is not a setting"),
        ("train: {max_steps: 3", r"line \d+"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    for defaults in ("", "defaults: [/sft/quickstart, _self_]\n"):  # with and without the schema below it
        own = tmp_path / "mine.yaml"
        own.write_text(f"{defaults}{text}\n")
        with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
            load_recipe(str(own))


def test_a_part_of_ones_own_may_be_called_base(tmp_path: Path) -> None:
    (tmp_path / "base_team.yaml").write_text(
        "# @package _global_\ndefaults: [/rl/quickstart, _self_]\nrollout: {samples: 5}\n"
    )
    own = tmp_path / "mine.yaml"
    own.write_text("defaults: [base_team, _self_]\n")
    config = load_job(str(own), ["model.load=m"])
    assert isinstance(config, RlConfig) and config.rollout.samples == 5


def test_the_layout_alone_can_be_read_from_a_recipe_with_open_settings() -> None:
    layout = load_layout("sft/deepseek_r1_671b_248gpu", ["layout.tp=1"])
    assert (layout.pp, layout.ep, layout.tp, layout.pipeline) == (31, 8, 1, "Ett|(tt|)*29tmL")
    with pytest.raises(ConfigError, match=r"layout\.piplin is not a setting; did you mean layout\.pipeline\?"):
        load_layout("sft/quickstart", ["layout.piplin=2"])


def test_settings_left_open_are_listed_together() -> None:
    with pytest.raises(ConfigError, match=r"model\.load must be set, in the recipe or on the command line"):
        load_recipe("sft/quickstart")
    with pytest.raises(ConfigError, match=r"log\.dir, model\.load must be set"):
        load_recipe("sft/quickstart", ["log.dir=???", "checkpoint.dir=c"])


def test_a_caller_that_reads_some_sections_does_not_demand_the_others() -> None:
    assert load_recipe("sft/quickstart", sections=["data"]).data == quickstart().data
    open_steps = load_recipe("sft/quickstart", ["train.max_steps=???"], sections=["data"])
    assert (open_steps.model.load, open_steps.train.max_steps) == ("not set", 0)
    with pytest.raises(ConfigError, match=r"quickstart: log\.dir must be set"):
        load_recipe("sft/quickstart", ["log.dir=???", "checkpoint.dir=c"], sections=["data", "log"])


def test_an_unknown_recipe_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'sft/quickstrat'\. Did you mean sft/quickstart\?"):
        load_recipe("sft/quickstrat")
    with pytest.raises(ConfigError, match=r"no recipe 'qqq'\. Shipped: sft/deepseek_r1_671b_248gpu, "):
        load_recipe("qqq")
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load_recipe("absent.yaml")
    with pytest.raises(ConfigError, match=r"A recipe of your own is given as FILE\.yaml"):
        load_recipe("mine.yml")


def test_a_number_that_no_float_holds_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optim\.learning_rate is a whole number too large"):
        load_recipe("sft/quickstart", [f"optim.learning_rate={10**400}", "model.load=x"])
