"""The steps of the GPU benchmark run in small on a CPU; one that fails, hangs or finds something stops no other."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.record import Record, read_record
from benchmarks.gpu.runner import STEPS, Step, main, run_steps
from parity_tests.harness.ranks import run_ranks

ROOT = Path(__file__).parents[2]

# What the steps of the first test do, each in a process of its own.


def passes(record: Record) -> None:
    record.figure("speed", 3.5, "3.5 TFLOP/s")


def finds(record: Record) -> None:
    record.check(1 > 2, "one is not more than two")
    with record.attempt("division"):
        print(1 / 0)
    record.figure("after", True)


def dies(record: Record) -> None:
    record.figure("before", 1)
    os._exit(9)


def hangs(record: Record) -> None:
    record.figure("before", os.getpid())
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


def skips(record: Record) -> None:
    record.skip("the card is too small")


def test_every_step_has_its_line_whatever_the_others_do(tmp_path: Path) -> None:
    here = "tests.benchmarks.test_gpu"
    steps = [Step(name, 4 if name == "hangs" else 60, f"{here}:{name}") for name in ("hangs", "dies", "finds", "skips")]
    steps.append(Step("passes", 60, f"{here}:passes"))
    began = time.monotonic()
    run_steps(steps, tmp_path, seconds=120, dry_run=False)
    assert time.monotonic() - began < 60
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["step"], line["status"]) for line in lines] == [
        ("hangs", "timed out"),
        ("dies", "failed"),
        ("finds", "findings"),
        ("skips", "skipped"),
        ("passes", "passed"),
    ]
    assert lines[1]["figures"] == {"before": 1}
    assert lines[2]["findings"] == ["one is not more than two", "division: ZeroDivisionError: division by zero"]
    assert lines[2]["figures"] == {"after": True}
    table = (tmp_path / "table.txt").read_text()
    assert all(text in table for text in ("3.5 TFLOP/s", "! one is not more than two", "the card is too small"))
    assert not Path(f"/proc/{lines[0]['figures'].get('before', 'none')}").exists()


def test_steps_without_time_are_skipped(tmp_path: Path) -> None:
    (result,) = run_steps([Step("passes", 60, "no:such")], tmp_path, seconds=1, dry_run=False)
    assert (result["status"], result["skipped"]) == ("skipped", "no time was left")


def test_a_record_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    file = tmp_path / "record"
    Record(file).figure("kept", [1, 2])
    with file.open("a") as handle:
        handle.write('{"figure": "cut o')
    assert read_record(file).figures == {"kept": [1, 2]}


IN_SMALL = {
    "attention": "fp32, 16 samples: flops_per_second",
    "experts": "three experts with 0 or 1 token: flops_per_second",
    "pointwise": "cross entropy of torch: ms",
    "layers": "kernels_ms_calls",
    "layers-full": "planned_parts",
    "stage": "host_waits_per_microbatch",
    "transformers": "speed over transformers, recompute full",
    "switches": "Python's own garbage collection",
    "lora": "busiest_expert_over_mean",
    "nccl-job": "backend",
    "checkpoint": "load_seconds",
    "deterministic": "losses_and_norms",
    "build-ranks": "host_peak_bytes",
}
"""The last figure of each step, or one that only it has."""


def dry_run(function: str, *, tiny: bool = True) -> tuple[dict[str, Any], list[str], str | None]:
    record = Record(dry_run=tiny)
    Step("in small", 0, function).run(record)
    json.dumps(record.found.figures, allow_nan=False)
    return record.found.figures, record.found.findings, record.found.skipped


@pytest.mark.parametrize(("name", "figure"), IN_SMALL.items())
def test_a_step_runs_in_small(name: str, figure: str) -> None:
    function = next(step.function for step in STEPS if step.name == name)
    ((figures, findings, skipped),) = run_ranks(1, dry_run, function, process_group=False)
    assert (findings, skipped) == ([], None)
    assert figure in figures
    assert [found for found in figures.values() if str(found).startswith("not there")] == []


def test_all_steps_are_run_in_small_but_those_that_start_processes() -> None:
    elsewhere = {"facts", "layers-selective", "layers-32k"}  # by the script below; the code of other steps
    assert {step.name for step in STEPS} - IN_SMALL.keys() - elsewhere == {"quickstart", "parity"}


def attention_over_all_samples() -> list[str]:
    from megatron_ads.models import attention

    right = attention.attend
    attention.attend = lambda *heads, scale, **_: right(*heads, scale=scale)
    return dry_run("benchmarks.gpu.attention:attention")[1]


def garbage_for_experts_without_tokens() -> list[str]:
    from benchmarks.gpu.experts import _Experts

    right = _Experts.run

    def run(given: Any, counts_E: Any) -> list[Any]:
        found = right(given, counts_E)
        found[3][counts_E == 0] = float("nan")
        return found

    _Experts.run = run  # type: ignore[method-assign]
    return dry_run("benchmarks.gpu.experts:experts")[1]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (attention_over_all_samples, "bf16, 16 samples: the gradient of keys is off by"),
        (garbage_for_experts_without_tokens, "one expert has all tokens: experts without tokens get a gradient of nan"),
    ],
)
def test_what_is_wrong_is_found(broken: Any, said: str) -> None:
    (findings,) = run_ranks(1, broken, process_group=False)
    assert any(finding.startswith(said) for finding in findings), findings


def as_if_on_a_gpu(function: str, memory: int) -> tuple[dict[str, Any], list[str], str | None]:
    """Run a step in small with a card that answers questions and computes nothing: the branches for a GPU."""
    import torch

    from benchmarks.gpu import jobs, layers, machine, stacks, timing

    for module in (jobs, layers, machine, stacks, timing):
        module.on_gpu = lambda: True  # type: ignore[attr-defined]
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=memory, multi_processor_count=132)
    answers = {
        "get_device_name": card.name,
        "get_device_properties": card,
        "get_device_capability": (9, 0),
        "max_memory_allocated": 3 * 10**9,
        "max_memory_reserved": 4 * 10**9,
        "mem_get_info": (memory, memory),
        "memory_allocated": 10**9,
        "reset_peak_memory_stats": None,
        "set_sync_debug_mode": None,
    }
    for question, answer in answers.items():
        setattr(torch.cuda, question, lambda *_, answer=answer: answer)
    torch.cuda.nccl.version = lambda: (2, 28, 3)
    for name, stack in stacks.STACKS.items():
        stacks.STACKS[name] = stack.sized(tiny=True)
    return dry_run(function, tiny=":train_stack" not in function)


@pytest.mark.parametrize("name", ["layers", "checkpoint", "facts", "build-ranks"])
def test_what_is_asked_of_a_gpu_is_noted(name: str) -> None:
    function = next(step.function for step in STEPS if step.name == name)
    ((figures, findings, skipped),) = run_ranks(1, as_if_on_a_gpu, function, 85 * 10**9, process_group=False)
    assert skipped is None
    expected = {  # what such a card would be found to do wrong
        "layers": [
            "the planner's memory model is off",
            "of the card's peak, less than the 40% aimed at",
            "kernels: AssertionError: No activities",  # torch itself knows better
        ],
        "facts": ["nvidia-smi: FileNotFoundError"],
        "build-ranks": ["building ranks took 3.00 GB of the GPU"],
    }.get(name, [])
    assert len(findings) == len(expected), findings
    assert all(text in finding for text, finding in zip(expected, findings, strict=True))
    if name == "layers":
        assert figures["peak_bytes"] == 3 * 10**9
        assert figures["host_waits_per_microbatch"] == 0
        assert figures["1 dense + 3 MoE layers, recompute none: share_of_peak"] > 0


def build_stacks_without_weights() -> dict[str, tuple[tuple[str, ...], int]]:
    from benchmarks.gpu.layers import planned_bytes
    from benchmarks.gpu.stacks import STACKS
    from megatron_ads.planning.build_ranks import build_ranks

    return {name: (build_ranks(stack.job).faults, planned_bytes(stack)) for name, stack in STACKS.items()}


def test_every_stack_is_a_model_that_megatron_builds_and_an_h100_holds() -> None:
    from benchmarks.gpu.stacks import STACKS

    (built,) = run_ranks(1, build_stacks_without_weights, process_group=False)
    assert {name for name, (faults, size) in built.items() if faults or size > 80e9} == set()
    assert built["stage"][1] > 60e9
    for stack in STACKS.values():  # Megatron-Core takes the best of each chosen group
        shape = stack.shape
        in_group = shape.num_experts // shape.num_expert_groups
        assert in_group >= shape.experts_per_token // shape.groups_per_token


def test_what_does_not_fit_the_card_is_skipped() -> None:
    ((_, _, skipped),) = run_ranks(
        1, as_if_on_a_gpu, "benchmarks.gpu.layers:train_stack:plain", 3 * 10**9, process_group=False
    )
    assert skipped == "the plan is 3 GB, the card has 3 GB"


def test_the_quickstart_of_one_rank_is_a_valid_recipe(tmp_path: Path) -> None:
    from benchmarks.gpu.jobs import train_command
    from megatron_ads.config.recipes import load_recipe
    from megatron_ads.config.run import validate

    command, _, recipe, *overrides = train_command(tmp_path, "bf16", "bf16", 20, rows=2000)
    assert command == "train"
    config = load_recipe(recipe, overrides)
    validate(config, 1)
    assert config.layout.fewest_ranks() == 1


def test_without_a_gpu_and_of_an_unknown_step_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--step", "layer"]) == 2
    assert main([]) == 2
    unknown, no_gpu = capsys.readouterr().err.splitlines()
    assert unknown.startswith("benchmarks/gpu.sh: there is no step layer; there are facts, attention,")
    assert no_gpu.endswith("Give --dry-run to run the steps on tiny sizes here.")


@pytest.mark.slow
def test_the_script_runs_a_step_in_small(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "--step", "facts", "--out", str(tmp_path / "out")]
    environment = os.environ | {"MEGATRON_ADS_VENV": sys.prefix}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "A dry run on tiny sizes: nothing here is a measurement." in run.stdout
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["figures"]["provenance"]["versions"]["torch"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["log.txt", "results.jsonl", "table.txt"]
