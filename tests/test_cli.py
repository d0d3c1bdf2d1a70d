"""The command line: instant help, one line for a user's mistake, documented exit statuses."""

import argparse
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from pickle import PicklingError

import httpx2
import jinja2
import pyarrow
import pytest
import safetensors

from megatron_ads import __version__, cli
from megatron_ads.errors import CheckpointError, ConfigError

COMMAND_LINES = [
    [],
    ["convert"],
    ["convert", "to-megatron"],
    ["convert", "to-hf"],
    ["convert", "grow-vocabulary"],
    ["verify"],
    ["demo-model"],
    ["check"],
    ["data"],
    ["data", "simulate"],
    ["data", "preview"],
    ["data", "cook"],
    ["train"],
    ["compare-logits"],
    ["evaluate"],
    ["regress"],
    ["label"],
    ["distill"],
    ["downstream"],
    ["downstream", "train"],
    ["downstream", "evaluate"],
    ["downstream", "rows"],
    ["downstream", "features"],
    ["users"],
    ["users", "browse"],
    ["users", "agents"],
    ["users", "converse"],
    ["sid"],
    ["sid", "fit"],
    ["sid", "encode"],
    ["parity"],
    ["plan"],
    ["quickstart"],
]
HEAVY = ("torch", "megatron", "transformers", "safetensors", "numpy", "tokenizers")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ads.cli", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", COMMAND_LINES, ids=lambda words: " ".join(words) or "(none)")
def test_help_imports_nothing_heavy_and_says_what_the_command_is(words: list[str]) -> None:
    # Measured in imports, not in seconds: that does not depend on how busy the machine is.
    code = (
        "import sys\n"
        "from megatron_ads.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.startswith(f"usage: {' '.join(['megatron-ads', *words])}")
    assert answer.stdout.rstrip().endswith("heavy: []")
    assert len(answer.stdout.splitlines()) > 8


def test_every_command_is_listed_and_covered_above() -> None:
    answer = run_cli("--help")
    assert answer.returncode == 0
    assert {words[0] for words in COMMAND_LINES if words} == {command.name for command in cli.COMMANDS}
    for command in cli.COMMANDS:
        assert command.name in answer.stdout
        assert command.summary in answer.stdout


def test_version_is_the_packages() -> None:
    assert run_cli("--version").stdout == f"megatron-ads {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["train", "--nonsense"],
        ["train", "--recipe", "r", "a.b=1", "--ranks", "1", "word"],
        ["train", "--recipe", "r", "a.b=1", "--nonsense=1"],
        ["verify", "one", "two", "--workers", "1", "a.b=1"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read_exits_2(arguments: list[str]) -> None:
    answer = run_cli(*arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage: megatron-ads")


def test_settings_may_stand_on_either_side_of_an_option() -> None:
    answer = run_cli("train", "--recipe", "sft/small", "model.load=x", "--ranks", "1", "train.stepz=3")
    assert answer.returncode == 2
    assert answer.stderr.startswith(
        "megatron-ads: sft/small: train.stepz is not a setting; did you mean train.max_steps?"
    )


def test_a_users_mistake_is_one_line_and_exit_2(tmp_path: Path) -> None:
    answer = run_cli("verify", str(tmp_path / "absent"), str(tmp_path))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("megatron-ads: ")
    assert answer.stderr.count("\n") == 1
    assert "absent" in answer.stderr


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int]], None]:
    """Replace the commands by one named ``probe`` that runs the given function."""

    def install(run: Callable[[argparse.Namespace], int]) -> None:
        module = types.ModuleType("probe_command", "Probe.")
        module.add_arguments = lambda parser: parser.add_argument("--size", type=int, default=3)  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setattr(cli, "COMMANDS", (cli.Command("probe", "probe", "probe_command"),))

    return install


Install = Callable[[Callable[[argparse.Namespace], int]], None]


def failing_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_status_of_the_command_is_the_exit_status(command: Install, status: int) -> None:
    command(lambda args: status if args.size == 7 else 99)
    assert cli.main(["probe", "--size", "7"]) == status


@pytest.mark.parametrize(
    "error", [ConfigError("layout.tp is 0;\n  raise it."), CheckpointError("layout.tp is 0; raise it.")]
)
def test_every_error_of_ours_is_one_line(
    command: Install, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    command(failing_with(error))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "megatron-ads: layout.tp is 0; raise it.\n"


def test_an_interrupt_is_130(command: Install, capsys: pytest.CaptureFixture[str]) -> None:
    command(failing_with(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "megatron-ads: interrupted\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("the disk is full"), "the disk is full. Check"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b cannot be read or written (Permission denied). Check"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "There is not enough memory"),
        (MemoryError(), "There is not enough memory (MemoryError)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "A file or a name is not UTF-8 text"),
        (json.JSONDecodeError("Expecting value", "", 0), "json: Expecting value: line 1 column 1 (char 0). Check"),
        (safetensors.SafetensorError("HeaderTooSmall"), "safetensors: HeaderTooSmall. Check"),
        (pyarrow.lib.ArrowInvalid("no column x\nand more"), "pyarrow: no column x. Check"),
        (jinja2.UndefinedError("'x' is undefined"), "jinja2: 'x' is undefined. Check"),
        (httpx2.ConnectError("refused"), "httpx2: refused. Check"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_or_a_library_refuses_is_one_line(
    command: Install, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    command(failing_with(error))
    assert cli.main(["probe"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-ads: {message}")


def test_what_led_to_a_refusal_is_shown_on_request(
    command: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(failing_with(json.JSONDecodeError("Expecting value", "", 0)))
    assert cli.main(["probe"]) == 2
    assert "MEGATRON_ADS_TRACEBACK=1 shows where" in capsys.readouterr().err
    monkeypatch.setenv("MEGATRON_ADS_TRACEBACK", "1")
    assert cli.main(["probe"]) == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith("megatron-ads: json: Expecting value")
    assert "test_cli.py" in errors, "the line that raised it is not shown"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug"), PicklingError("a bug")]
)
def test_other_errors_keep_their_traceback(command: Install, error: Exception) -> None:
    command(failing_with(error))
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = (
        "import argparse, sys, types\n"
        "from megatron_ads import cli\n"
        "module = types.ModuleType('probe', 'Probe.')\n"
        "module.add_arguments = lambda parser: None\n"
        "module.run = lambda args: [print('x' * 1000) for _ in range(1000)] and 0\n"
        "sys.modules['probe'] = module\n"
        "cli.COMMANDS = (cli.Command('probe', 'probe', 'probe'),)\n"
        "sys.exit(cli.main(['probe']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141
