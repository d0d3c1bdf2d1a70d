"""Every path that a command takes, in every way a path can be wrong: one line, status 2, and nothing left behind."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ads import cli
from megatron_ads.demo_model import write_demo_model
from parity_tests.harness.family import MEMBERS
from tests.regress.learned_questions import write_questions

ROWS = "data.sources=[{kind: builtin, rows: 60}] data.validation_rows=4"
JOB = f"--recipe sft/quickstart --ranks 4 log.dir=NEW {ROWS}"
EVALUATE = f"evaluate --recipe sft/quickstart --max-new-tokens 2 {ROWS}"
REGRESS = "regress --data DATA --benchmark mmlu_stem --limit 1"
LABEL = "label --recipe label/relevance sources=[{kind: builtin, rows: 4}]"
BROWSE = "users browse --recipe users/browse"
COOK = "data cook --recipe cook/simulated teacher.url=http://localhost:9/v1 teacher.model=x"
DISTILL = (
    "distill --recipe distill/simulated teacher.url=http://localhost:9/v1 teacher.model=x "
    "teacher.server_wait_seconds=1 teacher.attempts=1 quality.min_probability=0 judged.settings=[] "
    "judged.recipe=sft/quickstart sources=[{kind: builtin, rows: 4}]"
)

FOLDERS_READ = [
    "convert to-megatron BAD NEW",
    "convert to-megatron BAD NEW --dry-run",
    "convert to-hf BAD NEW",
    "convert to-hf MODEL NEW --reference BAD",
    "convert grow-vocabulary BAD NEW --tokens NEW",
    "convert grow-vocabulary MODEL NEW --sid BAD",
    "verify BAD MODEL",
    "verify MODEL BAD",
    "plan --recipe sft/quickstart --model BAD",
    "plan --recipe sft/quickstart --calibrate BAD --model MODEL",
    f"check {JOB} model.load=BAD",
    f"train {JOB} model.load=BAD",
    "data preview --task query_ad_relevance --tokenizer BAD",
    "data cook --recipe cook/simulated --out NEW teacher.kind=local teacher.model=BAD",
    f"{LABEL} --out NEW model.kind=local model.url=null model.max_tokens=2 model.model=BAD",
    f"{LABEL} --out NEW model.model=x previous=[BAD]",
    f"{BROWSE} --out NEW model.kind=local model.model=BAD",
    f"{DISTILL} --out NEW student.load=BAD",
    "compare-logits BAD MODEL",
    "compare-logits MODEL BAD",
    f"{EVALUATE} --model BAD",
    f"{EVALUATE} --url http://localhost:9/v1 --served-model x --tokenizer BAD",
    "parity --hf BAD --out NEW",
    "parity --hf MODEL --megatron BAD --out NEW",
    f"{REGRESS} --base BAD --tuned MODEL --out NEW",
    f"{REGRESS} --base MODEL --tuned BAD --out NEW",
    f"{REGRESS} --base MODEL --tuned http://localhost:9/v1 --served-model x --tokenizer BAD --out NEW",
]
LOGS_READ = [
    "downstream train --logs BAD --out NEW",
    f"{BROWSE} --out NEW world.logs=BAD",
    "sid encode --codebook BAD --items NEW --text title --out NEW",
    "downstream evaluate --logs NEW --pipeline BAD",
    "downstream rows --logs NEW --pipeline BAD --out NEW",
    "downstream features --logs NEW --pipeline BAD --rows NEW --answers NEW --out NEW",
]
FILES_READ = [
    "convert to-megatron MODEL NEW --recipe BAD",
    "convert grow-vocabulary MODEL NEW --tokens BAD",
    "sid fit --items BAD --text title --out NEW codes=2",
    "plan --recipe BAD --model MODEL",
    "check --recipe BAD model.load=MODEL",
    "train --recipe BAD model.load=MODEL",
    f"check {JOB.replace('kind: builtin, rows: 60', 'kind: jsonl, path: BAD')} model.load=MODEL",
    f"train {JOB.replace('kind: builtin, rows: 60', 'kind: jsonl, path: BAD')} model.load=MODEL",
    "data preview --source BAD",
    "data preview --recipe BAD",
    "data cook --recipe BAD --out NEW",
    "label --recipe BAD --out NEW",
    "users browse --recipe BAD --out NEW",
    "users agents --recipe BAD --out NEW",
    "users converse --recipe BAD --out NEW",
    "label --recipe label/relevance --out NEW model.model=x sources=[{kind: jsonl, path: BAD}]",
    "distill --recipe BAD --out NEW",
    f"{DISTILL.replace('kind: builtin, rows: 4', 'kind: jsonl, path: BAD')} --out NEW student.load=MODEL",
    f"{EVALUATE.replace('sft/quickstart', 'BAD')} --model MODEL",
    f"{EVALUATE.replace('kind: builtin, rows: 60', 'kind: jsonl, path: BAD')} --model MODEL",
    f"{EVALUATE} --model MODEL --names BAD",
    f"evaluate --recipe sft/quickstart {ROWS} --answers BAD",
    f"{EVALUATE} --model MODEL --compare BAD",
    "downstream features --logs NEW --pipeline NEW --rows BAD --answers NEW --out NEW",
    "downstream evaluate --logs NEW --pipeline NEW --features BAD",
    "parity --hf MODEL --prompts BAD --out NEW",
    "quickstart --out NEW data.sources=[{kind: jsonl, path: BAD}]",
]
FOLDERS_WRITTEN = [
    "convert to-megatron MODEL BAD",
    "convert to-hf MODEL BAD",
    "demo-model BAD",
    "demo-model BAD --preset deepseek-r1 --sparse",
    f"check {JOB.replace('NEW', 'BAD')} model.load=MODEL",
    f"train {JOB.replace('NEW', 'BAD')} model.load=MODEL",
    f"check {JOB} checkpoint.dir=BAD model.load=MODEL",
    "data simulate --out BAD --users 100",
    "downstream train --logs MODEL --out BAD",
    "sid fit --items MODEL --text title --out BAD",
    f"{COOK} --out BAD",
    f"{BROWSE} --out BAD",
    f"{LABEL} --out BAD model.model=x",
    f"{DISTILL} --out BAD student.load=MODEL",
    "parity --hf MODEL --out BAD --tokens 8",
    "quickstart --out BAD",
    f"{REGRESS} --base MODEL --tuned MODEL --out BAD",
]
FILES_WRITTEN = [
    "plan --recipe sft/quickstart --model MODEL --html BAD",
    f"{EVALUATE} --model MODEL --answers BAD",
    f"{EVALUATE} --model MODEL --html BAD",
    "downstream rows --logs NEW --pipeline NEW --out BAD",
    "downstream features --logs NEW --pipeline NEW --rows NEW --answers NEW --out BAD",
]

READ_WRONGLY = ("missing", "loop", "below a file", "long name", "forbidden")
WRITTEN_WRONGLY = ("loop", "below a file", "long name", "below a forbidden folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths") / "model"
    write_questions(folder.parent / "data", count=1)
    write_demo_model(folder, MEMBERS["Moonlight-16B-A3B"].config)
    return folder


def make_bad(way: str, place: Path, *, suffix: str = "") -> Path:
    """Return a path in ``place`` that is wrong in one way."""
    bad = place / f"bad{suffix}"
    if way == "loop":
        bad.symlink_to(bad)
    elif way == "below a file":
        (place / "file").write_text("x")
        return place / "file" / bad.name
    elif way == "long name":
        return place / f"{'a' * 300}{suffix}"
    elif way == "a file":
        bad.write_text("x")
    elif way == "a folder":
        bad.mkdir()
    elif way == "a pipe":  # whoever opens it waits until someone writes
        os.mkfifo(bad)
    elif way == "noise":
        bad.write_bytes(bytes(range(256)))
    elif way == "forbidden":
        bad.write_text("{}")
        bad.chmod(0)
    elif way == "forbidden folder":
        bad.mkdir(mode=0)
    elif way == "below a forbidden folder":
        (place / "closed").mkdir(mode=0o555)
        return place / "closed" / bad.name
    return bad


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Have permissions hold for root too: without two capabilities (linux/capability.h) of the current thread."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    held, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc.capget(header, held)
    without[:] = held[:]
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; effective
    libc.capset(header, without)
    try:
        yield
    finally:
        libc.capset(header, held)


def test_permissions_hold_in_these_tests(tmp_path: Path) -> None:
    file = make_bad("forbidden", tmp_path)
    with obeying_permissions(), pytest.raises(PermissionError):
        file.read_text()


def refusal(line: str, bad: Path, model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line in which BAD, MODEL, DATA and NEW stand for paths; return the one line that it prints last."""
    names = {"BAD": str(bad), "MODEL": str(model), "DATA": str(model.parent / "data"), "NEW": str(place / "new")}
    words = _joined(line.split())
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    capsys.readouterr()
    before = _content(place)
    with obeying_permissions():
        status = cli.main(words)
    errors = capsys.readouterr().err
    assert status == 2, errors
    assert "Traceback" not in errors
    assert all(path.is_relative_to(place / "new") for path in _content(place) - before), "something was left behind"
    return errors.splitlines()[-1]


def _joined(words: list[str]) -> list[str]:
    """Return the words of a command line, in which a setting with braces has spaces."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].count("{") > joined[-1].count("}"):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


def _content(place: Path) -> set[Path]:
    return {Path(folder) / name for folder, folders, files in os.walk(place) for name in [*folders, *files]}


CASES = [
    *(
        (line, way, "")
        for line in [*FOLDERS_READ, *LOGS_READ]
        for way in (*READ_WRONGLY, "a file", "noise", "forbidden folder")
    ),
    *((line, way, ".jsonl") for line in FILES_READ for way in (*READ_WRONGLY, "a folder", "noise")),
    *((line, way, "") for line in FOLDERS_WRITTEN for way in (*WRITTEN_WRONGLY, "a file")),
    *((line, way, ".html") for line in FILES_WRITTEN for way in (*WRITTEN_WRONGLY, "a folder", "missing folder")),
]


@pytest.mark.parametrize(("line", "way", "suffix"), CASES)
def test_a_wrong_path_is_one_line(
    line: str, way: str, suffix: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = make_bad(way, tmp_path, suffix=".yaml" if "--recipe BAD" in line else suffix)
    if way == "missing folder":
        bad = tmp_path / "missing" / bad.name
    assert refusal(line, bad, model, tmp_path, capsys).startswith("megatron-ads: ")


WITH_WEIGHTS = [line for line in FOLDERS_READ if not any(word in line for word in ("plan", "data", "--url"))]
WITH_TOKENIZER = [line for line in FOLDERS_READ if any(word in line for word in ("preview", "evaluate"))]
DAMAGED = [
    *((line, "config.json") for line in [*WITH_WEIGHTS, "plan --recipe sft/quickstart --model BAD"]),
    *((line, "model.safetensors.index.json") for line in WITH_WEIGHTS if "evaluate" not in line),
    *((line, "tokenizer.json") for line in WITH_TOKENIZER),
]


@pytest.mark.parametrize(
    ("line", "name", "way"),
    [
        (line, name, way)
        for line, name in DAMAGED
        for way in ("forbidden", "noise", "a folder", "a pipe")
        if line.split()[0] != "verify" or way not in ("noise", "a pipe")  # that damage is what it looks for: status 1
    ],
)
def test_a_file_of_a_checkpoint_that_cannot_be_read_is_one_line(
    line: str, name: str, way: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "damaged"
    bad.mkdir()
    for file in model.iterdir():
        if file.name != name:
            (bad / file.name).hardlink_to(file)
    make_bad(way, tmp_path).rename(bad / name)
    assert refusal(line, bad, model, tmp_path, capsys).startswith("megatron-ads: ")


def test_check_names_every_problem_though_the_system_refuses_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, rows = make_bad("loop", tmp_path), f"[{{kind: jsonl, path: {tmp_path}/no.jsonl}}]"
    job = ["check", "--recipe", "sft/quickstart", f"log.dir={tmp_path}/run", f"model.load={loop}"]
    assert cli.main([*job, f"data.sources={rows}"]) == 2
    errors = capsys.readouterr().err
    assert f"{loop} does not exist or is not a folder" in errors
    assert "no.jsonl (data.sources) does not exist" in errors


def test_every_command_is_walked() -> None:
    walked = {line.split()[0] for line, _, _ in CASES}
    assert walked == {command.name for command in cli.COMMANDS}
