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
from megatron_ads.config import rl
from megatron_ads.config.model import LayoutConfig
from megatron_ads.config.recipes import load_job, load_recipe, recipe_yaml
from megatron_ads.config.run import SftConfig, validate
from megatron_ads.demo_model import CONFIGS, Preset
from megatron_ads.launching.processes import JobError, MetricsFollower, run_job
from megatron_ads.quickstart.stages import Stage
from megatron_ads.runtime.health.rank_record import ExitStatus

RECIPE, RL_RECIPE = "sft/quickstart", "rl/quickstart"


@dataclass(frozen=True, slots=True)
class Start:
    """A checkpoint that the quickstart can begin with, and what the recipes need for it."""

    family: str
    settings: tuple[str, ...] = ()


_WITHOUT_EXPERTS = ("layout.tp=2", "layout.ep=1", "layout.first_stage_layers=null", "model.mtp_loss_weight=0")
STARTS: Mapping[Preset, Start] = {
    Preset.tiny: Start("DeepSeek-V3-family"),
    Preset.dense: Start("Qwen2", _WITHOUT_EXPERTS),
}


class QuickstartFolder:
    """Paths below ``root``, which ``described`` explains; nothing is created here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.start, self.start_bf16, self.shards = root / "model", root / "model-bf16", root / "shards"
        self.run, self.trained_shards = root / "run", root / "run" / "export"
        self.tuned, self.tuned_fp8 = root / "tuned", root / "tuned-fp8"
        self.tuned_fp8_bf16 = root / "tuned-fp8-bf16"
        self.rl_run = root / "rl"
        self.report_html, self.report_json = root / "report.html", root / "report.json"

    def answers(self, model: str) -> Path:
        """What a model wrote for every held-out row: ``before``, ``after``, ``after-fp8`` or ``after-rl``."""
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
    family: str
    """Of the checkpoint that it begins with."""


class _StageBuilder:
    """Makes stages that do what a command line does, and keeps the command lines."""

    def __init__(self, folder: QuickstartFolder, held_out: Sequence[str], data: Mapping[str, Any]) -> None:
        """``held_out`` are the words that say which rows an evaluation is of, ``data`` all settings of these."""
        self.commands: dict[str, list[str]] = {}
        self._folder, self._held_out, self._data = folder, held_out, data

    def stage(self, name: str, title: str, words: Sequence[object], outputs: Sequence[Path] = (), **more: Any) -> Stage:
        command = self.commands[name] = ["megatron-ads", *map(str, words)]
        work: dict[str, Any] = {"run": lambda: _run_here(command, self._folder.log(name)), "settings": {}}
        return Stage(name=name, title=title, outputs=outputs, **work | more)

    def convert(
        self, name: str, title: str, after: str, source: Path, target: Path, *options: object, to: str = "to-hf",
        **more: Any,
    ) -> Stage:  # fmt: skip
        return self.stage(name, title, ["convert", to, source, target, *options], [target], after=[after], **more)

    def judge(self, name: str, title: str, after: str, model: Path, when: str) -> Stage:
        answers = self._folder.answers(when)
        words = ["evaluate", "--model", model, "--answers", answers, "--merge-sources", "--json", *self._held_out]
        return self.stage(name, title, words, [answers], settings=self._data, after=[after])


def make_plan(
    folder: QuickstartFolder,
    *,
    overrides: Sequence[str],
    identity: Mapping[str, Any],
    rl_steps: int | None = None,
    preset: Preset = Preset.tiny,
) -> QuickstartPlan:
    """Lay out the stages.

    Args:
        folder: Where everything goes.
        overrides: Settings that replace the recipe's, ``train.max_steps=100``.
        identity: JSON values outside the recipe that decide the result: code and data digests, versions.
        rl_steps: Steps of reinforcement learning afterwards; None is none.
        preset: Which checkpoint it begins with, one of ``STARTS``.
    """
    start = STARTS[preset]
    overrides = [*start.settings, *overrides]
    paths = [f"model.load={folder.shards}", f"log.dir={folder.run}"]
    config = load_recipe(RECIPE, [*overrides, *paths])
    validate(config, config.layout.fewest_ranks(), shape_from_config(CONFIGS[preset]))
    sizes = _sizes(config.layout) if _about(overrides, "layout") else ["--recipe", RECIPE]
    fp8 = ("--dtype", "fp8", "--reference", folder.start)
    build = _StageBuilder(folder, ["--recipe", RECIPE, *_about(overrides, "data")], asdict(config.data))
    stage, convert, judge, commands = build.stage, build.convert, build.judge, build.commands
    stages: tuple[Stage, ...] = (
        stage("demo-model", f"make a small random {start.family} checkpoint in FP8",
              ["demo-model", folder.start, "--preset", preset, "--fp8"], [folder.start],
              settings={**identity, "preset": preset}),
        convert("to-shards", "convert it to shards, one file per rank", "demo-model", folder.start, folder.shards,
                *sizes, to="to-megatron", settings=asdict(config.layout)),
        convert("to-bf16", "write it in BF16 as well, for transformers on a CPU", "to-shards", folder.shards,
                folder.start_bf16, "--dtype", "bf16"),
        judge("evaluate-before", "let it judge the held-out rows", "to-bf16", folder.start_bf16, "before"),
        stage("train", f"fine-tune it for {config.train.max_steps} steps",
              ["train", "--recipe", RECIPE, *overrides, *paths], [folder.run], after=["to-shards"], resumable=True,
              settings={"recipe": recipe_yaml(config)},
              run=lambda: _train(commands["train"], folder, folder.run, config.train.max_steps)),
        convert("export", "export it to Hugging Face format", "train", folder.trained_shards, folder.tuned),
        stage("compare-logits", "compare the export in transformers with the Megatron model",
              ["compare-logits", folder.trained_shards, folder.tuned, "--json"], after=["export"],
              run=lambda: _compare_logits(commands["compare-logits"], folder.log("compare-logits"))),
        judge("evaluate-after", "let the export judge the held-out rows", "export", folder.tuned, "after"),
        convert("export-fp8", "export it in FP8 as well", "train", folder.trained_shards, folder.tuned_fp8, *fp8),
        convert("read-fp8", "read the FP8 export back", "export-fp8", folder.tuned_fp8, folder.tuned_fp8_bf16,
                "--dtype", "bf16"),
        stage("verify-fp8", "verify that both hold the same values",
              ["verify", folder.tuned_fp8, folder.tuned_fp8_bf16, "--json"], after=["read-fp8"]),
        judge("evaluate-fp8", "let the FP8 export judge the held-out rows", "read-fp8", folder.tuned_fp8_bf16,
              "after-fp8"),
    )  # fmt: skip
    if rl_steps is not None:
        rows = [f"data.validation_rows={config.data.validation_rows}", *_about(overrides, "data")]
        stages += _rl_stages(build, folder, preset, [*_about(overrides, "layout"), *rows], rl_steps)
    return QuickstartPlan(stages, commands, config, start.family)


def _rl_stages(
    build: _StageBuilder, folder: QuickstartFolder, preset: Preset, settings: Sequence[str], steps: int
) -> tuple[Stage, ...]:
    """Continue with the fine-tuned shards; the rows held out must be the same, or they would be trained on."""
    settings = [
        *settings, f"train.max_steps={steps}", f"train.evaluate_every={steps}",
        f"model.load={folder.trained_shards}", f"log.dir={folder.rl_run}",
    ]  # fmt: skip
    config = load_job(RL_RECIPE, settings)
    assert isinstance(config, rl.RlConfig)
    rl.validate(config, config.layout.fewest_ranks(), shape_from_config(CONFIGS[preset]))
    command = ["train", "--recipe", RL_RECIPE, *settings]
    return (
        build.stage("train-rl", f"reinforce it for {steps} steps", command, [folder.rl_run], after=["train"],
                    resumable=True, settings={"recipe": recipe_yaml(config)},
                    run=lambda: _train(build.commands["train-rl"], folder, folder.rl_run, steps)),
        build.judge("evaluate-rl", "let it judge the held-out rows", "train-rl", folder.rl_run / "export", "after-rl"),
    )  # fmt: skip


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
    lines = log.read_text(encoding="utf-8").splitlines()
    return next((json.loads(line) for line in reversed(lines) if line.startswith("{")), {})


def _train(command: Sequence[str], folder: QuickstartFolder, run: Path, steps: int) -> Mapping[str, Any]:
    arguments = [sys.executable, "-m", "megatron_ads.cli", *command[1:]]
    name, log = ("reinforcement", "train-rl") if run == folder.rl_run else ("fine-tuning", "train")
    with MetricsFollower(run, steps, name) as follow:
        accepted = (ExitStatus.DONE, ExitStatus.STOPPED)
        status = run_job(arguments, folder.log(log), accepted=accepted, while_running=follow)
    if status == ExitStatus.STOPPED:
        raise JobError(f"the {name} was asked to stop, and saved; start again to continue.")
    return {}
