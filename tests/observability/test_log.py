import logging
from collections.abc import Iterator

import pytest

from megatron_ads.layout import rank, world_size
from megatron_ads.observability.log import get_logger, start_logging


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
