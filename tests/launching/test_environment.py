"""What Slurm's variables say about nodes, ranks and elements of arrays."""

from pathlib import Path

import pytest

from megatron_ads.config.model import LayoutConfig
from megatron_ads.config.run import SftConfig
from megatron_ads.config.training import LogConfig
from megatron_ads.errors import ConfigError
from megatron_ads.launching.environment import Allocation, core_warnings, rank_variables, tasks_per_node

INSIDE = {"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "8(x31)"}


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("8(x3)", [8, 8, 8]), ("2(x2),1", [2, 2, 1]), ("1,2(x2)", [1, 2, 2])]
)
def test_slurms_notation_of_tasks(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


def test_an_allocation_is_read_from_the_environment() -> None:
    found = Allocation.of(INSIDE | {"SLURM_RESTART_COUNT": "2"})
    assert (found.nodes, found.ranks, found.ranks_per_node) == (31, 248, 8)
    assert (found.job, found.restarts, found.array_index) == ("7", 2, None)
    assert Allocation.of(INSIDE).restarts == 0


def test_an_element_of_an_array_is_not_taken_for_the_array() -> None:
    # The last element to start keeps the number of the array as its own: "scontrol requeue 7" would take them all.
    found = Allocation.of(INSIDE | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5"})
    assert (found.job, found.array_index) == ("7_5", 5)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "SLURM_JOB_ID is not set"),
        (INSIDE | {"SLURM_TASKS_PER_NODE": "8,7"}, r"different numbers of tasks \(8,7\)"),
        (INSIDE | {"SLURM_TASKS_PER_NODE": "many"}, "'many'"),
    ],
)
def test_what_is_no_even_allocation_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Allocation.of(environment)


@pytest.mark.parametrize(
    ("sizes", "environment", "connections"),
    [
        ({"pp": 31, "ep": 8}, {}, None),  # one queue would only hold up messages between stages
        ({"tp": 2}, {}, "1"),
        ({"cp": 2}, {}, "1"),
        ({"tp": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, None),  # what is set stays
    ],
)
def test_one_hardware_queue_is_for_tensor_and_context_parallelism(
    sizes: dict[str, int], environment: dict[str, str], connections: str | None
) -> None:
    config = SftConfig(layout=LayoutConfig(**sizes), log=LogConfig(dir="run"))
    assert rank_variables(config, environment).get("CUDA_DEVICE_MAX_CONNECTIONS") == connections


def test_what_nccl_records_goes_to_the_folder_of_the_run(tmp_path: Path) -> None:
    variables = rank_variables(SftConfig(log=LogConfig(dir=str(tmp_path))), {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "own"})
    assert variables == {"TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl_flight_"}


def test_few_cores_for_many_ranks_are_warned_of() -> None:
    assert core_warnings(8, {"SLURM_CPUS_ON_NODE": "32"}) == []
    (warning,) = core_warnings(8, {"SLURM_CPUS_ON_NODE": "8"})
    assert warning.startswith("8 cores for 8 ranks with a GPU each") and "--cpus-per-task=4" in warning
