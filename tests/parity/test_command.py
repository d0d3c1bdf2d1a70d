"""What `megatron-ads parity` refuses, and where its prompts come from; the check itself is rung 11 of the ladder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.sources import open_source
from megatron_ads.cli import main
from megatron_ads.data.chat import load_tokenizer
from megatron_ads.data.demo_tokenizer import write_tokenizer
from megatron_ads.errors import DataError
from megatron_ads.parity.command import random_prompts, read_prompts
from parity_tests.harness.hf_checkpoints import V2_LITE, V3, bf16_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bf16_checkpoint(tmp_path_factory.mktemp("model") / "v3", V3)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp=two", "--layout has 'tp=two'; write sizes of tp, pp, vpp, ep, etp"),
        ("dp=2,ep=2", "--layout has 'dp=2'"),
        ("ep=3", "8 routed experts cannot be spread evenly over layout.ep = 3"),
    ],
)
def test_a_wrong_layout_is_one_line_with_what_to_write(
    folder: Path, capsys: pytest.CaptureFixture[str], layout: str, message: str
) -> None:
    assert main(["parity", "--hf", str(folder), "--layout", layout]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_checkpoints_of_two_models_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bf16_checkpoint(tmp_path / "other", V2_LITE)
    assert main(["parity", "--hf", str(folder), "--megatron", str(other)]) == 2
    assert "another model" in capsys.readouterr().err


def test_prompts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("running shoes\n")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        read_prompts(file, tmp_path, max_tokens=8)


def test_prompts_are_cut_lines_of_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    file = tmp_path / "prompts.txt"
    file.write_text("running shoes for men\n\nred\n")
    long, short = read_prompts(file, tmp_path, max_tokens=2)
    tokenizer = load_tokenizer(tmp_path)
    assert long.tolist() == tokenizer.encode("running shoes for men")[:2]
    assert short.tolist() == tokenizer.encode("red")[:2]


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("\n \n", "holds no line")])
def test_prompts_that_are_not_there_are_refused(folder: Path, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(file, folder, max_tokens=8)


def test_random_prompts_are_the_same_every_time(folder: Path) -> None:
    vocabulary = open_source(folder).shape.vocab_size
    first, second = (random_prompts(vocabulary, count=2, tokens=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [len(row) for row in first] == [5, 5]
    assert max(int(row.max()) for row in first) < vocabulary


def test_the_command_runs_in_a_process_where_nothing_of_megatron_is_imported_yet(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ads.cli", "parity", "--hf", str(folder), "--json", "--tokens", "8"]
    command += ["--rows", "1", "--out", str(tmp_path / "parity")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout)["passed"] is True
