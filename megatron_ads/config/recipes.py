"""Compose a recipe, Hydra YAML below ``recipes/``, onto the schema: no unknown key or wrong type reaches the code."""

from collections.abc import Collection, Sequence

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import YAMLError

from megatron_ads.config.layout import LayoutConfig
from megatron_ads.config.recipe_errors import explain
from megatron_ads.config.recipe_files import locate_recipe
from megatron_ads.config.sft import SftConfig
from megatron_ads.errors import ConfigError


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
    composed = _compose(name_or_path, overrides)
    missing = sorted(OmegaConf.missing_keys(composed))
    if demanded := [key for key in missing if sections is None or key.split(".")[0] in sections]:
        raise ConfigError(
            f"{name_or_path}: {', '.join(demanded)} must be set, in the recipe or on the command line as KEY=VALUE."
        )
    for key in missing:
        _fill(composed, key)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, SftConfig)  # to_object instantiates the schema composed onto
    return config


def _fill(composed: DictConfig, key: str) -> None:
    """Give a required setting that nobody reads a value of its type."""
    try:
        OmegaConf.update(composed, key, "not set")
    except ValidationError:  # a number
        OmegaConf.update(composed, key, 0)


def load_layout(name_or_path: str, overrides: Sequence[str] = ()) -> LayoutConfig:
    """Return the layout section of a recipe alone; other settings may still be open.

    Raises:
        ConfigError: As :func:`load_recipe`, but for missing settings.
    """
    layout = OmegaConf.to_object(_compose(name_or_path, overrides).layout)
    assert isinstance(layout, LayoutConfig)
    return layout


def _compose(name_or_path: str, overrides: Sequence[str]) -> DictConfig:
    return compose_onto(SftConfig, "sft", name_or_path, overrides)


def compose_onto(schema: type, kind: str, name_or_path: str, overrides: Sequence[str]) -> DictConfig:
    """Return a recipe of one kind, ``recipes/KIND/``, composed onto the schema, which it names as ``base_KIND``.

    Raises:
        ConfigError: If there is no such recipe, a key is unknown, or a value has the wrong type.
    """
    ConfigStore.instance().store(name=f"base_{kind}", node=schema)
    folder, name, search = locate_recipe(name_or_path, kind)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            composed = compose(config_name=name, overrides=[*search, *overrides])
        # Merged once more from plain values: an override such as +train.stepz=1 may extend the composed config.
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:  # Hydra refuses some overrides so
        raise explain(error, schema=schema, recipe=name_or_path) from None
    assert isinstance(merged, DictConfig)
    return merged


def recipe_yaml(config: SftConfig) -> str:
    """Return the resolved recipe as YAML, which :func:`load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
