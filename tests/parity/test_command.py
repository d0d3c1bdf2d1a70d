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
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.parity.command import random_prompts, read_prompts, require_memory, summary
from megatron_ads.parity.verdict import RungResult
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


@pytest.mark.parametrize("command", ["parity --hf FOLDER --out OUT", "compare-logits FOLDER FOLDER"])
@pytest.mark.parametrize("tokens", ["100000000", "9" * 30])
def test_a_length_that_does_not_fit_the_memory_is_refused_before_it_is_tried(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, tokens: str
) -> None:
    words = command.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path / "out")).split()
    assert main([*words, "--tokens", tokens]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "GB of memory (4 heads, a vocabulary of 64)" in line
    assert not (tmp_path / "out").exists()


def test_what_is_needed_grows_with_the_square_of_the_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ads.runtime.device.free_memory_bytes", lambda: 12 * 4 * 1000**2)
    shape = open_source(folder).shape
    require_memory(shape, 1000)
    with pytest.raises(ConfigError, match=r"about 0\.2 GB"):
        require_memory(shape, 2000)
    with pytest.raises(ConfigError):
        require_memory(shape, 1000, weights=1)


def test_the_rungs_that_failed_are_named_last(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        RungResult(rung=rung, name=name, passed=passed, detail="")
        for rung, name, passed in ((1, "names", True), (3, "logits", False), (6, "MTP", False), (8, "layouts", None))
    ]
    assert "FAILED: rung 3 (logits), 6 (MTP); the first is where to look" in summary(results, Path("out"))
    assert "FAILED: rung" not in summary(results[:1], Path("out"))


@pytest.mark.parametrize("place", ["parity.json", "parity.html"])
def test_a_report_that_cannot_be_written_is_refused_before_the_layers_are_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ads.parity.command._stream", lambda *_: pytest.fail("the layers were run"))
    (tmp_path / place).mkdir()
    assert main(["parity", "--hf", str(folder), "--tokens", "8", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / place} cannot be read or written (Is a directory)" in line
