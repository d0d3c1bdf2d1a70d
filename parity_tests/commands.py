"""What a rank runs to carry out a command line of the project."""

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_ads import cli
from parity_tests.code_errors import CODE_ERRORS


def parity(arguments: Sequence[str], out: Path, error: str | None = None) -> tuple[int, dict[str, Any]]:
    """Run ``megatron-ads parity``, with a deliberate error of ``code_errors`` or none; return status and report."""
    words = ["parity", *arguments, "--out", str(out)]
    if error is None:
        status = cli.main(words)
    else:
        with CODE_ERRORS[error]():
            status = cli.main(words)
    return status, json.loads((out / "parity.json").read_text())


def most_layers_alive(arguments: Sequence[str], out: Path) -> int:
    """Run ``megatron-ads parity`` and return how many layers, of either side, were in memory at any one time."""
    from megatron_ads.models.single_layer import SingleLayer
    from megatron_ads.parity.reference import ReferenceLayer

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def counted(right: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            right(self, *args, **kwargs)
            module = self._module if isinstance(self, SingleLayer) else self._model
            alive.add(module)
            most = max(most, len(alive))

        return init

    gc.disable()  # what only the collector would free is still in memory
    try:
        with (
            patch.object(SingleLayer, "__init__", counted(SingleLayer.__init__)),
            patch.object(ReferenceLayer, "__init__", counted(ReferenceLayer.__init__)),
        ):
            cli.main(["parity", *arguments, "--out", str(out)])
    finally:
        gc.enable()
    return most
