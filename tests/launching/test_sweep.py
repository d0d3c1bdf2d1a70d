"""Every element of a job array takes its own line and its own folder."""

from pathlib import Path

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.launching.sweep import SWEEP_VARIABLE, sweep_line, sweep_overrides

RECIPE, BASE = "sft/quickstart", ["model.load=x", "log.dir=runs/s"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.txt"
    file.write_text("# rates\noptim.learning_rate=1e-3\n\noptim.learning_rate=2e-3 'data.sources=[{kind: builtin}]'\n")
    return file


def test_lines_are_counted_without_comments_and_split_as_a_shell_does(sweep: Path) -> None:
    found = [sweep_overrides(index, RECIPE, BASE, {SWEEP_VARIABLE: str(sweep)}) for index in (0, 1)]
    assert found == [
        ["optim.learning_rate=1e-3", "log.dir=runs/s/sweep-0"],
        ["optim.learning_rate=2e-3", "data.sources=[{kind: builtin}]", "log.dir=runs/s/sweep-1"],
    ]


def test_outside_of_an_array_there_is_no_sweep() -> None:
    assert sweep_overrides(None, RECIPE, BASE, {}) == []


def test_a_sweep_and_an_array_belong_together(sweep: Path) -> None:
    with pytest.raises(ConfigError, match="this is no job array"):
        sweep_overrides(None, RECIPE, BASE, {SWEEP_VARIABLE: str(sweep)})
    with pytest.raises(ConfigError, match="all elements would do the same"):
        sweep_overrides(3, RECIPE, BASE, {})


def test_an_element_without_a_line_is_refused(sweep: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 lines, 0 to 1, but this is element 2.*--array=0-1"):
        sweep_line(sweep, 2)
    sweep.with_name("empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no line"):
        sweep_line(sweep.with_name("empty"), 0)
    with pytest.raises(ConfigError, match="does not exist"):
        sweep_line(sweep.with_name("absent"), 0)


def test_a_quote_left_open_names_the_line(sweep: Path) -> None:
    sweep.write_text("train.max_steps=3 'data.sources=[]\n")
    with pytest.raises(ConfigError, match=r"train\.max_steps=3 .* for element 0: No closing quotation"):
        sweep_overrides(0, RECIPE, BASE, {SWEEP_VARIABLE: str(sweep)})


def test_elements_do_not_share_checkpoints(sweep: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.dir is runs/same for every element"):
        sweep_overrides(0, RECIPE, [*BASE, "checkpoint.dir=runs/same"], {SWEEP_VARIABLE: str(sweep)})
