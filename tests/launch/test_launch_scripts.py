"""The launch scripts, run for real in a copy of the project; only Python and df are stand-ins where a test says so."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
COPIED = ("launch", "constraints.txt", "setup.py")

# Answers the questions that setup_env.sh asks of a Python; writes down what pip is asked to do.
STAND_IN_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*version_info*) case "$STAND_IN_VERSION" in 3.1[123].*) ;; *) exit 1 ;; esac ;;
    "-c "*platform*) echo "$STAND_IN_VERSION" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/megatron-ads" ;;
    "-m pip") echo "pip $*" >>"$STAND_IN_CALLS"; sleep "${STAND_IN_PIP_SECONDS:-0}"
        test -z "$STAND_IN_PIP_ERROR" || { echo "$STAND_IN_PIP_ERROR"; exit 1; } ;;
    *) echo "$(basename "$0") $*" ;;
esac
"""
NAMES_LOOKED_FOR = ("python3", "python3.11", "python3.12", "python3.13")


@dataclass
class Machine:
    """A copy of the launch scripts, and the environment variables they are run with."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def pip_calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def stand_in(self, name: str, script: str) -> None:
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.project / "launch" / script), *arguments],
            env={
                "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
                "HOME": str(self.folder),
                "STAND_IN_CALLS": str(self.folder / "calls"),
                "STAND_IN_VERSION": "3.11.9",
                **self.variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(script, process.returncode, stdout, stderr)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "project").mkdir()
    for name in COPIED:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy2
        copy(PROJECT / name, tmp_path / "project" / name)
    made = Machine(tmp_path)
    for name in NAMES_LOOKED_FOR:
        made.stand_in(name, STAND_IN_PYTHON)
    return made


def assert_ends_in_one_line(result: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert result.returncode == status, result
    assert result.stderr.startswith("set-up: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("version", ["3.9.18", "3.14.0"])
def test_a_wrong_python_ends_in_one_line_that_says_which_is_needed(machine: Machine, version: str) -> None:
    machine.variables["STAND_IN_VERSION"] = version
    result = machine.run("quickstart.sh")
    assert_ends_in_one_line(result, 3, "3.11 to 3.13", f"python3 is {version}", "apt-get install python3.11")
    assert not (machine.project / ".venv").exists()


def test_no_python_at_all_ends_in_one_line(machine: Machine) -> None:
    for name in NAMES_LOOKED_FOR:
        machine.stand_in(name, "#!/bin/sh\nexit 127\n")
    assert_ends_in_one_line(machine.run("test.sh"), 3, "python3 is not there")


def test_an_older_python3_does_not_hide_a_newer_one_under_its_own_name(machine: Machine) -> None:
    old = STAND_IN_PYTHON.replace("#!/bin/sh\n", "#!/bin/sh\nSTAND_IN_VERSION=3.9.18\n")
    for name in ("python3", "python3.11", "python3.13"):
        machine.stand_in(name, old)
    result = machine.run("setup_env.sh")
    assert result.returncode == 0, result
    assert "with Python 3.11.9" in result.stdout  # what the stand-in called python3.12 says of itself


def test_a_python_asked_for_by_name_is_checked_too(machine: Machine) -> None:
    machine.variables |= {"MEGATRON_ADS_PYTHON": "python3", "STAND_IN_VERSION": "3.9.18"}
    assert_ends_in_one_line(machine.run("setup_env.sh"), 3, "MEGATRON_ADS_PYTHON is python3 (3.9.18)")


def test_a_full_disk_ends_in_one_line_with_both_numbers(machine: Machine) -> None:
    header = "Filesystem 1048576-blocks Used Available Capacity Mounted on"
    machine.stand_in("df", f"#!/bin/sh\necho '{header}'\necho '/dev/vda 9000 8700 300 97% /'\n")
    result = machine.run("quickstart.sh")
    assert_ends_in_one_line(result, 4, "needs 4000 MB", "300 MB free", "MEGATRON_ADS_VENV")
    assert not (machine.project / ".venv").exists()


def test_a_disk_that_fills_up_while_installing_is_named_as_such(machine: Machine) -> None:
    machine.variables["STAND_IN_PIP_ERROR"] = "ERROR: Could not install packages: [Errno 28] No space left on device"
    assert_ends_in_one_line(machine.run("setup_env.sh"), 4, "became full while installing torch")


def test_a_folder_that_cannot_be_written_ends_in_one_line(machine: Machine) -> None:
    (machine.folder / "file").write_text("")
    machine.variables["MEGATRON_ADS_VENV"] = str(machine.folder / "file" / "venv")
    assert_ends_in_one_line(machine.run("setup_env.sh"), 4, "cannot be written", "MEGATRON_ADS_VENV")


@pytest.mark.slow
def test_a_broken_download_ends_in_one_line_and_is_done_again(machine: Machine) -> None:
    # The real Python and the real pip, with a package index where nobody listens.
    machine.variables |= {
        "MEGATRON_ADS_PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "1",
    }
    for attempt in (1, 2):
        result = machine.run("setup_env.sh")
        assert_ends_in_one_line(result, 5, "torch could not be downloaded", "index did not answer", ".venv.log")
        assert ("an earlier set-up was interrupted" in result.stdout) == (attempt == 2)


def test_torch_is_installed_first_and_everything_under_the_constraints(machine: Machine) -> None:
    result = machine.run("setup_env.sh")
    assert (result.returncode, result.stderr) == (0, "")
    first, second = machine.pip_calls
    constraints = f"-c {machine.project}/constraints.txt"
    assert first.endswith(f"{constraints} torch setuptools")
    assert constraints in second
    assert second.endswith(f"-e {machine.project}[dev]")
    assert "\ntorch==" in (machine.project / "constraints.txt").read_text()


def test_a_package_that_does_not_exist_is_told_from_a_broken_network(machine: Machine) -> None:
    machine.variables["STAND_IN_PIP_ERROR"] = "ERROR: No matching distribution found for torch==2.13.0"
    result = machine.run("setup_env.sh")
    assert_ends_in_one_line(
        result, 5, "could not be installed: ERROR: No matching distribution found for torch==2.13.0"
    )


def test_an_index_for_torch_is_asked_for_torch_alone(machine: Machine) -> None:
    machine.variables["MEGATRON_ADS_TORCH_INDEX"] = "https://example.invalid/cpu"
    assert machine.run("setup_env.sh").returncode == 0
    assert ["example.invalid/cpu" in call for call in machine.pip_calls] == [True, False]


def test_the_test_matrix_has_an_environment_of_its_own_and_passes_arguments_on(machine: Machine) -> None:
    result = machine.run("test_matrix.sh", "tests/models/test_norm.py", "-x")
    assert result.returncode == 0, result
    assert (machine.project / ".venv-matrix").is_dir() and not (machine.project / ".venv").exists()
    assert result.stdout.splitlines()[-1] == "python -m pytest -n 0 -m  tests/models/test_norm.py -x"


def test_the_test_matrix_ends_when_its_time_is_up(machine: Machine) -> None:
    machine.variables["MEGATRON_ADS_MATRIX_SECONDS"] = "1"
    slow = STAND_IN_PYTHON.replace('    *) echo "$(basename', '    "-m pytest") sleep 60 ;;\n    *) echo "$(basename')
    for name in NAMES_LOOKED_FOR:
        machine.stand_in(name, slow)
    assert machine.run("test_matrix.sh").returncode == 124


def test_an_environment_that_is_up_to_date_is_used_again(machine: Machine) -> None:
    machine.run("setup_env.sh")
    again = machine.run("setup_env.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(machine.pip_calls) == 2


@pytest.mark.parametrize("file", ["constraints.txt", "setup.py"])
def test_changed_requirements_are_installed(machine: Machine, file: str) -> None:
    machine.run("setup_env.sh")
    with (machine.project / file).open("a") as requirements:
        requirements.write("# changed\n")
    machine.run("setup_env.sh")
    assert len(machine.pip_calls) == 4


def test_an_interrupted_set_up_is_redone_from_the_start(machine: Machine) -> None:
    machine.variables["STAND_IN_PIP_SECONDS"] = "30"
    process = machine.start("setup_env.sh")
    _wait_until_pip_runs(machine)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    leftover = machine.project / ".venv" / "half-installed"
    leftover.write_text("")
    machine.variables["STAND_IN_PIP_SECONDS"] = "0"
    result = machine.run("setup_env.sh")
    assert result.returncode == 0
    assert "an earlier set-up was interrupted" in result.stdout
    assert not leftover.exists()


def test_two_set_ups_at_the_same_time_install_once(machine: Machine) -> None:
    machine.variables["STAND_IN_PIP_SECONDS"] = "0.5"
    first = machine.start("setup_env.sh")
    _wait_until_pip_runs(machine)
    second = machine.run("setup_env.sh")
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting for another set-up" in second.stdout
    assert len(machine.pip_calls) == 2


def _wait_until_pip_runs(machine: Machine) -> None:
    give_up = time.monotonic() + 30
    while not machine.pip_calls:
        assert time.monotonic() < give_up, "pip was not started within 30 s"
        time.sleep(0.02)


def test_the_scripts_pass_their_arguments_on(machine: Machine) -> None:
    assert machine.run("quickstart.sh", "--out", "a b", "--steps", "3").stdout.splitlines()[-1] == (
        "megatron-ads quickstart --out a b --steps 3"
    )
    shared = "python -m pytest -n auto --dist worksteal -m not slow"
    assert machine.run("test.sh", "-x", "tests/launch").stdout == f"{shared} -x tests/launch\n"
    assert machine.run("test_slow.sh", "-x").stdout == f"{shared} -m slow -x\n"
    assert machine.run("test.sh", "tests/test_cli.py").stdout == "python -m pytest -n 0 tests/test_cli.py\n"


def test_help_needs_no_set_up(machine: Machine) -> None:
    result = machine.run("quickstart.sh", "--help")
    assert result.returncode == 0
    assert "--steps N" in result.stdout
    assert not machine.pip_calls
