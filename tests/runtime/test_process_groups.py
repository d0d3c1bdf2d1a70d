"""Process groups of real jobs and of rehearsals: sizes, coordinates, timeouts, refusals."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_ads.errors import ConfigError, TopologyError
from megatron_ads.layout import Coordinates, ParallelLayout
from megatron_ads.runtime import process_groups
from parity_tests.harness.ranks import RanksFailed, run_ranks

LAYOUTS = {
    "pp2 ep2 of 4": ParallelLayout(world=4, pp=2, ep=2),
    "pp1 ep4 of 4": ParallelLayout(world=4, ep=4),
    "tp2 etp1 of 4": ParallelLayout(world=4, tp=2, ep=2),
    "pp2 vpp2 of 2": ParallelLayout(world=2, pp=2, vpp=2),
    "cp2 pp2 of 4": ParallelLayout(world=4, cp=2, pp=2),
}

LARGE_LAYOUTS = {
    "pp4 tp2 ep2 of 16": ParallelLayout(world=16, pp=4, tp=2, ep=2),
    "pp2 cp2 tp2 ep4 etp2 of 32": ParallelLayout(world=32, pp=2, cp=2, tp=2, ep=4, etp=2),
    "pp31 ep8 of 248": ParallelLayout(world=248, pp=31, ep=8),
}


def _megatron_coordinates() -> Coordinates:
    from megatron.core import parallel_state as megatron

    return Coordinates(
        pp=megatron.get_pipeline_model_parallel_rank(),
        dp=megatron.get_data_parallel_rank(),
        cp=megatron.get_context_parallel_rank(),
        tp=megatron.get_tensor_model_parallel_rank(),
        edp=megatron.get_expert_data_parallel_rank(),
        ep=megatron.get_expert_model_parallel_rank(),
        etp=megatron.get_expert_tensor_parallel_rank(),
    )


def _start_and_locate(layout: ParallelLayout) -> tuple[Coordinates, int | None, list[timedelta]]:
    from megatron.core import parallel_state as megatron

    process_groups.start(layout, timeout_seconds=77.5)
    try:
        timeouts = [
            group._get_backend(group._device_types[0]).options._timeout for group in dist.distributed_c10d._world.pg_map
        ]
        return _megatron_coordinates(), megatron.get_virtual_pipeline_model_parallel_world_size(), timeouts
    finally:
        process_groups.stop()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_real_job_has_the_coordinates_of_its_layout_and_finite_timeouts(layout: ParallelLayout) -> None:
    answers = run_ranks(layout.world, _start_and_locate, layout, process_group=False)
    assert [answer[0] for answer in answers] == [layout.coordinates(rank) for rank in range(layout.world)]
    assert {answer[1] for answer in answers} == {layout.vpp if layout.vpp > 1 else None}
    for _, _, timeouts in answers:
        assert len(timeouts) > 10  # the default group and Megatron's
        assert set(timeouts) == {timedelta(seconds=77.5)}


def _coordinates_in_fake_groups(layout: ParallelLayout, ranks: list[int]) -> list[Coordinates]:
    answers = []
    for rank in ranks:
        process_groups.start_fake(layout, rank)
        answers.append(_megatron_coordinates())
        process_groups.stop()
    return answers


@pytest.mark.parametrize("layout", LARGE_LAYOUTS.values(), ids=LARGE_LAYOUTS.keys())
def test_fake_groups_take_the_place_of_any_rank_of_a_large_layout(layout: ParallelLayout) -> None:
    ranks = list(range(0, layout.world, 7))
    (answers,) = run_ranks(1, _coordinates_in_fake_groups, layout, ranks, process_group=False)
    assert answers == [layout.coordinates(rank) for rank in ranks]


def _refusal(layout: ParallelLayout) -> str:
    with pytest.raises(ConfigError) as caught:
        process_groups.start(layout)
    return str(caught.value)


@pytest.mark.parametrize("process_group", [True, False], ids=["joined", "not joined"])
def test_a_layout_for_another_number_of_ranks_is_refused_with_both_numbers(process_group: bool) -> None:
    layout = ParallelLayout(world=4, pp=2)
    assert set(run_ranks(2, _refusal, layout, process_group=process_group)) == {
        "The layout is for 4 ranks (pp * dp * cp * tp = 2 * 2 * 1 * 1), but 2 are running. "
        "Launch 4 processes, or change the layout."
    }


def _start_alone() -> int:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        os.environ.pop(name, None)
    process_groups.start(ParallelLayout(world=1))
    return dist.get_world_size()


def test_one_process_needs_no_launcher() -> None:
    assert run_ranks(1, _start_alone, process_group=False) == [1]


def _start_under_srun() -> tuple[int, int]:
    for torchrun, srun in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        os.environ[srun] = os.environ.pop(torchrun)
    process_groups.start(ParallelLayout(world=2))
    return dist.get_rank(), dist.get_world_size()


def test_ranks_started_by_srun_take_their_numbers_from_it() -> None:
    assert run_ranks(2, _start_under_srun, process_group=False) == [(0, 2), (1, 2)]


def _start_without_a_meeting_point() -> str:
    del os.environ["MASTER_ADDR"]
    with pytest.raises(ConfigError) as caught:
        process_groups.start(ParallelLayout(world=2))
    return str(caught.value)


def test_ranks_without_a_meeting_point_are_refused_before_they_wait() -> None:
    message = run_ranks(2, _start_without_a_meeting_point, process_group=False)[1]
    assert message.startswith("MASTER_ADDR not set for a job of 2 ranks. Start it with torchrun,")


def _wait_for_rank_1(layout: ParallelLayout) -> None:
    process_groups.start(layout, timeout_seconds=1)
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=4))


def test_a_collective_that_a_rank_never_joins_ends_after_the_timeout() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, _wait_for_rank_1, ParallelLayout(world=2), process_group=False)
    assert "RuntimeError" in caught.value.failures[0] and "1000ms" in caught.value.failures[0]


def _meet(seconds: float) -> list[str]:
    """Let rank 2 come late, once too late; return what each wait ended with."""
    process_groups.start(ParallelLayout(world=3))
    found = []
    for lateness in (0.3, 2.0):
        if dist.get_rank() == 2:
            time.sleep(lateness)
        try:
            process_groups.wait_for_all("load the weights", seconds)
        except TopologyError as error:
            found.append(str(error))
        else:
            found.append("met")
        dist.barrier()
    return found


def test_ranks_wait_for_the_slowest_and_name_it_when_it_does_not_come() -> None:
    *early, late = run_ranks(3, _meet, 1.0)
    assert late == ["met", "met"]
    for first, second in early:
        assert first == "met"
        assert second.startswith("rank 2 of 3 did not load the weights within 1 s (runtime.load_timeout_seconds).")


def _keys_after_each_wait() -> list[int]:
    process_groups.start(ParallelLayout(world=2))
    found = []
    for _ in range(3):
        process_groups.wait_for_all("compute the rewards", 20)
        dist.barrier()  # whoever came last has tidied up
        found.append(dist.distributed_c10d._get_default_store().num_keys())
        dist.barrier()
    return found


def test_waits_at_every_step_do_not_fill_the_store() -> None:
    for first, second, third in run_ranks(2, _keys_after_each_wait):
        assert first == second == third


def test_groups_on_gpus_are_not_split_off_the_jobs_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr("megatron_ads.runtime.device.device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: calls.append({"set_device": device}))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append(options))
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"})
    process_groups._join(2, timedelta(seconds=7))
    assert calls == [{"set_device": torch.device("cuda", 3)}, {"timeout": timedelta(seconds=7)}]
