"""The benchmark of small models ends as commands do: with an exit status and one line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.sft_small import main, write_texts
from megatron_ads.config.recipes import load_job
from megatron_ads.data.corpus import read_corpus

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds for what a busy machine does slowly; none passes where all is well."""


def test_an_unknown_variant_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGATRON_ADS_DATA", raising=False)
    assert main(["--out", str(tmp_path), "--variant", "recipee"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.sft_small: There is no variant recipee; there are recipe, adaptive, label_only.\n"
    )


@pytest.mark.timeout(900)
def test_a_termination_is_an_interruption_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sft_small", "--out", str(tmp_path / "out"), "--variant", "recipe"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            give_up = time.monotonic() + PATIENCE
            while not (tmp_path / "out" / "stages" / "model.started").exists():
                assert process.poll() is None and time.monotonic() < give_up
                time.sleep(0.1)
            process.terminate()
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "benchmarks.sft_small: interrupted"
    assert "Traceback" not in said


def test_the_texts_to_learn_from_can_be_held_out(tmp_path: Path) -> None:
    rows = "data.sources=[{kind: simulator, task: next_advertiser, rows: 64}]"
    write_texts(tmp_path / "texts.jsonl", [["data=simulator", rows, "data.validation_rows=8"]])
    texts = f"data.sources=[{{kind: jsonl, path: {tmp_path / 'texts.jsonl'}}}]"
    corpus = read_corpus(load_job("sft/small", ["data=jsonl", texts, "data.validation_rows=8"], sections=["data"]).data)
    assert len(corpus.validation) >= 8 and sum(map(len, corpus.training)) > 32
