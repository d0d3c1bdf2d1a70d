"""Rows in the form of verl, turned into the fields of this project's rows.

    {"data_source": "query_ad_relevance", "prompt": [{"role": "user", "content": "..."}], "ability": "ads",
     "reward_model": {"style": "rule", "ground_truth": {"label": "Good"}},
     "extra_info": {"answer": "<think>...</think><Label>Good</Label>", "query": "..."}}

``prompt`` may be a text. The target is ``extra_info.answer``, or else ``ground_truth`` if that is a text, with the form
of its task around it where it is the label or name alone; the task is ``ability`` where it is an ads task, or else
``data_source``. ``extra_info`` holds facts, and may hold id, group, label and weight; what is of another type than
these is not read as one. A ``ground_truth`` that is no text is the fact of that name; one that is, and is not the
target, the label. The fields themselves are facts as well, as they are: rewards written for verl are given them.

Source: verl's documentation, "Prepare Data for Post-Training".
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_ads.data.bad_rows import BadRow, BadRowError
from megatron_ads.observability.log import get_logger
from megatron_ads.rows import Fact, Role, wrong_fact
from megatron_ads.tasks.answer_format import NOTHING, ReadFailure, element
from megatron_ads.tasks.next_advertiser import RANKING_TASK, ranking_answer
from megatron_ads.tasks.registry import TASKS

logger = get_logger(__name__)

VERL_FIELDS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "group": (str, int),
    "label": (str,),
    "weight": (int, float),
}
"""Of ``extra_info``: fields of the row, not facts, and their types."""


def from_verl(fields: Mapping[str, Any], *, needs_target: bool = True) -> dict[str, Any]:
    """Return the fields of a row in this project's form.

    Args:
        needs_target: False makes a row without an answer, which is a prompt alone, one whose target is its ground truth
            as JSON, or without that the word for nothing: reinforcement learning does not train on it. An ads task's
            has the fact ``prompt_alone``.

    Raises:
        BadRowError: Naming the field that is unknown, of another type, or missing.
    """
    if unknown := sorted(fields.keys() - set(VERL_FIELDS)):
        known = ", ".join(sorted(VERL_FIELDS))
        raise BadRowError(BadRow.unknown_field, f"unknown field {unknown[0]!r}; known in verl's form: {known}.")
    extra, truth = object_in(fields, "extra_info"), object_in(fields, "reward_model").get("ground_truth")
    prompt, ability = fields.get("prompt"), text_in(fields, "ability", "")
    task = ability if ability in TASKS else text_in(fields, "data_source", "chat")
    if task in TASKS and type(truth) is int:  # a score
        truth = str(truth)
    answer, named = _text(extra.get("answer")), _text(truth)
    target = answer or (named and _as_answer(named, task))
    if isinstance(prompt, str):
        prompt = [{"role": str(Role.user), "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise BadRowError(BadRow.wrong_type, f"prompt is {prompt!r:.80}; it must be text, or messages.")
    facts = _facts_in(extra, task)
    facts |= {name: fields[name] for name in VERL_FIELDS if name in fields and name != "prompt"}
    if truth is not None and not (isinstance(truth, str) and task in TASKS):
        facts[Fact.ground_truth] = truth
    if target is None:
        target = _stand_in(truth, needed=needs_target)
        facts |= {Fact.prompt_alone: True} if task in TASKS else {}
    prompt = [*prompt, {"role": str(Role.assistant), "content": target}]
    label = {"label": named} if named and (answer or named != target) else {}
    return {"task": task, "messages": prompt, "facts": facts} | label | _row_fields(extra)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _as_answer(truth: str, task: str) -> str:
    """Return a ground truth as an answer: one that is the label or name alone gets the form of its task around it."""
    if task not in TASKS or not isinstance(TASKS[task].parse(truth, reasoning_required=False), ReadFailure):
        return truth
    if task == RANKING_TASK:
        return ranking_answer([truth], [])
    tag = TASKS[task].label_in
    return truth if tag is None or f"</{tag}>" in truth else element(tag, truth)


def _stand_in(truth: object, *, needed: bool) -> str:
    """Return what is in the place of an answer.

    Raises:
        BadRowError: If one is needed.
    """
    if needed:
        message = "neither extra_info.answer nor reward_model.ground_truth is the target, a text; kind verl needs none."
        raise BadRowError(BadRow.no_target, message)
    _tell_of_prompts()
    if truth is None or isinstance(truth, str):
        return NOTHING
    return json.dumps(truth, ensure_ascii=False, default=str)


def _facts_in(extra: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return what ``extra_info`` says; of an ads task without what only has the name of a fact."""
    left_out = {*ROW_FIELDS, "answer"}  # and nulls, which fill what other rows of a Parquet file have
    facts = {name: value for name, value in extra.items() if name not in left_out and value is not None}
    return {name: value for name, value in facts.items() if task not in TASKS or wrong_fact({name: value}) is None}


def _row_fields(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``extra_info`` says of the row; what only has the name of such a field is something of the data's."""
    return {name: extra[name] for name, types in ROW_FIELDS.items() if type(extra.get(name)) in types}


@cache
def _tell_of_prompts() -> None:
    logger.warning(
        "verl's rows without an answer have the target %r, or their ground truth as JSON: no job should be fine-tuned "
        "on them.",
        NOTHING,
    )


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
