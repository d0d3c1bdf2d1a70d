import io
import logging
from collections.abc import Iterator

import pytest

from megatron_ads import progress
from megatron_ads.progress import Progress, get_logger, rank, readable_duration, start_logging, world_size


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
    assert first.endswith(" left")
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


def test_bytes_are_counted_in_gigabytes() -> None:
    log = io.StringIO()
    with Progress(4_000_000_000, description="writing", stream=log, unit="B") as bar:
        bar.update(1_500_000_000)
    assert log.getvalue().startswith("writing 1.50/4.00 GB, ") and " GB/s, about " in log.getvalue()
    assert bar.seconds > 0
    Progress(1, stream=log, shown=False).update()
    assert len(log.getvalue().splitlines()) == 1


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


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("megatron_ads")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def _be_rank(monkeypatch: pytest.MonkeyPatch, number: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world_size()) == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert (rank(), world_size()) == (5, 6)
    _be_rank(monkeypatch, 2, 4)
    assert (rank(), world_size()) == (2, 4)


def test_rank_0_tells_what_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _be_rank(monkeypatch, 0, 4)
    start_logging()
    get_logger("megatron_ads.training").info("loaded %d files", 3)
    assert capsys.readouterr().err.rstrip().endswith("[rank 0 of 4] loaded 3 files")


def test_other_ranks_speak_only_when_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _be_rank(monkeypatch, 3, 4)
    start_logging()
    get_logger("conversion.plan").info("quiet")
    get_logger("conversion.plan").warning("slow disk")
    assert capsys.readouterr().err.rstrip().endswith("[rank 3 of 4] WARNING slow disk")


def test_one_process_needs_no_rank_and_lines_appear_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _be_rank(monkeypatch, 0, 1)
    start_logging()
    start_logging()
    get_logger("megatron_ads.x").info("hello")
    assert capsys.readouterr().err.count("hello") == 1
    get_logger("megatron_ads.x").info("again")
    assert "rank" not in capsys.readouterr().err
