"""Settings of a command that has no recipe: ``key=value`` on its command line, or the object that a folder recorded."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_ads.config.recipe_errors import explain


class Checked(Protocol):
    """A dataclass of settings."""

    def check(self) -> None:
        """Refuse impossible values."""


Config = TypeVar("Config", bound=Checked)


def load_settings(schema: type[Config], settings: object, source: str) -> Config:
    """Return checked settings.

    Args:
        schema: The dataclass whose defaults hold for what is not given.
        settings: Overrides such as ``retriever.epochs=8``, or the object that a folder recorded.
        source: What a message begins with.

    Raises:
        ConfigError: If a setting is unknown (the nearest known one is named), has the wrong type or is impossible.
    """
    try:
        given = OmegaConf.from_dotlist(list(settings)) if isinstance(settings, Sequence) else settings
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, schema=schema, recipe=source) from None
    assert isinstance(merged, DictConfig)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    config.check()
    return config
