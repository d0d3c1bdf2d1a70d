"""What happens to a job whose expert-less ranks have no stub, and how it is found before the first step."""

import time
from pathlib import Path

from megatron_ads.errors import TopologyError
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, run_steps, start
from tests.collective_trace import Trace, compare_traces, trace_collectives
from tests.models.checkpoints import V3, write_checkpoint

TIMEOUT_SECONDS = 5.0


def _recipe(folder: Path, *, stub_experts: bool) -> Recipe:
    return Recipe(
        folder=write_checkpoint(folder / "v3", V3),
        layout={"pp": 2, "ep": 2},
        stub_experts=stub_experts,
        timeout_seconds=TIMEOUT_SECONDS,
    )


def _step(recipe: Recipe) -> tuple[Trace, str, float]:
    """Take one step; return what was called, how it ended and the seconds it took."""
    model, shards, _ = start(recipe)
    started, ending = time.monotonic(), "done"
    with trace_collectives() as trace:
        try:
            run_steps(model, shards, 0, 1)
        except RuntimeError as error:
            ending = str(error)
    return trace, ending, time.monotonic() - started


def test_without_the_stub_the_first_step_deadlocks_until_the_timeout(tmp_path: Path) -> None:
    answers = run_ranks(4, _step, _recipe(tmp_path, stub_experts=False))
    assert all(ending != "done" for _, ending, _ in answers)
    # Who gives up first closes its connections, which the others may notice before their own time is over.
    assert any("Timed out waiting 5000ms" in ending and seconds >= TIMEOUT_SECONDS for _, ending, seconds in answers)
    # Stage 1 waits in the experts' statistics; stage 0, which has none, is already at the step's report: seven numbers
    # and the loss of each sample, here one.
    (mismatch,) = compare_traces({rank: trace for rank, (trace, _, _) in enumerate(answers)})
    assert str(mismatch) == (
        "collective 1 of default[0, 1, 2, 3]: rank 0: allreduce(float64[8]; sum); rank 1: allreduce(float64[8]; sum); "
        "rank 2: allreduce(float64[3]; sum); rank 3: allreduce(float64[3]; sum)"
    )


def test_with_the_stub_the_same_step_is_done(tmp_path: Path) -> None:
    for _, ending, _ in run_ranks(4, _step, _recipe(tmp_path, stub_experts=True)):
        assert ending == "done"


def _preflight(recipe: Recipe) -> tuple[str, float]:
    """Compare the ranks before the first step; return what was found and the seconds it took."""
    from megatron_ads.training.session import preflight

    model, shards, _ = start(recipe)
    started = time.monotonic()
    try:
        preflight(recipe.config(), model.optimizer, shards)
    except TopologyError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


def test_the_preflight_names_ranks_stage_and_member_in_under_ten_seconds(tmp_path: Path) -> None:
    for message, seconds in run_ranks(4, _preflight, _recipe(tmp_path, stub_experts=False)):
        assert message.splitlines()[1:] == [
            "  ranks 0-1 (stage 0): optimizer members [dense], without 'expert', which ranks 2-3 have; "
            "they would wait for each other in its first collective"
        ]
        assert seconds < 10


def test_the_preflight_passes_with_the_stub(tmp_path: Path) -> None:
    for message, seconds in run_ranks(4, _preflight, _recipe(tmp_path, stub_experts=True)):
        assert message == "" and seconds < 10
