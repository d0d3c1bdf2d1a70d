"""Turn what Hydra and OmegaConf say about a broken recipe into one sentence with the setting, value and remedy.

The old names of settings are refused with the new ones, and what older runs wrote down stays readable.
"""

import dataclasses
import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from megatron_ads.errors import ConfigError

_REPLACED_SECTION = re.compile(r"is not a subclass of (?P<section>\w+)\. value: (?P<value>.*)")
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*)'")
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

    def renamed(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [renamed(item, f"{path}[]") for item in value]
        if not isinstance(value, dict):
            return value
        found = {}
        for key, inner in value.items():
            own = f"{path}.{key}" if path else key
            name = RENAMED.get(own, own).rpartition(".")[2]
            if name.isidentifier():  # one that is now part of another setting says nothing more
                found[name] = renamed(inner, own)
        return found

    settings: dict[str, Any] = renamed(recipe, "")
    return settings


def explain(error: BaseException, *, schema: type, recipe: str, kinds: Mapping[str, type] | None = None) -> ConfigError:
    """Return the ConfigError that stands for ``error``, raised while ``recipe`` was composed onto ``schema``.

    Args:
        kinds: The schemas of all kinds of job; what only another one has is named so.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return ConfigError(f"{recipe}: {_explain_key(cause, schema, kinds or {})}")
        if isinstance(cause, OverflowError) and (key := re.search(r"full_key: (\S+)", str(cause))):
            return ConfigError(f"{recipe}: {key[1]} is a whole number too large for a setting of this kind.")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return ConfigError(f"{recipe}: {_explain_missing_file(error)}")
    for cause in causes:
        ambiguous = _AMBIGUOUS.search(str(cause))  # which with a comma might be several values
        if override := ambiguous[1] if ambiguous else getattr(cause, "override", None):  # one that Hydra cannot parse
            return ConfigError(f"{recipe}: {_explain_override(override)}")
        if replaced := _REPLACED_SECTION.search(str(cause)):
            return ConfigError(f"{recipe}: {_explain_replaced_section(schema, replaced['section'], replaced['value'])}")
    return ConfigError(f"{recipe}: {' '.join(str(error).split()) or type(error).__name__}")


def _explain_key(error: OmegaConfBaseException, schema: type, kinds: Mapping[str, type]) -> str:
    path = _full_path(error, schema)
    expected = field_type(schema, path)
    if expected is None:
        return _unknown_key(schema, path, kinds)
    if "does not support deletion" in str(error.msg):
        return f"{path} cannot be removed; set it to another value, or to null."
    reason = " ".join(str(error.msg).split(" full_key:")[0].split())
    return f"{path} must be {_in_words(expected)}: {reason.rstrip('.')}."


def _full_path(error: OmegaConfBaseException, schema: type) -> str:
    """Return the setting's path from the top: inside a list item, and its sections, OmegaConf counts from the item."""
    path = str(error.full_key)
    section = path.rpartition(".")[0]
    for name, kind in _settings(schema):
        if _is_section(kind) and name.endswith("[]") and not path.startswith(name.removesuffix("[]")):
            holder = field_type(kind, section) if section else kind
            if holder is not None and error.object_type is (typing.get_origin(holder) or holder):
                return f"{name}.{path}"
    return path


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of every setting and section at any depth, with its type; ``data.sources[]`` is each list item."""
    for name, hint in typing.get_type_hints(schema).items():
        path, kind = prefix + name, hint
        if typing.get_origin(hint) is list:
            path, kind = f"{path}[]", typing.get_args(hint)[0]
        yield path, kind
        if _is_section(kind):
            yield from _settings(kind, f"{path}.")


def _explain_override(override: str) -> str:
    key, sign, value = override.partition("=")
    if not sign or not key:
        return f"{override} is not of the form KEY=VALUE."
    if _INDEX.search(key):
        whole = key[: key.index("[")].lstrip("+~")
        return f"{key} is one item of a list, which cannot be set alone; give the whole list, '{whole}=[...]'."
    if value.startswith(("[", "{")):
        return (
            f"{override} cannot be read. Close every bracket, and put texts with other signs than letters of English, "
            "digits and . / - _ in quotes: '[{kind: jsonl, path: \"/a=b.jsonl\"}]'."
        )
    quoted = shlex.quote('{}="{}"'.format(key, value.replace('"', '\\"')))
    home = " (~ is not replaced by your home folder)" if value.startswith("~") else ""
    return f"the value of {key} has signs that need quotes; write {quoted}{home}."


def _explain_missing_file(error: MissingConfigException) -> str:
    wanted = str(error.missing_cfg_file)
    options = [str(option) for option in error.options or ()]
    near = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], options, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"there is no recipe part {wanted!r}. {hint}Available: {', '.join(options) or 'none'}."


def _explain_replaced_section(schema: type, section: str, value: str) -> str:
    """Return the sentence for a value where a whole section belongs; OmegaConf then knows only the section's class."""
    for path, kind in _settings(schema):
        if _is_section(kind) and kind.__name__ == section:
            return f"{path} is {value}; it must be {_in_words(kind)}."
    return f"{value} is given where a {section} belongs."


def _unknown_key(schema: type, path: str, kinds: Mapping[str, type]) -> str:
    """Return the sentence for a key that the schema lacks, with its new name or the nearest one that it has."""
    if new := RENAMED.get(_INDEX.sub("[]", path)):
        return f"{path} is called {new}."
    section, _, key = path.rpartition(".")
    holder: Any = field_type(schema, section) if section else schema
    if not _is_section(holder):
        return _unknown_key(schema, section, kinds) if section else f"{path} is not a setting."
    siblings = [field.name for field in dataclasses.fields(holder)]
    prefix = f"{section}." if section else ""
    leaves = [
        name.removesuffix("[]") for name, kind in _settings(schema) if name.endswith("[]") or not _is_section(kind)
    ]
    elsewhere = [name for name in leaves if name.rpartition(".")[2] == key and "[]" not in name]
    if of := [kind for kind, other in kinds.items() if not section and field_type(other, key)]:
        hint = f"Did you mean {elsewhere[0]}?" if elsewhere else "Remove it, or take such a recipe."
        what = "section" if _is_section(field_type(kinds[of[0]], key)) else "setting"
        return f"{path} is a {what} of recipes of kind {' or '.join(of)}, and this is none. {hint}"
    near = [prefix + name for name in difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)]
    if found := elsewhere or near:
        return f"{path} is not a setting; did you mean {found[0]}?"
    return f"{path} is not a setting. Known: {', '.join(prefix + name for name in siblings)}."


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


def _in_words(annotation: Any) -> str:
    """Return an annotation in words: ``int | None`` -> ``a whole number or null``."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    words[Any] = "any value"
    if annotation in words:
        return words[annotation]
    if isinstance(annotation, types.UnionType):
        return " or ".join(_in_words(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"a list, each item {_in_words(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        value = typing.get_args(annotation)[1]
        return "a mapping" if value is typing.Any else f"a mapping, each value {_in_words(value)}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(member.name for member in annotation)}"
    return f"a section with {', '.join(field.name for field in dataclasses.fields(annotation))}"
