"""The preflight names the odd rank: rules without processes, then four ranks of which one is odd, or never comes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch.distributed as dist

from megatron_ads.errors import TopologyError
from megatron_ads.layout import ParallelLayout, describe_ranks
from megatron_ads.runtime.preflight import Record, check_records, gather_records
from parity_tests.harness.ranks import run_ranks

LAYOUT = ParallelLayout(world=4, pp=2, ep=2)
DENSE = {"dense": (("decayed", 10), ("undecayed", 4))}
EXPERT = {"expert": (("decayed", 6), ("undecayed", 0))}
STUB = {"expert": (("decayed", 0), ("undecayed", 0))}


def _record(rank: int, layout: ParallelLayout = LAYOUT) -> Record:
    """As in a job where stage 0 owns no experts."""
    return Record(
        rank=rank,
        coordinates=layout.coordinates(rank),
        members=DENSE | (STUB if layout.coordinates(rank).pp == 0 else EXPERT),
        versions={"torch": "2.13.0", "megatron-core": "0.16.1"},
        config_digest="c0ffee",
        code_revision="abc123",
    )


def _records(**changed: Callable[[Record], Record]) -> list[Record]:
    """Four records; ``rank_1=...`` changes that of rank 1."""
    return [changed.get(f"rank_{rank}", lambda record: record)(_record(rank)) for rank in range(4)]


def _problems(records: Sequence[Record]) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        check_records(records)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_ranks_that_do_the_same_pass_though_a_stage_has_a_stub() -> None:
    records = _records()
    assert records[0].members != records[3].members
    check_records(records)


def test_a_rank_without_a_member_is_named_with_its_stage_and_what_it_has() -> None:
    assert _problems(_records(rank_1=lambda record: replace(record, members=DENSE))) == [
        "rank 1 (stage 0, ep 1): optimizer members [dense], without 'expert', which ranks 0, 2-3 have; "
        "they would wait for each other in its first collective"
    ]


def test_a_whole_stage_without_a_member_is_odd_even_if_it_is_the_majority() -> None:
    def without_experts(record: Record) -> Record:
        return replace(record, members=DENSE)

    records = _records(rank_0=without_experts, rank_1=without_experts, rank_2=without_experts)
    (problem,) = _problems(records)
    assert problem.startswith("ranks 0-2 (stages 0, 1): optimizer members [dense], without 'expert', which rank 3 has;")


def test_another_order_of_members_is_a_difference() -> None:
    assert _problems(
        _records(rank_3=lambda record: replace(record, members=dict(reversed(record.members.items()))))
    ) == [
        "rank 3 (stage 1, ep 1): order of optimizer members ('expert', 'dense'), but ('dense', 'expert') on "
        "3 other ranks"
    ]


def test_another_group_key_is_a_difference() -> None:
    renamed = {"expert": (("decayed", 6), ("no decay", 0))}
    problems = _problems(_records(rank_2=lambda record: replace(record, members=DENSE | renamed)))
    assert problems[0] == (
        "rank 2 (stage 1, ep 0): parameter groups of optimizer member 'expert' ('decayed', 'no decay'), but "
        "('decayed', 'undecayed') on 3 other ranks"
    )


def test_another_number_of_parameters_within_a_stage_is_a_difference() -> None:
    fewer = {"expert": (("decayed", 5), ("undecayed", 0))}
    (problem,) = _problems(_records(rank_2=lambda record: replace(record, members=DENSE | fewer)))
    assert "parameters of optimizer member 'expert' on stage 1" in problem
    assert "('decayed', 5)" in problem and "('decayed', 6)" in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda record: replace(record, versions={"torch": "2.11.0", "megatron-core": "0.16.1"}),
            "torch version '2.11.0', but '2.13.0' on 3 other ranks",
        ),
        (
            lambda record: replace(record, versions={"torch": "2.13.0"}),
            "megatron-core version 'absent', but '0.16.1' on 3 other ranks",
        ),
        (
            lambda record: replace(record, config_digest="other"),
            "configuration digest 'other', but 'c0ffee' on 3 other ranks",
        ),
        (
            lambda record: replace(record, code_revision="def456"),
            "code revision 'def456', but 'abc123' on 3 other ranks",
        ),
    ],
    ids=["version", "absent package", "configuration", "code"],
)
def test_other_software_or_settings_are_a_difference(change: Callable[[Record], Record], said: str) -> None:
    assert _problems(_records(rank_1=change)) == [f"rank 1 (stage 0, ep 1): {said}"]


def test_the_published_layout_is_compared_in_well_under_a_second() -> None:
    layout = ParallelLayout(world=248, pp=31, ep=8)
    records = [_record(rank, layout) for rank in range(248)]
    start = time.process_time()
    check_records(records)
    odd = [replace(record, members=DENSE) if record.coordinates.pp == 0 else record for record in records]
    assert _problems(odd)[0].startswith("ranks 0-7 (stage 0): optimizer members [dense], without 'expert', which ranks")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([2, 0, 1, 5], "ranks 0-2, 5"), ([7, 9], "ranks 7, 9")])
def test_ranks_are_named_by_their_runs(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text


def _check_with_an_odd_rank(odd: int | None) -> str:
    record = _record(dist.get_rank())
    if dist.get_rank() == odd:
        record = replace(record, members=DENSE)
    records = gather_records(record)
    assert [other.rank for other in records] == [0, 1, 2, 3] and records[dist.get_rank()] == record
    try:
        check_records(records)
    except TopologyError as error:
        return str(error)
    return ""


def test_four_ranks_exchange_their_records_and_agree() -> None:
    assert run_ranks(4, _check_with_an_odd_rank, None) == [""] * 4


def test_every_rank_learns_which_one_lacks_a_member() -> None:
    messages = run_ranks(4, _check_with_an_odd_rank, 1)
    assert len(set(messages)) == 1
    assert "rank 1 (stage 0, ep 1): optimizer members [dense], without 'expert'" in messages[0]


def _come_except(absent: int) -> tuple[str, float]:
    start = time.monotonic()
    if dist.get_rank() == absent:
        time.sleep(4.5)  # lives on, and with rank 0 the store that it holds
        return "", 0.0
    with pytest.raises(TopologyError) as caught:
        gather_records(_record(dist.get_rank()), timeout_seconds=2)
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("absent", [2, 0])
def test_a_rank_that_never_comes_is_named_by_the_others_in_time(absent: int) -> None:
    answers = run_ranks(4, _come_except, absent)
    for rank, (message, seconds) in enumerate(answers):
        if rank != absent:
            assert message.startswith(f"rank {absent} of 4 did not come to the preflight within 2 s.")
            assert seconds < 10


def _come_twice() -> list[str]:
    first = gather_records(replace(_record(dist.get_rank()), code_revision="first"))
    second = gather_records(replace(_record(dist.get_rank()), code_revision="second"))
    return [record.code_revision for record in (*first, *second)]


def test_a_second_preflight_of_the_same_job_compares_new_records() -> None:
    assert run_ranks(2, _come_twice) == [["first"] * 2 + ["second"] * 2] * 2
