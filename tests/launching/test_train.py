"""Which part of a job a node runs, and what the launch script says before it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.launching.environment import NodePart
from megatron_ads.launching.train import torchrun_command

ROOT = Path(__file__).parents[2]
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


def test_one_machine_alone_runs_the_fewest_ranks_and_starts_nothing_again() -> None:
    part = NodePart.of({}, None, fewest=4)
    assert (part.nodes, part.node, part.ranks_here, part.max_restarts) == (1, 0, 4, 0)
    command = torchrun_command(part, "some.module", ["--recipe", "sft/quickstart", "train.max_steps=3"])
    assert "--standalone" in command and "--nproc-per-node=4" in command
    assert command[-5:] == ["--module", "some.module", "--recipe", "sft/quickstart", "train.max_steps=3"]


def test_several_machines_share_the_ranks() -> None:
    part = NodePart.of(TWO | {"MEGATRON_ADS_MAX_RESTARTS": "3"}, None, fewest=4)
    assert (part.ranks, part.ranks_here, part.max_restarts) == (4, 2, 3)
    command = torchrun_command(part, "r", [])
    for word in ("--nnodes=2", "--rdzv-endpoint=10.0.0.1:29500", "--max-restarts=3"):
        assert word in command
    assert any("is_host=false" in word for word in command)
    first = NodePart.of(TWO | {"NODE_RANK": "0"}, None, 4)
    assert any("is_host=true" in word for word in torchrun_command(first, "r", []))
    assert NodePart.of(TWO | {"NPROC_PER_NODE": "8"}, None, fewest=4).ranks == 16
    assert NodePart.of(TWO | {"NPROC_PER_NODE": ""}, None, fewest=4).ranks == 4
    assert NodePart.of(TWO, 6, fewest=4).ranks_here == 3


def test_nodes_that_do_not_meet_leave_no_traceback() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # taken, and nobody listens
        part = NodePart.of(TWO | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}, None, 4)
        command = [word.replace("is_host", "read_timeout=1,is_host") for word in torchrun_command(part, "r", [])]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("torchrun: ")] != []


@pytest.mark.parametrize(
    ("environment", "ranks", "message"),
    [
        ({}, 0, "--ranks is 0"),
        ({"NNODES": "2"}, 4, "MASTER_ADDR is not set"),
        (TWO | {"NODE_RANK": "2"}, 4, "NODE_RANK is 2 and NNODES is 2"),
        (TWO, 5, "5 ranks cannot be shared evenly by 2 nodes"),
        (TWO | {"NNODES": "two"}, 4, "NNODES is 'two'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(environment: dict[str, str], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodePart.of(environment, ranks, fewest=4)


def run_bash(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "MEGATRON_ADS_ROOT": str(ROOT), **variables}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


def test_the_environment_keeps_what_the_user_has_set() -> None:
    answer = run_bash(
        f"source {ROOT}/launch/environment.sh; echo $NCCL_DEBUG ${{OMP_NUM_THREADS-}}, $TRITON_CACHE_DIR",
        NCCL_DEBUG="INFO",
        OMP_NUM_THREADS="",
        TMPDIR="/local",
        MEGATRON_ADS_VENV=sys.prefix,
    )
    assert (answer.stdout, answer.stderr) == (f"INFO , /local/triton-{os.getuid()}\n", "")


def test_every_variable_of_the_environment_has_a_reason() -> None:
    lines = (ROOT / "launch" / "environment.sh").read_text().splitlines()
    settings = [number for number, line in enumerate(lines) if line.startswith("_set_default ")]
    assert len(settings) >= 7
    for number in settings:
        before = lines[number - 1]
        assert before.startswith(("# ", "_set_default ")), lines[number]


@pytest.mark.parametrize("script", ["torchrun.sh sft/quickstart", "slurm.sbatch sft/quickstart"])
def test_a_missing_environment_ends_in_one_line(script: str) -> None:
    answer = run_bash(f"{ROOT}/launch/{script}", MEGATRON_ADS_VENV="/nowhere")
    assert answer.returncode == 2
    assert answer.stderr.startswith("launch: /nowhere/bin/python cannot run megatron-ads")
    assert answer.stderr.count("\n") == 1


def test_slurms_script_outside_of_slurm_says_how_to_submit_it() -> None:
    answer = run_bash(f"{ROOT}/launch/slurm.sbatch sft/quickstart", MEGATRON_ADS_VENV=sys.prefix)
    assert answer.returncode == 2
    assert "Submit it with 'sbatch --nodes=N" in answer.stdout


@pytest.mark.parametrize(("words", "status"), [("--help", 0), ("", 2), ("train.max_steps=3", 2)])
def test_the_script_explains_itself(words: str, status: int) -> None:
    answer = run_bash(f"{ROOT}/launch/torchrun.sh {words}")
    assert answer.returncode == status
    assert "NNODES=2 NODE_RANK=0 MASTER_ADDR=" in answer.stdout


def test_a_users_mistake_under_the_script_is_a_list_of_lines() -> None:
    answer = run_bash(
        f"{ROOT}/launch/torchrun.sh sft/quickstart model.load=/nowhere train.global_batch_size=5",
        MEGATRON_ADS_VENV=sys.prefix,
        CUDA_VISIBLE_DEVICES="",
    )
    assert answer.returncode == 2
    lines = answer.stderr.splitlines()
    assert [line.startswith("megatron-ads: ") for line in lines] == [True, True]
    assert "/nowhere does not exist" in answer.stderr
    assert "train.global_batch_size = 5 is not a multiple of" in answer.stderr
