"""The convert and verify commands: exit statuses, dry run, and R1 planned whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.cli import parse_bytes
from conversion.sparse_r1 import write_sparse
from megatron_ads.cli import main
from parity_tests.harness.hf_checkpoints import EDGE, fp8_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp8_checkpoint(tmp_path_factory.mktemp("source") / "hf", EDGE)


def test_there_and_back_again(source, tmp_path, capsys):
    shards, back = str(tmp_path / "shards"), str(tmp_path / "back")
    assert main(["convert", "to-megatron", str(source), shards, "--pp", "2", "--ep", "4"]) == 0
    assert main(["verify", str(source), shards]) == 0
    assert main(["convert", "to-hf", shards, back, "--dtype", "fp8", "--reference", str(source)]) == 0
    assert "equal" in capsys.readouterr().out
    for file in source.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_torch_dist_is_a_format_like_the_other(source, tmp_path):
    dist = str(tmp_path / "dist")
    assert main(["convert", "to-megatron", str(source), dist, "--format", "torch_dist"]) == 0
    assert main(["verify", dist, str(source)]) == 0


def test_a_difference_is_status_1_and_a_table(source, tmp_path, capsys):
    other = fp8_checkpoint(tmp_path / "other", EDGE, seed=1)
    assert main(["verify", str(source), str(other)]) == 1
    table = capsys.readouterr().out
    assert "values" in table and "decoder.layers.0.input_layernorm.weight" in table and "more; --json" in table
    assert main(["verify", str(source), str(other), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is False
    assert len(result["differences"]) == result["compared"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "to-megatron", "{source}", "{source}"], "holds unrelated files"),
        (["convert", "to-megatron", "{source}", "{source}/out"], "is inside the source"),
        (["convert", "to-megatron", "{tmp}/absent", "{tmp}/out"], "does not exist"),
        (["convert", "to-megatron", "{source}", "{tmp}/file/out"], "file/out cannot be read or written"),
        (["convert", "to-megatron", "{source}", "{tmp}/file/out", "--dry-run"], "cannot be read or written"),
        (["convert", "to-megatron", "{source}", "{tmp}/out", "--pp", "3"], "4 decoder layers"),
        (["convert", "to-megatron", "{source}", "{tmp}/out", "--etp", "1000000000"], "136 routed-expert columns"),
        (
            ["convert", "to-megatron", "{source}", "{tmp}/out", "--format", "torch_dist", "--pp", "2"],
            "--pp cannot take",
        ),
        (["convert", "to-megatron", "{source}", "{tmp}/out", "--layer-spec", "te"], "--layer-spec cannot take"),
        (
            ["convert", "to-hf", "{source}", "{tmp}/out", "--reference", "{source}", "--max-shard-size", "1MB"],
            "--max-shard-size cannot take effect",
        ),
        (["convert", "to-hf", "{tmp}", "{tmp}/out"], "is not a checkpoint"),
        (["verify", "{source}", "{tmp}"], "is not a checkpoint"),
    ],
    ids=[
        *(
            "foreign",
            "inside",
            "no source",
            "below a file",
            "dry run",
            "stages",
            "etp",
            "torch_dist layout",
            "shards layer spec",
        ),
        *("reference and size", "not a checkpoint", "verify nothing"),
    ],
)
def test_what_cannot_be_carried_out_is_one_line_and_status_2(source, tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    filled = [argument.format(source=source, tmp=tmp_path) for argument in arguments]
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    target = tmp_path / "shards"
    arguments = ["convert", "to-megatron", str(source), str(target), "--pp", "2", "--ep", "2", "--dry-run"]
    assert main(arguments) == 0
    assert "4 files" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert main(arguments[:-1]) == 0
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert expected["written_bytes"] == written
    assert expected["source_bytes"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--workers", "x", "'x' is not a whole number of at least 1"), ("--tolerance", "nan", "'nan' is not a number")],
)
def test_a_number_that_is_none_is_refused(source, capsys, option, value, message):
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(source), str(source), option, value])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("500MB", 500 * 10**6), ("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("1.5k", 1500), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


def test_r1_is_planned_for_248_ranks_from_sparse_files(tmp_path):
    write_sparse(tmp_path / "r1")
    files = list(tmp_path.glob("r1/*.safetensors"))
    assert len(files) == 163
    assert sum(file.stat().st_blocks * 512 for file in files) < 50e6
    index = json.loads((tmp_path / "r1" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 91_991
    command = [
        *(sys.executable, "-c", _MEASURED, "convert", "to-megatron", str(tmp_path / "r1"), str(tmp_path / "out")),
        *("--pp", "31", "--ep", "8", "--last-stage-layers", "1", "--dry-run", "--json"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    plan, measured = map(json.loads, result.stdout.splitlines())
    assert plan["files"] == 248
    assert measured["peak_bytes"] < 1e9
    # Parameters per rank of each stage, counted on models built by Megatron-Core itself, in billions:
    # 2.0936 (embedding, 2 dense layers), 2.2258 (dense, MoE), 28 x 3.2846 (2 MoE), 5.2407 (MoE, MTP, head); BF16.
    billions = 2.0936 + 2.2258 + 28 * 3.2846 + 5.2407
    assert plan["written_bytes"] == pytest.approx(8 * billions * 2e9, rel=1e-4)


# The kernel's high-water mark begins anew with a program; ru_maxrss takes over that of the process that started it.
_MEASURED = """
import json, pathlib, re, sys
from megatron_ads.cli import main
status = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(json.dumps({"peak_bytes": int(peak[1]) * 1024}))
sys.exit(status)
"""
