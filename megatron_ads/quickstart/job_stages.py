"""Stages that are a command line in a process of its own: any command, and training with its progress."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ads.config.recipes import load_job
from megatron_ads.launching.processes import MetricsFollower, run_job
from megatron_ads.observability.provenance import own_code_digest
from megatron_ads.quickstart.stages import Stage


def train_stage(
    name: str,
    title: str,
    settings: Sequence[str],
    out: Path,
    ranks: int,
    *,
    after: Sequence[str],
    recipe: str = "sft/small",
) -> Stage:
    """Return the stage that runs a recipe; it writes to ``out/name``, which ``log.dir`` must name."""
    steps = load_job(recipe, settings).train.max_steps

    def run() -> dict[str, Any]:
        with MetricsFollower(out / name, steps, name) as follow:
            run_command(["train", "--recipe", recipe, "--ranks", str(ranks), *settings], out, name, follow)
        return {"steps": steps}

    return Stage(
        name=name, title=title, settings={"recipe": recipe, "settings": list(settings), "ranks": ranks}, after=after,
        outputs=[out / name], resumable=True, run=run,
    )  # fmt: skip


def command_stage(
    name: str, title: str, command: Sequence[str], out: Path, outputs: Sequence[str], *, after: Sequence[str] = ()
) -> Stage:
    """Return the stage that runs `megatron-ads` with ``command``; ``outputs`` are below ``out``."""
    return Stage(
        name=name, title=title, settings={"command": list(command), "code": own_code_digest()}, after=after,
        outputs=[out / output for output in outputs], run=partial(run_command, command, out, name),
    )  # fmt: skip


def run_command(
    command: Sequence[str], out: Path, name: str, while_running: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run `megatron-ads` with ``command`` in a process of its own, its lines going to ``out/logs/name.log``."""
    log = out / "logs" / f"{name}.log"
    run_job([sys.executable, "-m", "megatron_ads.cli", *command], log, while_running=while_running)
    return {}
