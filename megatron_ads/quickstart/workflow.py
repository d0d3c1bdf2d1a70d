"""The stages of the quickstart: checkpoint -> shards -> fine-tuning -> export -> same logits? -> better at the task?

Every stage does what one command line does; that command is printed, so that each step can be repeated by hand.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ads.architecture import shape_from_config
from megatron_ads.config.model import LayoutConfig
from megatron_ads.config.recipes import load_recipe, recipe_yaml
from megatron_ads.config.run import SftConfig, validate
from megatron_ads.demo_model import CONFIGS, Preset
from megatron_ads.launching.processes import JobError, MetricsFollower, run_job
from megatron_ads.quickstart.stages import Stage
from megatron_ads.runtime.health.rank_record import ExitStatus

RECIPE = "sft/quickstart"


class QuickstartFolder:
    """Paths below ``root``, which ``described`` explains; nothing is created here."""

    def __init__(self, root: Path) -> None:
        """Lay out the paths."""
        self.root = root
        self.start, self.start_bf16, self.shards = root / "model", root / "model-bf16", root / "shards"
        self.run, self.trained_shards = root / "run", root / "run" / "export"
        self.tuned, self.tuned_fp8 = root / "tuned", root / "tuned-fp8"
        self.tuned_fp8_bf16 = root / "tuned-fp8-bf16"
        self.report_html, self.report_json = root / "report.html", root / "report.json"

    def answers(self, model: str) -> Path:
        """What a model wrote for every held-out row: ``before``, ``after`` or ``after-fp8``."""
        return self.root / f"answers-{model}.jsonl"

    def log(self, stage: str) -> Path:
        """What one stage's processes printed."""
        return self.root / "logs" / f"{stage}.log"

    def described(self) -> dict[Path, str]:
        """Return what a user may look at, with a description each."""
        return {
            self.report_html: "report as a page",
            self.report_json: "report for programs",
            self.start: "random checkpoint it started from (Hugging Face, FP8)",
            self.shards: "the same as shards, one file per rank",
            self.start_bf16: "the same in BF16 for transformers",
            self.run: "metrics of every step (JSONL, TensorBoard) and training checkpoints",
            self.trained_shards: "fine-tuned weights as shards",
            self.tuned: "fine-tuned checkpoint (Hugging Face, FP32)",
            self.tuned_fp8: "fine-tuned checkpoint (Hugging Face, FP8)",
            self.tuned_fp8_bf16: "the FP8 one read back (Hugging Face, BF16)",
            self.answers("before"): "answers to the held-out rows before",
            self.answers("after"): "answers after",
            self.answers("after-fp8"): "answers after, from the FP8 checkpoint",
            self.root / "logs": "output of every stage",
        }


@dataclass(frozen=True, slots=True)
class QuickstartPlan:
    """What is going to be done, and with which settings."""

    stages: tuple[Stage, ...]
    commands: dict[str, list[str]]
    """The command line of each stage, as a user types it: ``megatron-ads convert ...``."""
    config: SftConfig
    """The resolved recipe of the fine-tuning."""


def make_plan(folder: QuickstartFolder, *, overrides: Sequence[str], identity: Mapping[str, Any]) -> QuickstartPlan:
    """Lay out the stages.

    Args:
        folder: Where everything goes.
        overrides: Settings that replace the recipe's, ``train.max_steps=100``.
        identity: JSON values outside the recipe that decide the result: code and data digests, versions.

    Raises:
        ConfigError: If the recipe with these settings does not compose, or cannot run.
    """
    paths = [f"model.load={folder.shards}", f"log.dir={folder.run}"]
    config = load_recipe(RECIPE, [*overrides, *paths])
    validate(config, config.layout.fewest_ranks(), shape_from_config(CONFIGS[Preset.tiny]))
    commands = _commands(folder, overrides, paths, config.layout)
    data, layout = asdict(config.data), asdict(config.layout)

    def stage(name: str, title: str, outputs: Sequence[Path], **more: Any) -> Stage:
        work: dict[str, Any] = {"run": lambda: _run_here(commands[name], folder.log(name)), "settings": {}}
        return Stage(name=name, title=title, outputs=outputs, **work | more)

    def judging(name: str, title: str, when: str, after: str) -> Stage:
        return stage(name, title, [folder.answers(when)], settings=data, after=[after])

    stages = (
        stage("demo-model", "make a small random DeepSeek-V3-family checkpoint in FP8", [folder.start],
              settings=identity),
        stage("to-shards", "convert it to shards, one file per rank", [folder.shards],
              settings=layout, after=["demo-model"]),
        stage("to-bf16", "write it in BF16 as well, for transformers on a CPU", [folder.start_bf16],
              after=["to-shards"]),
        judging("evaluate-before", "let it judge the held-out rows", "before", "to-bf16"),
        stage("train", f"fine-tune it for {config.train.max_steps} steps", [folder.run],
              settings={"recipe": recipe_yaml(config)}, after=["to-shards"], resumable=True,
              run=lambda: _train(commands["train"], folder, config)),
        stage("export", "export it to Hugging Face format", [folder.tuned], after=["train"]),
        stage("compare-logits", "compare the export in transformers with the Megatron model", [], after=["export"],
              run=lambda: _compare_logits(commands["compare-logits"], folder.log("compare-logits"))),
        judging("evaluate-after", "let the export judge the held-out rows", "after", "export"),
        stage("export-fp8", "export it in FP8 as well", [folder.tuned_fp8], after=["train"]),
        stage("read-fp8", "read the FP8 export back", [folder.tuned_fp8_bf16], after=["export-fp8"]),
        stage("verify-fp8", "verify that both hold the same values", [], after=["read-fp8"]),
        judging("evaluate-fp8", "let the FP8 export judge the held-out rows", "after-fp8", "read-fp8"),
    )  # fmt: skip
    return QuickstartPlan(stages, commands, config)


def _commands(
    folder: QuickstartFolder, overrides: Sequence[str], paths: Sequence[str], layout: LayoutConfig
) -> dict[str, list[str]]:
    def judge(model: Path, when: str) -> list[str]:
        files = ["--model", str(model), "--answers", str(folder.answers(when))]
        return ["evaluate", *files, "--json", "--recipe", RECIPE, *_about(overrides, "data")]

    def convert(direction: str, source: Path, target: Path, *options: str) -> list[str]:
        return ["convert", direction, str(source), str(target), *options]

    fp8 = ["--dtype", "fp8", "--reference", str(folder.start)]
    sizes = _sizes(layout) if _about(overrides, "layout") else ["--recipe", RECIPE]
    commands = {
        "demo-model": ["demo-model", str(folder.start), "--preset", Preset.tiny, "--fp8"],
        "to-shards": convert("to-megatron", folder.start, folder.shards, *sizes),
        "to-bf16": convert("to-hf", folder.shards, folder.start_bf16, "--dtype", "bf16"),
        "evaluate-before": judge(folder.start_bf16, "before"),
        "train": ["train", "--recipe", RECIPE, *overrides, *paths],
        "export": convert("to-hf", folder.trained_shards, folder.tuned),
        "compare-logits": ["compare-logits", str(folder.trained_shards), str(folder.tuned), "--json"],
        "evaluate-after": judge(folder.tuned, "after"),
        "export-fp8": convert("to-hf", folder.trained_shards, folder.tuned_fp8, *fp8),
        "read-fp8": convert("to-hf", folder.tuned_fp8, folder.tuned_fp8_bf16, "--dtype", "bf16"),
        "verify-fp8": ["verify", str(folder.tuned_fp8), str(folder.tuned_fp8_bf16), "--json"],
        "evaluate-fp8": judge(folder.tuned_fp8_bf16, "after-fp8"),
    }
    return {name: ["megatron-ads", *words] for name, words in commands.items()}


def _about(overrides: Sequence[str], section: str) -> list[str]:
    return [override for override in overrides if override.lstrip("+~").partition("=")[0].split(".")[0] == section]


def _sizes(layout: LayoutConfig) -> list[str]:
    """Return a layout as options of `convert to-megatron`."""
    default, words = LayoutConfig(), list[str]()
    for name in (field.name for field in fields(layout) if field.name != "cp"):
        if (value := getattr(layout, name)) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _run_here(command: Sequence[str], log: Path) -> Mapping[str, Any]:
    """Run a command in this process, what it prints to stdout going to ``log``; return the JSON object it printed.

    A status of 1, a check that found a difference, is in the object: the report shows it.
    """
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
    """Return the last line of ``log`` that is a JSON object; empty without one."""
    for line in reversed(log.read_text(encoding="utf-8").splitlines()):
        if line.startswith("{"):
            values: dict[str, Any] = json.loads(line)
            return values
    return {}


def _train(command: Sequence[str], folder: QuickstartFolder, config: SftConfig) -> Mapping[str, Any]:
    arguments = [sys.executable, "-m", "megatron_ads.cli", *command[1:]]
    with MetricsFollower(folder.run, config.train.max_steps, "fine-tuning") as follow:
        status = run_job(
            arguments, folder.log("train"), accepted=(ExitStatus.DONE, ExitStatus.STOPPED), while_running=follow
        )
    if status == ExitStatus.STOPPED:
        raise JobError("the fine-tuning was asked to stop, and saved; start again to continue.")
    return {}
