"""Every tolerance has a reason and a twin that exists, and no other number decides a rung."""

import ast
import re
from pathlib import Path

import pytest

from parity_tests.tolerances import ALL, Tolerance

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("tolerance", ALL.values(), ids=ALL)
def test_every_tolerance_has_a_reason_and_a_twin(tolerance: Tolerance) -> None:
    assert 0 < tolerance.value < 10
    assert len(tolerance.reason) > 40
    assert tolerance.twins
    for twin in tolerance.twins:
        file, _, test = twin.partition("::")
        functions = {
            node.name for node in ast.parse((FOLDER / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, twin


def test_every_tolerance_is_used() -> None:
    text = "".join(file.read_text() for file in FOLDER.glob("*.py") if file.name != "tolerances.py")
    assert [name for name in ALL if not re.search(rf"\b{name}\b", text)] == []
    assert len(ALL) >= 10
