"""Find a recipe, Hydra YAML below ``recipes/`` or a file of the user, and compose it onto the schema.

No unknown key or wrong type reaches the code.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from megatron_ads.config.model import LayoutConfig
from megatron_ads.config.recipe_errors import explain
from megatron_ads.config.run import SftConfig
from megatron_ads.errors import ConfigError

_RAISED_BY_HYDRA = (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError, OverflowError)
"""What Hydra and OmegaConf stumble over in some overrides, such as ``optim=5``, or brackets without end."""


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
        names = shipped_recipes(kind)
        near = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Shipped: {', '.join(names)}."
        raise ConfigError(f"There is no recipe {name_or_path!r}. {hint} A recipe of your own is given as FILE.yaml.")
    return shipped, name_or_path, []


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, sections: Collection[str] | None = None
) -> SftConfig:
    """Compose a recipe with Hydra and return it as plain dataclasses, not yet validated against a world size.

    Args:
        name_or_path: A shipped recipe such as ``sft/quickstart``, or a YAML file of one's own.
        overrides: Hydra overrides, ``train.max_steps=20`` or ``layout=pp4_ep2``.
        sections: Those that the caller reads; in the others required settings may be missing, and are
            ``"not set"`` or 0 then. None: all.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown (the nearest known one is named), a value has
            the wrong type, or a required one is missing.
    """
    composed = compose_onto(SftConfig, "sft", name_or_path, overrides)
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
    assert isinstance(config, SftConfig)  # to_object instantiates the schema composed onto
    _require_paths(config)
    return config


def _require_paths(config: SftConfig) -> None:
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
    layout = OmegaConf.to_object(compose_onto(SftConfig, "sft", name_or_path, overrides).layout)
    assert isinstance(layout, LayoutConfig)
    return layout


def compose_onto(schema: type, kind: str, name_or_path: str, overrides: Sequence[str]) -> DictConfig:
    """Return a recipe of one kind, ``recipes/KIND/``, composed onto the schema, which it names as ``base_KIND``.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown, or a value has the wrong type.
    """
    ConfigStore.instance().store(name=f"base_{kind}", node=schema)
    folder, name, search = locate_recipe(name_or_path, kind)
    # The keys of this mapping are those of a checkpoint's template, which Hydra takes for misspelt without the signs.
    overrides = [f"++{item}" if re.match(r"[\w.]+\.template_arguments[.=]", item) else item for item in overrides]
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            composed = compose(config_name=name, overrides=[*search, *overrides])
        # Merged once more from plain values: an override such as +train.stepz=1 may extend the composed config.
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, YAMLError, *_RAISED_BY_HYDRA) as error:
        raise explain(error, schema=schema, recipe=name_or_path) from None
    assert isinstance(merged, DictConfig)
    return merged


def recipe_yaml(config: SftConfig) -> str:
    """Return the resolved recipe as YAML, which :func:`load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
