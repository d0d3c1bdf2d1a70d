"""The parts of every release check, quick or full; ``full_parts.py`` has those that take longer."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from megatron_ads.demo_model import Preset
from megatron_ads.errors import ConfigError
from megatron_ads.regress.harness_tasks import local_files
from megatron_ads.regress.sandbox import require_sandbox
from parity_tests.release import results
from parity_tests.release.part import Findings, Part, Step
from parity_tests.release.request import Request

QUICK_TESTS = (
    "conversion", "launching/test_placement.py", "launching/test_attempts.py", "losses", "metrics", "models", "optim",
    "regress", "semantic_ids", "training/test_dense.py", "training/test_new_tokens.py", "test_imports.py",
)  # fmt: skip
"""What a quick check tests: weights and their way in and out, the arithmetic of a step, dense models, new tokens, the
benchmarks' gate. Four minutes on two cores."""
QUICK_QUESTIONS, FULL_QUESTIONS = 8, 100
"""Of each public benchmark. With a checkpoint of one's own a full check asks them all."""
_LAYOUTS = {
    "pp 2 x ep 2, one layer on stage 0": ("--pp", "2", "--ep", "2", "--first-stage-layers", "1"),
    "tp 2 x etp 2": ("--tp", "2", "--etp", "2"),
}
_DENSE_LAYOUTS = {"pp 2 x tp 2": ("--pp", "2", "--tp", "2"), "tp 2": ("--tp", "2")}
_ROWS = {True: 32, False: 256}
_FREE_MEMORY_SHARE = 0.8
_BENCHMARKS = ("gsm8k", "humaneval", "mmlu_stem")
_CLI = (sys.executable, "-m", "megatron_ads.cli")
_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
_MINUTE = 60.0


def parallel_pytest() -> tuple[str, ...]:
    """Return a command that runs tests with three workers for two cores, at most 8, as launch/test.sh does."""
    workers = min(8, (len(os.sched_getaffinity(0)) * 3 + 1) // 2)
    return (*_PYTEST, "-n", str(workers), "--dist", "worksteal")


def tests(request: Request) -> Part:
    """Return the part that runs the tests."""
    chosen = [f"tests/{name}" for name in QUICK_TESTS] if request.quick else ["tests"]
    report = request.out / "tests" / "report.xml"
    command = (*parallel_pytest(), f"--junitxml={report}", *chosen)
    others = f"all tests but {', '.join(chosen)}: --quick leaves them out; ./launch/test.sh and test_slow.sh run all"
    return Part(
        name="tests",
        title="every piece does what it says",
        steps=(Step("pytest", command, (30 if request.quick else 180) * _MINUTE),),
        read=lambda folder: results.of_junit(folder / "report.xml"),
        left_out=(others,) if request.quick else (),
    )


def ladder(request: Request) -> Part:
    """Return the part that climbs the parity ladder on small models."""
    folder = request.out / "parity"
    command = (*parallel_pytest(), f"--junitxml={folder / 'report.xml'}", "parity_tests")

    def read(folder: Path) -> Findings:
        rungs = results.of_junit(folder / "report.xml", results.rung_of)
        return Findings([*rungs.figures, *results.of_recorded_figures(folder / "figures.jsonl")], rungs.left_out)

    return Part(
        name="parity",
        title="the trainer computes what transformers computes",
        steps=(Step("pytest", command, (30 if request.quick else 120) * _MINUTE),),
        read=read,
        environment={"PARITY_FIGURES": str(folder / "figures.jsonl")},
        left_out=("rung 10 (61 layers on 31 processes): --quick leaves it out",) if request.quick else (),
    )


def checkpoint_parity(request: Request) -> Part:
    """Return the part that compares the checkpoint itself, layer by layer."""
    part = {"name": "checkpoint-parity", "title": "rungs 1, 2, 3, 4, 6 and 11 on the checkpoint, layer by layer"}
    if request.hf is None:
        return Part(**part, why_not="no checkpoint was named (--hf DIR); the ladder ran on small models")
    command = (*_CLI, "parity", "--hf", str(request.hf), "--out", str(request.out / "checkpoint-parity"))
    command += ("--tokens", "64") if request.quick else ()
    return Part(
        **part,
        steps=(Step("parity", command, (60 if request.quick else 24 * 60) * _MINUTE),),
        read=lambda folder: results.of_checkpoint_parity(folder / "parity.json"),
    )


def conversion(request: Request) -> Part:
    """Return the part that converts to Megatron, on to another layout, and back."""
    preset = Preset.tiny if request.hf is None else None
    return _round_trip("conversion", request, request.model, preset, dense=request.is_dense, fp8=request.is_fp8)


def dense_conversion(request: Request) -> Part:
    """Return the part that does the same with a model without experts, where another one is checked."""
    model = request.out / "dense-conversion" / "model"
    part = _round_trip("dense-conversion", request, model, Preset.dense, dense=True, fp8=False)
    if request.hf is not None:
        return replace(part, steps=(), why_not="--hf names the checkpoint that is converted")
    return part


def _round_trip(name: str, request: Request, model: Path, preset: Preset | None, *, dense: bool, fp8: bool) -> Part:
    """Return the part that takes a checkpoint to two layouts and back, a small random one where ``preset`` is given."""
    folder, limit = request.out / name, (10 if preset else 24 * 60) * _MINUTE
    first, second, back = folder / "first", folder / "second", folder / request.round_trip.name
    work = ("--json", "--workers", str(min(8, len(os.sched_getaffinity(0)))))
    as_stored = ("--dtype", "fp8", "--reference", str(model)) if fp8 else ()
    convert, layouts = (*_CLI, "convert"), _DENSE_LAYOUTS if dense else _LAYOUTS
    (of_first, of_second), words = layouts.values(), [*layouts, "Hugging Face again"]
    commands = {
        "to-first": (*convert, "to-megatron", str(model), str(first), *of_first, *work),
        "to-second": (*convert, "to-megatron", str(first), str(second), *of_second, *work),
        "back": (*convert, "to-hf", str(second), str(back), *as_stored, *work),
        **{f"verify-{one.name}": (*_CLI, "verify", str(model), str(one), *work) for one in (first, second, back)},
    }
    if preset:
        commands = {"demo-model": (*_CLI, "demo-model", str(model), "--preset", preset), **commands}
    what = f"a small random {'Qwen2' if dense else 'DeepSeek-V3'}" if preset else request.hf
    return Part(
        name=name,
        title=f"{what} to two layouts and back, bit for bit",
        steps=tuple(Step(name, command, limit) for name, command in commands.items()),
        read=lambda folder: Findings(
            [
                results.of_verify(folder / f"verify-{one.name}.log", word)
                for one, word in zip((first, second, back), words, strict=True)
            ]
        ),
        scratch=("first", "second"),
    )


def regress(request: Request) -> Part:
    """Return the part that asks public questions before and after the round trip."""
    part = {"name": "regress", "title": "public benchmarks, before and after the round trip: the same answers"}
    names = [name for name in _BENCHMARKS if request.data and "test" in local_files(request.data / name)]
    left_out = []
    if "humaneval" in names and (why_not := _why_no_programs()):
        names.remove("humaneval")
        left_out.append(f"humaneval: {why_not}")
    if not names:
        found_none = "MEGATRON_ADS_DATA names no folder with gsm8k, humaneval or mmlu_stem"
        return Part(**part, why_not="; ".join(left_out) or found_none)
    if why_not := _why_it_cannot_answer(request):
        return Part(**part, why_not=why_not)
    if importlib.util.find_spec("lm_eval") is None:
        return Part(**part, why_not="lm-eval is not installed; pip install 'megatron-ads[regress]'")
    limit = QUICK_QUESTIONS if request.quick else None if request.hf else FULL_QUESTIONS
    command = (
        *_CLI, "regress", "--base", str(request.model), "--tuned", str(request.round_trip), "--same",
        "--data", str(request.data), "--out", str(request.out / "regress"), "--benchmark", *names,
        *(("--limit", str(limit)) if limit else ()),
        # A random model never ends its answers.
        *(("--max-new-tokens", "32") if request.hf is None else ()),
    )  # fmt: skip
    return Part(
        **part,
        steps=(Step("regress", command, (20 if request.hf is None else 24 * 60) * _MINUTE),),
        read=lambda folder: results.of_regress(folder / "regress.json"),
        after=("conversion",),
        continues=True,
        left_out=(*left_out, *([f"all but the first {limit} questions of each benchmark"] if limit else [])),
    )


def ads(request: Request) -> Part:
    """Return the part that asks ads questions before and after the round trip."""
    part = {"name": "ads", "title": "ads tasks, before and after the round trip: the same answers"}
    if why_not := _why_it_cannot_answer(request):
        return Part(**part, why_not=why_not)
    folder = request.out / "ads"
    recipe = ("--recipe", "sft/quickstart", "data=builtin", f"data.validation_rows={_ROWS[request.quick]}", "--json")
    files = {name: folder / f"{name}.jsonl" for name in ("before", "after")}
    commands = {
        name: (*_CLI, "evaluate", "--model", str(model), "--answers", str(files[name]), *recipe)
        for name, model in (("before", request.model), ("after", request.round_trip))
    }
    commands["compare"] = (
        *_CLI, "evaluate", "--answers", str(files["after"]), "--compare", str(files["before"]),
        "--html", str(folder / "answers.html"), *recipe,
    )  # fmt: skip
    return Part(
        **part,
        steps=tuple(Step(name, command, 20 * _MINUTE) for name, command in commands.items()),
        read=lambda folder: Findings(
            [
                *results.of_equal_answers(files["before"], files["after"]),
                *results.of_deltas(folder / "compare.log"),
            ]
        ),
        after=("conversion",),
        continues=True,
    )


def speed(request: Request) -> Part:
    """Return the part that measures how fast everything is next to its reference."""
    folder = request.out / "speed"
    command = (sys.executable, "-m", "benchmarks.run", "--out", str(folder), *(("--quick",) if request.quick else ()))
    return Part(
        name="speed",
        title="nothing has become slower next to its reference",
        steps=(Step("benchmarks.run", command, (45 if request.quick else 240) * _MINUTE),),
        read=lambda folder: results.of_speed(folder / "speed.json"),
        continues=True,
        left_out=("full sizes: --quick takes small ones",) if request.quick else (),
    )


def _why_no_programs() -> str:
    """Say why programs that a model writes cannot be run here; empty if they can."""
    try:
        require_sandbox()
    except ConfigError as error:
        return str(error)
    return ""


def _why_it_cannot_answer(request: Request) -> str:
    """Say why the checkpoint cannot be asked in a process of this machine; empty if it can."""
    from megatron_ads.runtime.device import free_memory_bytes

    free = free_memory_bytes()
    if request.weight_bytes <= _FREE_MEMORY_SHARE * free:
        return ""
    return (
        f"{request.hf} has {request.weight_bytes / 1e9:.0f} GB of weights, and {free / 1e9:.0f} GB of memory are free: "
        "serve it, and take --tuned URL (regress) or --url (evaluate)"
    )
