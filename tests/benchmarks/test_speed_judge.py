"""Slower is judged by ratios: a busy machine is no finding, and a slowdown is one on a busy machine too."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.speed.baselines import machine_class, read_baselines, save_baselines
from benchmarks.speed.judge import Outcome, judge
from benchmarks.speed.measure import Comparison, Share, clocked, in_turn
from megatron_ads.errors import DataError


def comparison(work: Sequence[float], reference: Sequence[float], *, tolerance: float = 0.1) -> Comparison:
    return Comparison(
        name="case/one", work="w", reference="r", work_seconds=work, reference_seconds=reference, tolerance=tolerance
    )


def rounds(draw: random.Random, *, slower: float = 1.0, busy: float = 0.0, count: int = 20) -> Comparison:
    """Work as fast as its reference, each up to 2 % off; in a share ``busy`` of the halves of rounds, another runs."""

    def seconds(length: float) -> float:
        disturbed = 1 + draw.random() if draw.random() < busy else 1.0
        return length * disturbed * draw.uniform(0.98, 1.02)

    return comparison([seconds(slower) for _ in range(count)], [seconds(1.0) for _ in range(count)])


def test_the_ratio_is_the_median_of_the_rounds_in_speeds_of_the_reference() -> None:
    # 2 / 1, 2 / 4, 2 / 2: as fast as the reference in the median round. Three times the work: three times as fast.
    found = comparison([1.0, 4.0, 2.0], [2.0, 2.0, 2.0])
    assert found.ratio == pytest.approx(1.0)
    more = Comparison(name="x", work="", reference="", work_seconds=[1.0, 2.0], reference_seconds=[1.0, 2.0], amount=3)
    assert more.ratio == pytest.approx(3.0)


def test_the_error_is_that_of_a_median() -> None:
    # Logarithms 0, 1, 2, 3, 4: quartiles 0.5 and 3.5. 1.2533 * 3 / 1.349 / sqrt(5) = 1.2464.
    found = comparison([math.exp(-k) for k in range(5)], [1.0] * 5)
    assert found.error == pytest.approx(1.2464, abs=1e-4)


def test_a_slowdown_within_the_tolerance_is_none_and_one_beyond_it_is() -> None:
    # No spread: the limit is 2 * exp(-0.1) = 1.8097.
    baseline = {"ratio": 2.0, "error": 0.0}
    outcomes = {}
    for reference in (1.82, 1.80, 2.3):
        outcomes[reference] = judge(comparison([1.0] * 5, [reference] * 5).as_json(), baseline)
    assert [one.outcome for one in outcomes.values()] == [Outcome.same, Outcome.slower, Outcome.faster]
    assert str(outcomes[1.80]) == "case/one is slower: ratio now 1.800, of the baseline 2.000, limit 1.810"
    assert [one.failed for one in outcomes.values()] == [False, True, False]


def test_absolute_time_does_not_matter() -> None:
    baseline = {"ratio": 1.0, "error": 0.0}
    assert judge(comparison([7.0] * 5, [7.0] * 5).as_json(), baseline).outcome is Outcome.same


def test_where_rounds_vary_too_much_nothing_is_said() -> None:
    # Errors as above: 3 * 1.2464 is beyond log 2. A ratio far below that is slower all the same.
    wild = [math.exp(-k) for k in range(5)]
    ratio = comparison(wild, [1.0] * 5).ratio
    assert judge(comparison(wild, [1.0] * 5).as_json(), {"ratio": ratio, "error": 0.0}).outcome is Outcome.too_noisy
    far = judge(comparison(wild, [1.0] * 5).as_json(), {"ratio": 100 * ratio, "error": 0.0})
    assert far.outcome is Outcome.slower


def test_a_busy_machine_is_no_slowdown_and_does_not_hide_one() -> None:
    # Half of all measurements take up to twice as long. A slowdown is by half of the time.
    draw, found = random.Random(0), {1.0: 0, 1.5: 0}
    for slower in found:
        for _ in range(200):
            baseline = rounds(draw).as_json()
            now = rounds(draw, slower=slower, busy=0.5, count=60)
            found[slower] += judge(now.as_json(), baseline).outcome is Outcome.slower
    assert found[1.0] == 0
    assert found[1.5] > 140, found


def test_a_share_is_met_or_missed_whatever_the_baseline() -> None:
    found = [judge(Share(name="s", about="", value=value, least=0.98).as_json(), None) for value in (0.98, 0.979)]
    assert [one.outcome for one in found] == [Outcome.met, Outcome.missed]
    assert str(found[1]) == "s: 0.9790, and must be 0.9800 at least"


def test_without_a_baseline_nothing_is_slower() -> None:
    assert judge(comparison([1.0] * 5, [1.0] * 5).as_json(), None).outcome is Outcome.no_baseline


def test_works_take_turns_in_both_orders_and_the_warm_up_does_not_count() -> None:
    done: list[str] = []

    def work(name: str, seconds: float) -> float:
        done.append(name)
        return seconds

    works = {"a": lambda: work("a", float(len(done))), "b": lambda: work("b", float(len(done)))}
    found = in_turn(works, seconds=0.0, least=2, warm_up=1)
    assert done == ["b", "a", "a", "b", "b", "a"]
    # Each takes as many seconds as there were works before it; the first two are the warm-up.
    assert found == {"a": [2.0, 5.0], "b": [3.0, 4.0]}


def test_rounds_go_on_for_as_long_as_there_is_time_and_not_beyond_the_most() -> None:
    assert len(in_turn({"a": lambda: 0.0}, seconds=60.0, least=1, most=7)["a"]) == 7


def test_a_sleep_counts_as_time() -> None:
    import time

    assert clocked(lambda: time.sleep(0.05))() >= 0.05


@pytest.mark.parametrize(
    ("cpu", "cores", "gpus", "name"),
    [
        ("Intel(R) Xeon(R) Processor", 2, [], "intel-xeon-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", 16, [], "intel-xeon-platinum-8488c-16-cores"),
        ("AMD EPYC 9V84 96-Core Processor", 8, ["NVIDIA H200"] * 2, "amd-epyc-9v84-8-cores-nvidia-h200"),
    ],
)
def test_machines_of_one_class_have_one_name(cpu: str, cores: int, gpus: list[str], name: str) -> None:
    assert machine_class({"cpu": cpu, "cores": cores, "gpus": gpus}) == name


def test_a_saved_baseline_replaces_those_of_the_same_name_and_size(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    one, other = comparison([1.0] * 5, [2.0] * 5).as_json(), comparison([1.0] * 5, [3.0] * 5).as_json()
    save_baselines(
        file, "quick", [one, {**one, "name": "case/two"}, {"name": "share", "least": 1.0}], {"revision": "a"}
    )
    save_baselines(file, "quick", [other], {"revision": "b"})
    save_baselines(file, "full", [one], {"revision": "b"})
    found = read_baselines(file, "quick")
    assert {name: (each["ratio"], each["revision"]) for name, each in found.items()} == {
        "case/one": (pytest.approx(3.0), "b"),
        "case/two": (pytest.approx(2.0), "a"),
    }
    assert read_baselines(file, "full")["case/one"]["ratio"] == pytest.approx(2.0)
    assert read_baselines(tmp_path / "none.json", "quick") == {}


def test_a_file_that_holds_no_baselines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"quick": {"case": {"ratio": "fast"}}}')
    with pytest.raises(DataError, match="holds no baselines"):
        read_baselines(tmp_path / "other.json", "quick")
