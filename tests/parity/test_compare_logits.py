"""What `megatron-ads compare-logits` refuses; what it compares is in the ladder and the quickstart."""

from pathlib import Path

import pytest

from megatron_ads.cli import main
from parity_tests.harness.hf_checkpoints import V3, bf16_checkpoint


def test_of_two_models_the_setting_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = bf16_checkpoint(tmp_path / "ours", V3 | {"vocab_size": 96})
    theirs = bf16_checkpoint(tmp_path / "theirs", V3)
    assert main(["compare-logits", str(ours), str(theirs)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is another model than" in line
    assert "vocab_size is 96 instead of 64" in line


def test_a_second_folder_that_is_not_hugging_faces_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = bf16_checkpoint(tmp_path / "theirs", V3)
    assert main(["convert", "to-megatron", str(theirs), str(tmp_path / "shards")]) == 0
    capsys.readouterr()
    assert main(["compare-logits", str(theirs), str(tmp_path / "shards")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json" in line


@pytest.mark.parametrize("tokens", ["0", "-1", "many"])
def test_a_length_that_is_none_is_a_wrong_argument(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare-logits", "a", "b", "--tokens", tokens])
    assert ended.value.code == 2
    assert f"{tokens!r} is not a whole number of at least 1" in capsys.readouterr().err
