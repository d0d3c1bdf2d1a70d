"""Imports point one way, Megatron-Core is reached through few packages, and HF tensor names stay in conversion/."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("megatron_ads", "conversion")

# A module or package imports only what stands before it, or is in the same place. Every one has its place here.
FOUNDATION = (
    "megatron_ads.errors",
    "megatron_ads.disk",
    "megatron_ads.json_fields",
    "megatron_ads.journal",
    "megatron_ads.stable_random",
    "megatron_ads.model_shape",
    "megatron_ads.architecture",
    "megatron_ads.layout",
    "megatron_ads.config",
    "megatron_ads.progress",
)
ROOMS = (
    *FOUNDATION,
    "megatron_ads.cli",  # finds its commands by name
    "conversion",
    "megatron_ads.observability",
    "megatron_ads.reporting",
    "megatron_ads.runtime",
    "megatron_ads.metrics",
    "megatron_ads.rows",  # the records that tasks make and data turns into batches
    "megatron_ads.rollouts",
    "megatron_ads.tasks",
    "megatron_ads.data",
    "megatron_ads.semantic_ids",
    "megatron_ads.downstream",  # rewards put answers into it
    "megatron_ads.losses",
    "megatron_ads.rewards",
    "megatron_ads.models",
    "megatron_ads.optim",
    "megatron_ads.inference",
    "megatron_ads.planning",
    "megatron_ads.training",
    "megatron_ads.launching",
    "megatron_ads.evaluation",
    "megatron_ads.regress",
    "megatron_ads.labelling",
    "megatron_ads.synthesis",  # its command is found by name
    "megatron_ads.user_simulation",
    "megatron_ads.demo_model",
    "megatron_ads.parity",
    "megatron_ads.quickstart",
    "megatron_ads.distillation",  # in the stages of the quickstart
)
MAY_IMPORT_MEGATRON = {f"megatron_ads.{name}" for name in ("runtime", "models", "optim", "training", "planning")}
FOUNDATION_NEEDS = {"hydra", "omegaconf", "yaml"}
PROGRESS_NEEDS = {"tqdm"}
CONVERSION_NEEDS = {"torch", "safetensors", "huggingface_hub", "numpy", "tqdm", "numba"}
HF_TENSOR_NAME = re.compile(r"model\.layers\.|self_attn\.|embed_tokens|lm_head|\b(gate|up|down|q_a|q_b)_proj")


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement, wherever it stands in its file."""

    file: str
    room: str
    target: str

    @property
    def target_room(self) -> str:
        return room_of(self.target)


def room_of(module: str) -> str:
    """Return the longest entry of ROOMS that holds a dotted module name; without one, the name's first two parts."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in ROOMS), ".".join(parts[:2]))


def python_files(root: Path) -> list[Path]:
    return sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))


def module_of(root: Path, file: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(root: Path, file: Path) -> Iterator[Import]:
    """Yield every import of a file, those inside functions and under TYPE_CHECKING too."""
    name, room = str(file.relative_to(root)), room_of(module_of(root, file))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(name, room, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from megatron_ads import errors` imports a module, `from megatron_ads import __version__` a name.
            whole = module == "megatron_ads"
            targets = [f"{module}.{alias.name}" for alias in node.names if not alias.name.startswith("_")]
            yield from (Import(name, room, target) for target in (targets if whole else [module]))


def violations(root: Path) -> list[str]:
    """Return one line for every import that the rules forbid."""
    found = []
    for file in python_files(root):
        for item in imports_of(root, file):
            top = item.target.split(".")[0]
            if reason := _forbidden(item, top):
                found.append(f"{item.file} imports {item.target}: {reason}")
    return found


def _forbidden(item: Import, top: str) -> str | None:
    if item.target.startswith("."):
        return "imports are absolute"
    if top in PACKAGES:
        if item.room == item.target_room:
            return None
        if item.room not in ROOMS or item.target_room not in ROOMS:
            return "it has no place in ROOMS"
        return None if ROOMS.index(item.target_room) < ROOMS.index(item.room) else "imports point one way"
    if top == "megatron":
        return None if item.room in MAY_IMPORT_MEGATRON else "Megatron-Core is reached through few packages"
    if top in sys.stdlib_module_names:
        return None
    own_needs = PROGRESS_NEEDS if item.room == "megatron_ads.progress" else set()
    if item.room in FOUNDATION and top not in FOUNDATION_NEEDS | own_needs:
        return "the foundation needs Hydra only"
    if item.room == "conversion" and top not in CONVERSION_NEEDS:
        return "conversion needs torch and safetensors only"
    return None


def test_imports_point_one_way() -> None:
    assert len(python_files(ROOT)) >= 60
    assert sum(1 for file in python_files(ROOT) for _ in imports_of(ROOT, file)) >= 300
    assert violations(ROOT) == []


def test_folders_form_no_circle() -> None:
    folders: dict[str, set[str]] = {}
    for file in python_files(ROOT):
        folder = _folder_of(module_of(ROOT, file))
        targets = [item.target for item in imports_of(ROOT, file) if item.target.split(".")[0] in PACKAGES]
        folders.setdefault(folder, set()).update({_folder_of(target) for target in targets} - {folder})
    assert len(folders) >= 30
    while folders:  # take away what imports nothing that is left; a circle stays
        ends = [folder for folder, targets in folders.items() if not targets & folders.keys()]
        assert ends, f"these import each other: {sorted(folders)}"
        for end in ends:
            del folders[end]


def _folder_of(module: str) -> str:
    """Return the folder of a module, or the module that stands by itself next to the folders."""
    parts = module.split(".")
    return parts[0] if parts[0] == "conversion" else ".".join(parts[:2])


def test_every_module_has_a_place() -> None:
    rooms = {room_of(module_of(ROOT, file)) for file in python_files(ROOT)} - {"megatron_ads"}
    assert rooms - set(ROOMS) == set()
    assert len(rooms) >= len(FOUNDATION) + 5


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("megatron_ads/layout.py", "from megatron_ads.config.run import SftConfig", "imports point one way"),
        ("megatron_ads/layout.py", "from megatron_ads import config", "imports point one way"),
        ("megatron_ads/architecture.py", "import torch", "the foundation needs Hydra only"),
        ("conversion/plan.py", "from megatron_ads.models.build import x", "imports point one way"),
        ("conversion/plan.py", "def f():\n    from megatron.core import parallel_state", "through few packages"),
        ("conversion/plan.py", "import transformers", "torch and safetensors only"),
        ("megatron_ads/rows.py", "import megatron.core", "through few packages"),
        ("megatron_ads/rows.py", "from .mixing import x", "absolute"),
        ("megatron_ads/models/build.py", "import megatron_ads.training.sft", "imports point one way"),
        ("megatron_ads/models/build.py", "import megatron_ads.helpers", "no place in ROOMS"),
        ("megatron_ads/cli.py", "if TYPE_CHECKING:\n    import megatron", "through few packages"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, reason: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    (line,) = violations(tmp_path)
    assert line.startswith(f"{file} imports ")
    assert reason in line


def test_packages_are_docstrings_and_the_top_one_a_version() -> None:
    packages = [file for file in python_files(ROOT) if file.name == "__init__.py"]
    assert len(packages) >= 8
    for file in packages:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        assert isinstance(body[0], ast.Expr), f"{file} has no docstring"
        rest = body[1:]
        if file == ROOT / "megatron_ads" / "__init__.py":
            assert [ast.unparse(node).split(" ")[0] for node in rest] == ["__version__"]
        else:
            assert rest == [], f"{file} holds code"


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [file for file in python_files(ROOT) if drawers & set(file.with_suffix("").parts)] == []


def hf_names_in(file: Path) -> list[str]:
    """Return the string constants of a file that name HF tensors; docstrings may explain them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and HF_TENSOR_NAME.search(node.value)
    ]


def test_hf_tensor_names_stay_in_conversion() -> None:
    files = python_files(ROOT)
    outside = {str(file.relative_to(ROOT)): hf_names_in(file) for file in files if "conversion" not in file.parts}
    assert {name: found for name, found in outside.items() if found} == {}
    inside = [file for file in files if file.is_relative_to(ROOT / "conversion") and hf_names_in(file)]
    assert ROOT / "conversion" / "names.py" in inside  # the search does find them


@pytest.mark.parametrize("module", ["megatron_ads.cli", "megatron_ads.config.recipes", "conversion", "conversion.cli"])
def test_importing_the_light_modules_loads_neither_torch_nor_megatron(module: str) -> None:
    code = (
        f"import sys, {module}; print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_conversion_works_where_megatron_and_transformers_are_not_installed() -> None:
    modules = [module_of(ROOT, file) for file in python_files(ROOT) if file.is_relative_to(ROOT / "conversion")]
    assert len(modules) >= 20
    code = (
        "import importlib, sys\n"
        "for name in ('megatron', 'transformers', 'tokenizers'):\n    sys.modules[name] = None\n"
        "for name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code, *modules], check=True, timeout=120)


def imports_of_tests(root: Path) -> list[str]:
    """Return the files of parity_tests and benchmarks that import ``tests``, also in code that they run elsewhere."""
    files = sorted(file for name in ("parity_tests", "benchmarks") for file in (root / name).rglob("*.py"))
    assert files
    return [str(file.relative_to(root)) for file in files if _IMPORT_OF_TESTS.search(file.read_text(encoding="utf-8"))]


_IMPORT_OF_TESTS = re.compile(r"\b(from|import) tests\b")


def test_the_release_gate_and_the_benchmarks_need_no_tests() -> None:
    assert imports_of_tests(ROOT) == []


@pytest.mark.parametrize(
    "text", ["from tests.a import b", "def f():\n    import tests", "code = 'from tests import a'"]
)
def test_a_planted_import_of_tests_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "planted.py").write_text(text)
    assert imports_of_tests(tmp_path) == ["benchmarks/planted.py"]
