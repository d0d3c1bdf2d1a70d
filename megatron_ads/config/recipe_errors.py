"""Turn what Hydra and OmegaConf say about a broken recipe into one sentence with the setting, value and remedy.

The old names of settings are refused with the new ones, and what older runs wrote down stays readable.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from megatron_ads.errors import ConfigError

_REPLACED_SECTION = re.compile(r"is not a subclass of (?P<section>\w+)\. value: (?P<value>.*)")
_INDEX = re.compile(r"\[\d*\]")

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


def explain(error: BaseException, *, schema: type, recipe: str) -> ConfigError:
    """Return the ConfigError that stands for ``error``, raised while ``recipe`` was composed onto ``schema``."""
    for cause in _causes(error):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return ConfigError(f"{recipe}: {_explain_key(cause, schema)}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return ConfigError(f"{recipe}: {_explain_missing_file(error)}")
    for cause in _causes(error):
        if replaced := _REPLACED_SECTION.search(str(cause)):
            return ConfigError(f"{recipe}: {_explain_replaced_section(schema, replaced['section'], replaced['value'])}")
    return ConfigError(f"{recipe}: {' '.join(str(error).split())}")


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _explain_key(error: OmegaConfBaseException, schema: type) -> str:
    path = _full_path(error, schema)
    expected = field_type(schema, path)
    if expected is None:
        return unknown_key(schema, path)
    reason = " ".join(str(error.msg).split(" full_key:")[0].split())
    return f"{path} must be {describe_type(expected)}: {reason.rstrip('.')}."


def _full_path(error: OmegaConfBaseException, schema: type) -> str:
    """Return the setting's path from the top: inside a list item, and its sections, OmegaConf counts from the item."""
    path = str(error.full_key)
    section = path.rpartition(".")[0]
    for name, kind in _sections(schema):
        if name.endswith("[]") and not path.startswith(name.removesuffix("[]")):
            holder = field_type(kind, section) if section else kind
            if holder is not None and error.object_type is (typing.get_origin(holder) or holder):
                return f"{name}.{path}"
    return path


def _sections(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the path of every section at any depth, with its class; ``data.sources[]`` is each item of a list."""
    for name, hint in typing.get_type_hints(schema).items():
        path, kind = prefix + name, hint
        if typing.get_origin(hint) is list:
            path, kind = f"{path}[]", typing.get_args(hint)[0]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield path, kind
            yield from _sections(kind, f"{path}.")


def _explain_missing_file(error: MissingConfigException) -> str:
    wanted = str(error.missing_cfg_file)
    options = [str(option) for option in error.options or ()]
    near = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], options, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"there is no recipe part {wanted!r}. {hint}Available: {', '.join(options) or 'none'}."


def _explain_replaced_section(schema: type, section: str, value: str) -> str:
    """Return the sentence for a value where a whole section belongs; OmegaConf then knows only the section's class."""
    for path, kind in _sections(schema):
        if kind.__name__ == section:
            return f"{path} is {value}; it must be {describe_type(kind)}."
    return f"{value} stands where a {section} belongs."


def unknown_key(schema: type, path: str) -> str:
    """Return the sentence for a key that the schema lacks, with its new name or the nearest one that it has."""
    if new := RENAMED.get(_INDEX.sub("[]", path)):
        return f"{path} is called {new}."
    section, _, key = path.rpartition(".")
    siblings = field_names(schema, section)
    if not siblings:
        return unknown_key(schema, section) if section else f"{path} is not a setting."
    prefix = f"{section}." if section else ""
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    elsewhere = [name for name in all_paths(schema) if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"{path} is not a setting; did you mean {elsewhere[0]}?"
    if near:
        return f"{path} is not a setting; did you mean {prefix}{near[0]}?"
    return f"{path} is not a setting. Known: {', '.join(prefix + name for name in siblings)}."


def all_paths(schema: type, prefix: str = "") -> list[str]:
    """Return the dotted path of every leaf setting of a schema."""
    paths: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            paths += all_paths(hint, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def field_names(schema: type, path: str) -> list[str]:
    """Return the settings directly below ``path``; empty where ``path`` is no section."""
    section = schema if not path else field_type(schema, path)
    if isinstance(section, type) and dataclasses.is_dataclass(section):
        return [field.name for field in dataclasses.fields(section)]
    return []


def field_type(schema: type, path: str) -> Any | None:
    """Return the annotation at a dotted path such as ``data.sources[0].kind``; None where there is none."""
    current: Any = schema
    for part in path.split("."):
        if typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
            continue
        hints = typing.get_type_hints(current) if dataclasses.is_dataclass(current) else {}
        name = _INDEX.sub("", part)
        if name not in hints:
            return None
        current = hints[name]
        for _ in _INDEX.findall(part):
            current = (typing.get_args(current) or (None,))[0]
    return current


def describe_type(annotation: Any) -> str:
    """Return an annotation in words: ``int | None`` -> ``a whole number or null``."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if annotation in words:
        return words[annotation]
    if isinstance(annotation, types.UnionType):
        return " or ".join(describe_type(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"a list, each item {describe_type(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        value = typing.get_args(annotation)[1]
        return "a mapping" if value is typing.Any else f"a mapping, each value {describe_type(value)}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(member.name for member in annotation)}"
    return f"a section with {', '.join(field.name for field in dataclasses.fields(annotation))}"
