"""Published configs that tests start from: those the project ships, and those of ``fixtures/configs``."""

import json
from pathlib import Path
from typing import Any

from conversion.published_models import published_config, published_models

CONFIGS = Path(__file__).parent / "fixtures" / "configs"


def published(name: str, **changes: Any) -> dict[str, Any]:
    """Return a published config with fields replaced, or removed where the new value is ``...``."""
    shipped = name in published_models()
    config = published_config(name) if shipped else json.loads((CONFIGS / f"{name}.json").read_text())
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}
