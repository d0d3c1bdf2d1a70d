"""The stages of the rehearsal: checkpoint -> shards -> fine-tuning -> export -> the same logits? -> better at the task?

Every stage does what one command line does; that command is printed, so that each step can be repeated by hand.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ads.config import SftConfig, load_recipe, recipe_yaml
from megatron_ads.observability.metrics import METRICS_FILE, read_metrics
from megatron_ads.observability.progress import Progress
from megatron_ads.rehearsal.folder import RehearsalFolder
from megatron_ads.rehearsal.job import JobError, follow_metrics, run_job
from megatron_ads.rehearsal.stages import Stage

RECIPE = "sft/quickstart"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be done, and with which settings."""

    stages: tuple[Stage, ...]
    commands: dict[str, list[str]]
    """The command line of each stage, for people: ``megatron-ads convert ...``."""
    config: SftConfig
    """The resolved recipe of the fine-tuning."""


def make_plan(folder: RehearsalFolder, *, overrides: Sequence[str], identity: Mapping[str, Any]) -> Plan:
    """Lay out the stages.

    Args:
        folder: Where everything goes.
        overrides: Settings that replace the recipe's, ``train.steps=100``.
        identity: JSON values outside the recipe that decide the result: code revision, data fingerprint.

    Raises:
        ConfigError: If the recipe with these settings does not compose.
    """
    paths = [f"model.load={folder.shards}", f"log.dir={folder.run}"]
    config = load_recipe(RECIPE, [*overrides, *paths])
    commands = _commands(folder, overrides, paths)
    data, layout = asdict(config.data), asdict(config.layout)

    def stage(name: str, title: str, outputs: Sequence[Path], **more: Any) -> Stage:
        work: dict[str, Any] = {"run": lambda: _run_here(commands[name], folder.log(name)), "settings": {}} | more
        return Stage(name=name, title=title, outputs=outputs, **work)

    stages = (
        stage("demo-model", "make a small random DeepSeek-V3-family checkpoint", [folder.start], settings=identity),
        stage(
            "evaluate-before", "ask it the held-out questions", [folder.answers("before")],
            settings=data, after=["demo-model"],
        ),
        stage(
            "convert", "convert it to shards, one file per rank", [folder.shards],
            settings=layout, after=["demo-model"],
        ),
        stage(
            "train", f"fine-tune it for {config.train.steps} steps", [folder.run],
            settings={"recipe": recipe_yaml(config)}, after=["convert"], resumable=True,
            run=lambda: _train(commands["train"], folder, config),
        ),
        stage("export", "export it to Hugging Face format", [folder.tuned], after=["train"]),
        stage(
            "compare-logits", "compare the export in transformers with the Megatron model", [], after=["export"],
            run=lambda: _compare_logits(commands["compare-logits"], folder.log("compare-logits")),
        ),
        stage(
            "evaluate-after", "ask it the held-out questions again", [folder.answers("after")],
            settings=data, after=["export"],
        ),
    )  # fmt: skip
    return Plan(stages, commands, config)


def _commands(folder: RehearsalFolder, overrides: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    def evaluate(when: str, model: Path) -> list[str]:
        answers = ["--answers", str(folder.answers(when))]
        return ["evaluate", "--model", str(model), "--recipe", RECIPE, *answers, "--json", *_about(overrides, "data")]

    commands = {
        "demo-model": ["demo-model", str(folder.start)],
        "evaluate-before": evaluate("before", folder.start),
        "convert": ["convert", "to-megatron", str(folder.start), str(folder.shards), "--recipe", RECIPE, "--json"],
        "train": ["train", "--recipe", RECIPE, *overrides, *paths],
        "export": ["convert", "to-hf", str(folder.trained_shards), str(folder.tuned), "--json"],
        "compare-logits": ["compare-logits", str(folder.trained_shards), str(folder.tuned), "--json"],
        "evaluate-after": evaluate("after", folder.tuned),
    }
    return {name: ["megatron-ads", *words] for name, words in commands.items()}


def _about(overrides: Sequence[str], section: str) -> list[str]:
    return [override for override in overrides if override.lstrip("+~").partition("=")[0].split(".")[0] == section]


def _run_here(command: Sequence[str], log: Path) -> Mapping[str, Any]:
    """Run a command in this process, what it prints to stdout going to ``log``; return the JSON object it printed."""
    from megatron_ads.cli import build_parser  # it imports this module when `quickstart` is asked for

    args = build_parser(command[1]).parse_args(command[1:])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        args.run(args)
    return _last_json(log)


def _compare_logits(command: Sequence[str], log: Path) -> Mapping[str, Any]:
    """Run the comparison in a process of its own, which Megatron-Core's patches and groups end with."""
    log.unlink(missing_ok=True)
    status = run_job([sys.executable, "-m", "megatron_ads.cli", *command[1:]], log, accepted=(0, 1))
    result = _last_json(log)
    if not result:
        raise JobError(f"the comparison ended with status {status} and without a result; its log is {log}.")
    return result


def _last_json(log: Path) -> Mapping[str, Any]:
    """Return the last line of ``log`` that is a JSON object; nothing if there is none."""
    for line in reversed(log.read_text(encoding="utf-8").splitlines()):
        if line.startswith("{"):
            values: dict[str, Any] = json.loads(line)
            return values
    return {}


def _train(command: Sequence[str], folder: RehearsalFolder, config: SftConfig) -> Mapping[str, Any]:
    done = _steps_done(folder.run)
    with Progress(config.train.steps, done, "fine-tuning") as progress:
        follow = follow_metrics(folder.run, progress, done)
        run_job([sys.executable, "-m", "megatron_ads.cli", *command[1:]], folder.log("train"), while_running=follow)
    return {}


def _steps_done(run: Path) -> int:
    rows = read_metrics(run) if (run / METRICS_FILE).exists() else []
    return int(rows[-1]["step"]) if rows else 0
