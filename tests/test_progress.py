import io

import pytest

from megatron_ads import progress
from megatron_ads.progress import Progress, readable_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_with_the_count_and_the_values() -> None:
    log = io.StringIO()
    with Progress(3, initial=1, description="sft", stream=log) as bar:
        bar.update(loss=1.25)
        bar.update(loss=1.0)
    first, last = log.getvalue().splitlines()
    assert first.startswith("sft 2/3, loss 1.25, ")
    assert "left" not in first
    assert last.startswith("sft 3/3, loss 1, ")
    assert "left" not in last
    assert "\r" not in log.getvalue()


def test_a_log_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))  # each look at the clock is one second after the last
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    log = io.StringIO()
    with Progress(35, stream=log) as bar:
        for _ in range(35):
            bar.update()
    # steps 1, 11, 21, 31 are ten seconds apart; 35 is the end
    assert [line.split(",")[0] for line in log.getvalue().splitlines()] == ["1/35", "11/35", "21/35", "31/35", "35/35"]


@pytest.mark.parametrize(("unit", "total", "each", "told"), [("step", 40, 1, "-+++"), ("B", 10**9, 3 * 10**6, "--++")])
def test_how_long_the_rest_takes_is_said_when_it_can_be_known(
    unit: str, total: int, each: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 5))  # five seconds an update, so every second one has a line
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    log = io.StringIO()
    with Progress(total, stream=log, unit=unit) as bar:
        for _ in range(8):
            bar.update(each)
    assert "".join("+" if line.endswith(" left") else "-" for line in log.getvalue().splitlines()) == told


def test_bytes_are_counted_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_SECONDS", 0.0)
    log = io.StringIO()
    with Progress(4_000_000_000, description="writing", stream=log, unit="B") as bar:
        bar.update(1_500_000_000)
    assert log.getvalue().startswith("writing 1.50/4.00 GB, ") and " GB/s, about " in log.getvalue()
    assert bar.seconds > 0
    Progress(1, stream=log, shown=False).update()
    assert len(log.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("each", "seconds", "rate"),
    [
        (1, 90, "90.00 s/row"), (1, 1, "1.00 s/row"), (5, 2, "2.5 rows/s"), (1000, 3, "333 rows/s"),
        (123456, 1, "123456 rows/s"),
    ],
)  # fmt: skip
def test_rates_above_one_a_second_are_told_a_second(
    each: int, seconds: float, rate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    Progress(10**9, stream=log, unit="row").update(each)
    assert log.getvalue().strip().split(", ")[1] == rate


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with Progress(2, description="sft", stream=terminal) as bar:
        bar.update(loss=0.5)
        bar.update(loss=0.25)
    assert "\r" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    assert "loss=0.25" in terminal.getvalue()


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        with Progress(1, stream=stream) as bar:
            bar.update()
    assert log.getvalue() == terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.44, "8.4 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (12000, "3 h 20 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert readable_duration(seconds) == text
