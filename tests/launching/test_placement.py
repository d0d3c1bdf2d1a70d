"""The places that 248 tasks report make up the R1 job; a missing, doubled or misplaced one is named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest

from megatron_ads.launching.placement import RankReport, placement_problems, read_reports, report_of, summary
from megatron_ads.planning.job import PlannedJob, load_job

RECIPE, NODES, RANKS = "sft/deepseek_r1_671b_248gpu", 31, 248
Reports = list[RankReport]


@cache
def r1() -> PlannedJob:
    return load_job(RECIPE, ranks=RANKS)


def task(rank: int, *, nodes: int = NODES, per_node: int = 8) -> dict[str, str]:
    """Return what Slurm tells a task."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": str(rank // per_node),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURMD_NODENAME": f"n{rank // per_node + 1}",
    }


def reports() -> Reports:
    return [report_of(r1(), task(rank)) for rank in range(RANKS)]


def test_the_places_of_all_ranks_make_up_the_job() -> None:
    found = reports()
    assert placement_problems(found, r1(), NODES) == []
    assert summary(found, r1())[0] == (
        "248 of 248 tasks reported from 31 nodes: 31 stages, 61 decoder layers + 1 MTP, 248 shard files, "
        "8 ranks without routed experts"
    )


def test_the_last_stage_holds_one_layer_the_mtp_layer_and_the_loss() -> None:
    # 31 stages of 8: stage 0 has two dense layers, 29 stages have two layers each, so layer 60 is left for the last.
    last = report_of(r1(), task(RANKS - 1))
    assert (last.at.pp, last.at.ep, last.layers, last.mtp_layers, last.has_loss) == (30, 7, (60,), (0,), True)
    assert last.experts == tuple(range(224, 256))  # the last eighth of 256
    assert last.file == "pp30-tp1-ep07.safetensors"
    first = report_of(r1(), task(0))
    assert (first.layers, first.experts, first.has_embedding, first.file) == (
        (0, 1), (), True, "pp00-tp0-ep00.safetensors",
    )  # fmt: skip


def _without(found: Reports) -> Reports:
    return [report for report in found if report.rank not in (9, 11)]


def _twice(found: Reports) -> Reports:
    return [*found, replace(found[5], local_rank=99)]


def _other_layers(found: Reports) -> Reports:
    return [replace(report, layers=(2, 3)) if report.at.pp == 2 else report for report in found]


def _other_experts(found: Reports) -> Reports:
    return [replace(found[8], experts=found[9].experts), *found[:8], *found[9:]]


def _other_file(found: Reports) -> Reports:
    return [*found[:-1], replace(found[-1], file="pp31-tp0-ep00.safetensors")]


def _file_of_another_rank(found: Reports) -> Reports:
    return [replace(found[8], file=found[9].file), *found[:8], *found[9:]]


def _one_node(found: Reports) -> Reports:
    return [replace(report, node=0, local_rank=report.rank) for report in found]


def _disagreement(found: Reports) -> Reports:
    return [*found[:-1], replace(found[-1], has_loss=False)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without, "2 ranks are missing: 9, 11"),
        (_without, "not held by as many ranks as they should be: decoder.layers.2.input_layernorm.weight (6 of 8)"),
        (_twice, "reported more than once: rank 5"),
        (
            _twice,
            "weights are not held by as many ranks as they should be: embedding.word_embeddings.weight (8.5 of 8)",
        ),
        (_other_layers, "n3: rank 16 has layers (2, 3), but the recipe says (4, 5) on this node"),
        (_other_experts, "n2: rank 8 has experts (32, 33, "),
        (_other_file, "rank 247 names pp31-tp0-ep00.safetensors, which is not a file of this layout"),
        (_file_of_another_rank, "decoder.layers.3.mlp.experts.linear_fc1.weight0 (0 of 1)"),
        (_one_node, "tasks of 1 nodes reported, not of 31"),
        (_disagreement, "n31: rank 247 has has_loss False, but the recipe says True"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[Reports], Reports], said: str) -> None:
    assert any(said in problem for problem in placement_problems(change(reports()), r1(), NODES))


def test_a_task_that_slurm_put_elsewhere_says_so() -> None:
    moved = task(9) | {"SLURM_NODEID": "9", "SLURM_LOCALID": "0"}  # one task a node in turn: --distribution=cyclic
    (problem,) = report_of(r1(), moved).problems
    assert "task 0 of node 9; with 8 ranks a node it should be task 1 of node 1" in problem


def test_a_missing_shard_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pp00-tp1-ep01.safetensors").touch()
    assert report_of(r1(), task(1), tmp_path).problems == ()
    (problem,) = report_of(r1(), task(2), tmp_path).problems
    assert f"rank 2 needs {tmp_path}/pp00-tp0-ep02.safetensors" in problem


def test_reports_are_read_back_and_broken_lines_are_problems(tmp_path: Path) -> None:
    file = tmp_path / "reports.jsonl"
    lines = [json.dumps(asdict(report)) for report in reports()[:2]]
    refusal = json.dumps({"host": "n3", "problems": ["layout.pp is 0"]})
    file.write_text("\n".join([*lines, refusal, "slurmstepd: error"]) + "\n")
    found, problems = read_reports(file)
    assert found == reports()[:2]
    assert problems == ["n3: layout.pp is 0", "a task wrote 'slurmstepd: error' instead of its report"]


@pytest.mark.parametrize("module", ["placement", "node_check", "slurm_job"])
def test_what_runs_once_a_task_or_node_does_not_load_torch(module: str) -> None:
    code = f"import sys, megatron_ads.launching.{module}; print([n for n in ('torch', 'megatron') if n in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_a_task_prints_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ads.launching.placement", "--recipe", RECIPE]
    right = subprocess.run(command, env=os.environ | task(17), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(right.stdout)["file"] == "pp02-tp1-ep01.safetensors"
    wrong = subprocess.run(
        command, env=os.environ | task(17, nodes=30), capture_output=True, text=True, timeout=60, check=False
    )
    assert wrong.returncode == 2
    assert "does not divide the 240 ranks" in json.loads(wrong.stdout)["problems"][0]
