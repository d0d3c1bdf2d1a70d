"""A reward of one's own, ``module:function`` or ``path/to/file.py:function``: found, called as its parameters tell.

    def f(prompts, completions, **columns)          TRL's form: lists over all answers that are scored together
    def f(prompt, completions, **columns)           the answers to one prompt; columns of its row
    def f(prompt, completion, **columns)            one answer
    def compute_score(data_source, solution_str, ground_truth, extra_info)      verl's form: one answer

As in TRL where prompts are conversations, a prompt is a list of messages, and a completion one with a single message:
``[{"role": "assistant", "content": TEXT}]``; verl's ``solution_str`` is a text. Columns are the facts of the rows, with
id, task, label, ``group`` (number of the prompt) and TRL's ``completion_ids``; a row that lacks a fact has None.
Settings of the recipe are further keyword arguments. A function without ``**`` is given what it names. It returns a
number, or None for "not my task", for each answer; of what verl's functions return, ``score`` or the first value
counts.

Sources: TRL's ``GRPOTrainer(reward_funcs=...)``; verl's ``NaiveRewardManager``, verl/workers/reward_manager/naive.py.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ads.errors import ConfigError, one_line
from megatron_ads.rewards.reward import Outcome, Unit, outcomes_of
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow, Fact


def require_there(name: str, section: str) -> None:
    """Refuse a function whose file or package does not exist; nothing of it is run.

    Raises:
        ConfigError: Naming it.
    """
    where, _, function = name.rpartition(":")
    package = where.partition(".")[0]
    try:
        there = Path(where).is_file() if where.endswith(".py") else importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        there = False
    if not there or not function.isidentifier():
        raise ConfigError(
            f"{section}.name is {name!r}, and there is no such file or module. Give module:function of something that "
            "can be imported here, or path/to/file.py:function."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnFunction:
    """A function that was found."""

    function: Callable[..., Any]
    unit: Unit
    accepts: frozenset[str] | None
    """Its parameters; None: any."""
    needs: tuple[str, ...]
    """Those that have no default."""
    settings: Mapping[str, Any]
    is_verl: bool

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """Return what it makes of one unit of rollouts; raise what it raises.

        Raises:
            LookupError: If it needs a column that the rows do not have.
        """
        arguments = self._arguments(rollouts)
        if missing := [name for name in self.needs if name not in arguments and name not in self.settings]:
            raise LookupError(f"it needs {missing[0]}, and the rows have {', '.join(sorted(arguments))}")
        if self.accepts is not None:
            arguments = {name: value for name, value in arguments.items() if name in self.accepts}
        found = self.function(**arguments, **self.settings)
        if self.is_verl:
            found = (
                found["score"] if isinstance(found, dict) else found[0] if isinstance(found, list | tuple) else found
            )
        return outcomes_of([found] if self.unit is Unit.sample else list(found), len(rollouts))

    def _arguments(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        first = rollouts[0]
        if self.is_verl:
            return _as_verl(first.row, first.text)
        ids = [list(rollout.answer_tokens) for rollout in rollouts]
        completions = [_completion(rollout.text) for rollout in rollouts]
        if self.unit is Unit.sample:
            sample = {"completion": completions[0], "completion_ids": ids[0]}
            return {**_columns(first), "prompt": _prompt(first.row), **sample}
        if self.unit is Unit.group:
            return {**_columns(first), "prompt": _prompt(first.row), "completions": completions, "completion_ids": ids}
        rows = [_columns(rollout) for rollout in rollouts]
        columns = {name: [row.get(name) for row in rows] for name in {name: None for row in rows for name in row}}
        prompts = [_prompt(rollout.row) for rollout in rollouts]
        return {**columns, "prompts": prompts, "completions": completions, "completion_ids": ids}


def load(name: str, settings: Mapping[str, Any]) -> OwnFunction:
    """Import a function and see what it takes.

    Raises:
        ConfigError: If it cannot be imported, takes none of the forms above, or not these settings.
    """
    where, _, function_name = name.rpartition(":")
    try:
        function = getattr(_module(where), function_name)
        parameters = inspect.signature(function).parameters
    except (Exception, SystemExit) as error:  # importing runs what somebody else wrote
        raise ConfigError(
            f"The reward {name} cannot be imported ({type(error).__name__}: {one_line(error)}). Correct its name or "
            "its code."
        ) from error
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if not open_ended and (unknown := sorted(settings.keys() - parameters.keys())):
        raise ConfigError(f"The reward {name} has no parameter {unknown[0]!r}, which its settings name.")
    return OwnFunction(
        function=function,
        unit=_unit(name, parameters),
        needs=tuple(name for name, each in parameters.items() if each.default is each.empty and each.kind in _NAMED),
        accepts=None if open_ended and "solution_str" not in parameters else frozenset(parameters),
        settings=settings,
        is_verl="solution_str" in parameters,
    )


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    sys.path.append(str(path.parent))  # for what it imports from beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "ends in .py"
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unit(name: str, parameters: Mapping[str, Any]) -> Unit:
    if "solution_str" in parameters or "completion" in parameters:
        return Unit.sample
    if "completions" in parameters:
        return Unit.group if "prompt" in parameters else Unit.batch
    raise ConfigError(
        f"The reward {name} takes ({', '.join(parameters)}). It must take completions, completion or solution_str, as "
        "keyword arguments."
    )


def _prompt(row: ChatRow) -> list[dict[str, Any]]:
    return [message.as_dict() for message in row.prompt]


def _completion(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _columns(rollout: Rollout) -> dict[str, Any]:
    row = rollout.row
    facts = {str(name): value for name, value in row.facts.items()}
    return {**facts, "id": row.id, "task": row.task, "label": row.label, "group": rollout.group}


def _as_verl(row: ChatRow, text: str) -> dict[str, Any]:
    """Return verl's arguments: the fields of a row in verl's form unchanged, of another what says the same."""
    facts: dict[str, Any] = {str(name): value for name, value in row.facts.items()}
    if "data_source" in facts:
        truth, extra = (facts.get("reward_model") or {}).get("ground_truth"), facts.get("extra_info", {})
    else:
        truth = facts.pop(Fact.ground_truth, row.label)
        extra = {**facts, "id": row.id, "label": row.label}
    source = facts.get("data_source", row.task)
    return {"data_source": source, "solution_str": text, "ground_truth": truth, "extra_info": extra}
