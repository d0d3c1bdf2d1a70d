"""Settings that were called otherwise: the old names are refused with the new ones, and old runs stay readable."""

from typing import Any

RENAMED = {
    "train.steps": "train.max_steps",
    "checkpoint.keep_last": "checkpoint.save_total_limit",
    "model.router_bias_update_rate": "model.expert_bias_update_rate",
    "model.router_bias": "model.expert_bias_update_rate (null keeps the bias as loaded)",
    "data.sources[].history.most_entries": "data.sources[].history.max_entries",
    "data.sources[].history.most_tokens": "data.sources[].history.max_tokens",
}
"""Path of each setting as it was called, and as it is called now."""


def current_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that an older run wrote down, under the names of today."""
    found: dict[str, Any] = _renamed(recipe, "")
    return found


def _renamed(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_renamed(item, f"{path}[]") for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        own = f"{path}.{key}" if path else key
        name = RENAMED.get(own, own).rpartition(".")[2]
        if name.isidentifier():  # one that is now part of another setting says nothing more
            found[name] = _renamed(inner, own)
    return found
