"""Read a file that must hold one JSON object."""

import json
from pathlib import Path
from typing import Any

from conversion.errors import DamagedCheckpointError


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        DamagedCheckpointError: If the file holds anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} is not JSON ({error}). Copy it again.") from None
    if not isinstance(found, dict):
        raise DamagedCheckpointError(f"{file} holds a {type(found).__name__}, not a JSON object. Copy it again.")
    return found
