"""Rows in the form of verl, turned into the fields of this project's rows.

    {"data_source": "query_ad_relevance", "prompt": [{"role": "user", "content": "..."}], "ability": "ads",
     "reward_model": {"style": "rule", "ground_truth": {"label": "Good"}},
     "extra_info": {"answer": "<think>...</think><Label>Good</Label>", "query": "..."}}

``prompt`` may be a text. The target is ``extra_info.answer``, or else ``ground_truth`` if that is a text; the task is
``ability`` where it is an ads task, or else ``data_source``. ``extra_info`` holds facts, and may hold id, group, label
and weight. A ``ground_truth`` that is no text is the fact of that name; one that is, with an answer given, the label.
The fields themselves are facts as well, as they are: rewards written for verl are given them.

Source: verl's documentation, "Prepare Data for Post-Training".
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import Fact, Role
from megatron_ads.tasks.answer_format import NOTHING
from megatron_ads.tasks.registry import TASKS

logger = get_logger(__name__)

VERL_FIELDS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
ROW_FIELDS = frozenset({"id", "weight", "group", "label"})
"""Of ``extra_info``: fields of the row, not facts."""


def from_verl(fields: Mapping[str, Any], *, needs_target: bool = True) -> dict[str, Any]:
    """Return the fields of a row in this project's form.

    Args:
        needs_target: False makes a row without an answer, which is a prompt alone, one whose target is its ground truth
            as JSON, or without that the word for nothing: reinforcement learning does not train on it.

    Raises:
        BadRowError: Naming the field that is unknown, of another type, or missing.
    """
    if unknown := sorted(fields.keys() - set(VERL_FIELDS)):
        known = ", ".join(sorted(VERL_FIELDS))
        raise BadRowError(BadRow.unknown_field, f"unknown field {unknown[0]!r}; known in verl's form: {known}.")
    extra, truth = object_in(fields, "extra_info"), object_in(fields, "reward_model").get("ground_truth")
    prompt, answer = fields.get("prompt"), extra.get("answer")
    target = _target(answer, truth, needed=needs_target)
    if isinstance(prompt, str):
        prompt = [{"role": str(Role.user), "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise BadRowError(BadRow.wrong_type, f"prompt is {prompt!r:.80}; it must be text, or messages.")
    prompt = [*prompt, {"role": str(Role.assistant), "content": target}]
    ability = text_in(fields, "ability", "")
    task = ability if ability in TASKS else text_in(fields, "data_source", "chat")
    left_out = {*ROW_FIELDS, "answer"}  # and nulls, which fill what other rows of a Parquet file have
    facts = {name: value for name, value in extra.items() if name not in left_out and value is not None}
    facts |= {name: fields[name] for name in VERL_FIELDS if name in fields and name != "prompt"}
    if truth is not None and not (isinstance(truth, str) and task in TASKS):
        facts[Fact.ground_truth] = truth
    label = {"label": truth} if isinstance(truth, str) and isinstance(answer, str) else {}
    given = {name: extra[name] for name in ROW_FIELDS & extra.keys() if extra[name] is not None}
    return {"task": task, "messages": prompt, "facts": facts} | label | given


def _target(answer: object, truth: object, *, needed: bool) -> str:
    if needed:
        said = truth if answer is None else answer
        if isinstance(said, str):
            return said
        message = "neither extra_info.answer nor reward_model.ground_truth is the target, a text."
        raise BadRowError(BadRow.no_target, message)
    texts = [value for value in (answer, truth) if isinstance(value, str) and value.strip()]
    if texts:
        return texts[0]
    if truth not in (None, ""):
        return json.dumps(truth, ensure_ascii=False, default=str)
    _tell_of_prompts()
    return NOTHING


@cache
def _tell_of_prompts() -> None:
    logger.warning("verl's rows without a true answer have the target %r: no job should be fine-tuned on it.", NOTHING)


def object_in(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a field that is an object, an empty one if it is missing."""
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise BadRowError(BadRow.wrong_type, f"{name} is {value!r:.80}; it must be an object.")
    return value


def text_in(fields: Mapping[str, Any], name: str, default: str) -> str:
    """Return a field that is a text or a whole number, as text."""
    value = fields.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(BadRow.wrong_type, f"{name} is {value!r}; it must be text.")
    return value
