"""The ``config.json`` of models as they were published, by a short name."""

import json
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError

_FOLDER = Path(__file__).parent / "published"
_OWNERS = ("deepseek-ai", "moonshotai")


def published_models() -> tuple[str, ...]:
    """Return the names of the models whose published ``config.json`` is shipped."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def published_name(model: str) -> str | None:
    """Return the short name of a model that is given by it or by its name on the hub, with or without its owner.

    ``deepseek-ai/DeepSeek-R1`` is ``deepseek_r1``. None: no such model is shipped.
    """
    owner, slash, name = model.rpartition("/")
    short = name.lower().replace("-", "_")
    return short if short in published_models() and (not slash or owner in _OWNERS) else None


def published_file(name: str) -> Path:
    """Return the ``config.json`` of a model.

    Raises:
        ConfigError: If no model of that name is shipped.
    """
    if name not in published_models():
        raise ConfigError(f"There is no published model {name!r}; there are {', '.join(published_models())}.")
    return _FOLDER / f"{name}.json"


def published_config(name: str) -> dict[str, Any]:
    """Return the content of :func:`published_file`."""
    config: dict[str, Any] = json.loads(published_file(name).read_text(encoding="utf-8"))
    return config
