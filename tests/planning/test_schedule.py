"""The schedules are Megatron-Core's, and their bubbles those of the formula."""

import pytest

from megatron_ads.planning.schedule import Work, ideal_bubble, peak_held, play, stage_order


# 30 / (m + 30) and 30 / (2 m + 30) at m = 64: 30 / 94 and 30 / 158.
@pytest.mark.parametrize(("vpp", "percent"), [(1, "31.9"), (2, "19.0")])
def test_two_virtual_chunks_shrink_the_bubble_of_31_stages(vpp: int, percent: str) -> None:
    assert f"{100 * ideal_bubble(31, vpp, 64):.1f}" == percent


@pytest.mark.parametrize(
    ("pp", "vpp", "microbatches"),
    [(1, 1, 4), (2, 1, 2), (4, 1, 8), (31, 1, 64), (2, 2, 4), (4, 2, 8), (4, 3, 12), (31, 2, 62)],
)
def test_the_schedule_played_through_reaches_the_formula(pp: int, vpp: int, microbatches: int) -> None:
    chunks = pp * vpp
    line = play(pp, vpp, microbatches, forward_seconds=[1.0] * chunks, backward_seconds=[2.0] * chunks)
    assert line.bubble == pytest.approx(ideal_bubble(pp, vpp, microbatches), abs=1e-12)
    # m microbatches of v chunks of 3 s, and p - 1 of them to fill and drain
    assert line.seconds == pytest.approx(3 * (vpp * microbatches + pp - 1))


def test_an_uneven_stage_makes_the_others_wait() -> None:
    # stage 1 works 2 + 4 s on each of 4 microbatches, stage 0 half: 1 + 4 * 6 + 2 s in all
    line = play(2, 1, 4, forward_seconds=[1, 2], backward_seconds=[2, 4])
    assert line.seconds == 27
    assert line.bubble == pytest.approx(1 - (12 + 24) / (2 * 27))


def test_messages_delay_both_ways() -> None:
    # one microbatch: there and back over one boundary
    assert play(2, 1, 1, forward_seconds=[1, 1], backward_seconds=[1, 1], message_seconds=0.5).seconds == 5


def test_the_first_of_three_stages_runs_two_ahead() -> None:
    order = stage_order(3, 1, 0, 4)
    assert "".join("B" if work.backward else "F" for work in order) == "FFFBFBBB"
    assert [work.microbatch for work in order] == [0, 1, 2, 0, 3, 1, 2, 3]


@pytest.mark.parametrize("vpp", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_interleaved_order_is_megatrons(stage: int, vpp: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    pp, microbatches = 4, 8
    order = stage_order(pp, vpp, stage, microbatches)
    table = get_schedule_table(microbatches, vpp, pp)
    assert [(work.microbatch, work.virtual) for work in order if not work.backward] == table
    # Backward passes come in the same order from the last chunk on, `warmup` forward passes behind.
    assert [(work.microbatch, vpp - 1 - work.virtual) for work in order if work.backward] == table
    warmup = (pp - stage - 1) * 2 + (vpp - 1) * pp
    assert [work.backward for work in order].index(True) == min(warmup + 1, len(table))


def test_what_is_held_is_the_most_between_forward_and_backward() -> None:
    assert peak_held([Work(False, 0, 0), Work(False, 1, 0), Work(True, 1, 0), Work(True, 0, 0)], [3, 4]) == 7
    # 1F1B: stage s of p holds p - s microbatches, never more than there are
    assert [peak_held(stage_order(4, 1, stage, 8), [1]) for stage in range(4)] == [4, 3, 2, 1]
    assert peak_held(stage_order(4, 1, 0, 2), [1]) == 2
