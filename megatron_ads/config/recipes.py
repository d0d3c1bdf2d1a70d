"""Find a recipe, Hydra YAML below ``recipes/`` or a file of the user, and compose it onto the schema.

No unknown key or wrong type reaches the code.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError, safe_load

from megatron_ads.architecture import ModelShape
from megatron_ads.config import preference, rl, run
from megatron_ads.config.model import LayoutConfig
from megatron_ads.config.preference import PreferenceConfig
from megatron_ads.config.recipe_errors import explain
from megatron_ads.config.rl import RlConfig
from megatron_ads.config.run import RunConfig, SftConfig
from megatron_ads.errors import ConfigError

_Job = TypeVar("_Job", bound=RunConfig)
_Recipe = TypeVar("_Recipe")
_RAISED_BY_HYDRA = (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError, OverflowError)
"""What Hydra and OmegaConf stumble over in some overrides, such as ``optim=5``, or brackets without end."""


JOBS: dict[str, type[RunConfig]] = {"sft": SftConfig, "preference": PreferenceConfig, "rl": RlConfig}
"""The schema of each kind of training job; a recipe says its kind by ``base_KIND`` in its ``defaults``."""


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: beside this package, in a checkout as in an installation.

    Raises:
        ConfigError: If the installation lacks it.
    """
    folder = Path(__file__).resolve().parents[2] / "recipes"
    if not folder.is_dir():
        raise ConfigError(f"The shipped recipes are missing: {folder} does not exist. Install megatron-ads again.")
    return folder


def shipped_recipes(kind: str = "sft") -> tuple[str, ...]:
    """Return the names of the recipes that describe a whole job of one kind, as ``sft/quickstart``."""
    return tuple(f"{kind}/{file.stem}" for file in sorted((recipes_folder() / kind).glob("*.yaml")))


def locate_recipe(name_or_path: str, kind: str = "sft") -> tuple[Path, str, list[str]]:
    """Return Hydra's config folder, the config's name in it, and the overrides that let it find the shipped groups.

    Raises:
        ConfigError: If there is neither such a file nor such a recipe.
    """
    shipped, path = recipes_folder(), Path(name_or_path)
    if path.suffix == ".yaml":  # Hydra reads no other
        if not path.is_file():
            raise ConfigError(f"The recipe {name_or_path} does not exist.")
        path = path.resolve()
        if path.is_relative_to(shipped):
            return shipped, path.relative_to(shipped).with_suffix("").as_posix(), []
        quoted = str(shipped).replace("'", "\\'")
        return path.parent, path.stem, [f"hydra.searchpath=['file://{quoted}']"]
    if not (shipped / f"{name_or_path}.yaml").is_file():
        names = [name for each in (JOBS if kind in JOBS else [kind]) for name in shipped_recipes(each)]
        near = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Shipped: {', '.join(names)}."
        raise ConfigError(f"There is no recipe {name_or_path!r}. {hint} A recipe of your own is given as FILE.yaml.")
    return shipped, name_or_path, []


def recipe_kind(name_or_path: str) -> str:
    """Return which of ``JOBS`` a recipe describes.

    Its ``defaults`` say so, or those of the recipe it begins with; of a resolved one, which has none, its sections.

    Raises:
        ConfigError: If there is no such recipe.
    """
    folder, name, _ = locate_recipe(name_or_path)
    file = folder / f"{name}.yaml"
    kind = _kind_by_defaults(file)
    return kind if kind in JOBS else _kind_by_sections(file) or "sft"


def _kind_by_defaults(recipe: Path) -> str | None:
    """Return the KIND of the ``base_KIND`` that a recipe begins with, of a job or of anything else."""
    waiting, seen = [recipe], set[Path]()
    while waiting:
        if (file := waiting.pop(0)) in seen or not file.is_file():
            continue
        seen.add(file)
        entries = _content(file).get("defaults")
        for entry in entries if isinstance(entries, list) else ():
            if not isinstance(entry, str):
                continue
            beside, shipped = file.parent / f"{entry}.yaml", recipes_folder() / f"{entry.removeprefix('/')}.yaml"
            if found := [each for each in (beside, shipped) if each.is_file()]:
                waiting += found  # a file of one's own may be called base_team, too
            elif base := re.fullmatch(r"/?base_(\w+)", entry):
                return base[1]
    return None


def _kind_by_sections(recipe: Path) -> str | None:
    shared = {field.name for field in fields(RunConfig)}
    own = {kind: {field.name for field in fields(schema)} - shared for kind, schema in JOBS.items()}
    return next((kind for kind, names in own.items() if names & _content(recipe).keys()), None)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = safe_load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeError, OSError):  # composing it says what is wrong
        return {}
    return content if isinstance(content, dict) else {}


def load_job(name_or_path: str, overrides: Sequence[str] = (), *, sections: Collection[str] | None = None) -> RunConfig:
    """Compose a recipe of any kind of training job; as :func:`load_recipe`."""
    return _load(JOBS[kind := recipe_kind(name_or_path)], kind, name_or_path, overrides, sections)


def validate_job(config: RunConfig, world: int, shape: ModelShape | None = None) -> None:
    """Refuse a recipe of any kind that cannot run; as ``validate_run``."""
    if isinstance(config, RlConfig):
        rl.validate(config, world, shape)
    elif isinstance(config, PreferenceConfig):
        preference.validate(config, world, shape)
    else:
        assert isinstance(config, SftConfig)
        run.validate(config, world, shape)


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, sections: Collection[str] | None = None
) -> SftConfig:
    """Compose a fine-tuning recipe with Hydra and return it as plain dataclasses, not yet validated.

    Args:
        name_or_path: A shipped recipe such as ``sft/quickstart``, or a YAML file of one's own.
        overrides: Hydra overrides, ``train.max_steps=20`` or ``layout=pp4_ep2``.
        sections: Those that the caller reads; in the others required settings may be missing, and are
            ``"not set"`` or 0 then. None: all.

    Raises:
        ConfigError: If there is no such recipe, it is of another kind, a key is unknown (the nearest known one is
            named), a value has the wrong type, or a required one is missing.
    """
    if (kind := recipe_kind(name_or_path)) != "sft":
        raise ConfigError(f"{name_or_path} is a recipe of kind {kind}; one of kind sft is needed here.")
    return _load(SftConfig, "sft", name_or_path, overrides, sections)


def _load(
    schema: type[_Job], kind: str, name_or_path: str, overrides: Sequence[str], sections: Collection[str] | None
) -> _Job:
    composed = compose_onto(schema, kind, name_or_path, overrides)
    missing = sorted(OmegaConf.missing_keys(composed))
    if demanded := [key for key in missing if sections is None or key.split(".")[0] in sections]:
        raise ConfigError(
            f"{name_or_path}: {', '.join(demanded)} must be set, in the recipe or on the command line as KEY=VALUE."
        )
    for key in missing:
        try:
            OmegaConf.update(composed, key, "not set")
        except ValidationError:  # a number
            OmegaConf.update(composed, key, 0)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)  # to_object instantiates the schema composed onto
    _require_paths(config)
    return config


def _require_paths(config: RunConfig) -> None:
    """Refuse paths as an unset variable makes them: ``log.dir=$RUN`` and ``log.dir=$RUN/logs`` with ``RUN`` empty.

    Raises:
        ConfigError: Naming the setting.
    """
    sources = [(f"data.sources[{index}]", source) for index, source in enumerate(config.data.sources)]
    written = {"log.dir": config.log.dir, "checkpoint.dir": config.checkpoint.dir}
    written |= {f"{name}.rejected": source.rejected for name, source in sources if source.rejected is not None}
    read = {"model.load": config.model.load}
    read |= {f"{name}.path": source.path for name, source in sources if source.path is not None}
    for setting, text in (read | written).items():
        if not text.strip():
            what = "empty"
        elif text.startswith("/") and not text.strip("/. "):
            what = f"{text!r}, the root of the file system"
        elif setting in written and text.startswith("/") and not text.strip("/").count("/") and not Path(text).exists():
            what = f"{text!r}, something new at the root of the file system"
        else:
            continue
        raise ConfigError(
            f"{setting} is {what}, as an unset variable leaves it. Give another path, or make the folder first."
        )


def load_layout(name_or_path: str, overrides: Sequence[str] = ()) -> LayoutConfig:
    """Return the layout section of a recipe alone; other settings may still be open.

    Raises:
        ConfigError: As :func:`load_recipe`, but for missing settings.
    """
    kind = recipe_kind(name_or_path)
    layout = OmegaConf.to_object(compose_onto(JOBS[kind], kind, name_or_path, overrides).layout)
    assert isinstance(layout, LayoutConfig)
    return layout


def compose_onto(
    schema: type,
    kind: str,
    name_or_path: str,
    overrides: Sequence[str],
    *,
    shipped_in: str | None = None,
    kinds: Mapping[str, type] = JOBS,
) -> DictConfig:
    """Return a recipe of one kind composed onto the schema, which it names as ``base_KIND``.

    Args:
        schema: What recipes of this kind hold.
        kind: Its name.
        name_or_path: A shipped recipe, or a file.
        overrides: Hydra overrides.
        shipped_in: Folder below ``recipes/``; None: that of the kind's name.
        kinds: The schemas of the kinds that it may be mistaken for.

    Raises:
        ConfigError: If there is no such recipe, it is of another kind, a key is unknown, or a value has the wrong type.
    """
    ConfigStore.instance().store(name=f"base_{kind}", node=_node_of(schema))
    folder, name, search = locate_recipe(name_or_path, shipped_in or kind)
    if (found := _kind_by_defaults(folder / f"{name}.yaml")) not in (None, kind):
        raise ConfigError(
            f"{name_or_path} is a recipe of kind {found}; one of kind {kind}, which begins with /base_{kind}, is "
            "needed here."
        )
    # The keys of these mappings are a template's, or tasks, which Hydra takes for misspelt without the signs.
    free = re.compile(r"([\w.]+\.template_arguments|priorities)[.=]")
    overrides = [f"++{item}" if free.match(item) else item for item in overrides]
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            composed = compose(config_name=name, overrides=[*search, *overrides])
        # Merged once more from plain values: an override such as +train.stepz=1 may extend the composed config.
        merged = OmegaConf.merge(_node_of(schema), OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, YAMLError, *_RAISED_BY_HYDRA) as error:
        raise explain(error, schema=schema, recipe=name_or_path, kinds=kinds) from None
    assert isinstance(merged, DictConfig)
    return merged


@cache
def _node_of(schema: type) -> DictConfig:
    """Return the schema as OmegaConf's, which takes a fifth of a composition to make; only to copy from."""
    node = OmegaConf.structured(schema)
    assert isinstance(node, DictConfig)
    return node


def load_recipe_of(
    schema: type[_Recipe],
    kind: str,
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    out: str | None = None,
    shipped_in: str | None = None,
    kinds: Mapping[str, type] = JOBS,
) -> _Recipe:
    """Compose a recipe that is no training job and return it as plain dataclasses, not checked yet.

    Args:
        schema: A dataclass with the setting ``out``.
        kind: Recipes name the schema as ``base_KIND``.
        name_or_path: A shipped recipe such as ``label/relevance``, or a YAML file of one's own.
        overrides: Hydra overrides, ``model.url=http://host:8000/v1``.
        out: Replaces the recipe's ``out``, whatever characters it has; None leaves it.
        shipped_in: As for :func:`compose_onto`; so is the next.
        kinds: The schemas of the kinds that it may be mistaken for.

    Raises:
        ConfigError: If there is no such recipe, it is of another kind, a key is unknown (the nearest known one is
            named), a value has the wrong type, or a required one is missing.
    """
    composed = compose_onto(schema, kind, name_or_path, overrides, shipped_in=shipped_in, kinds=kinds)
    if out is not None:
        composed.out = out
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(
            f"{name_or_path}: {', '.join(missing)} must be set, in the recipe or on the command line as KEY=VALUE."
        )
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)  # to_object instantiates the schema composed onto
    return config


def recipe_yaml(config: RunConfig) -> str:
    """Return the resolved recipe as YAML, which :func:`load_job` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
