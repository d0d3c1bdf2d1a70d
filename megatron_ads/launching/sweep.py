"""A sweep as a job array: element N takes line N of a file of overrides, and a folder of its own below ``log.dir``.

    optim.learning_rate=1e-5
    optim.learning_rate=2e-5 'data.sources=[{kind: jsonl, path: more rows.jsonl}]'

Lines are counted from 0; empty ones and those that begin with # do not count.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ads.config.recipes import load_job
from megatron_ads.errors import ConfigError

SWEEP_VARIABLE = "MEGATRON_ADS_SWEEP"


def sweep_overrides(
    index: int | None, recipe: str, overrides: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Return the overrides of one element of an array, its folder included; none outside of an array.

    Raises:
        ConfigError: If the array has no sweep file, the file no such line or one with an open quote, or the elements
            would share checkpoints.
    """
    file = environment.get(SWEEP_VARIABLE)
    if index is None:
        if file is not None:
            raise ConfigError(f"{SWEEP_VARIABLE} is {file}, but this is no job array. Submit with --array=0-N.")
        return []
    if file is None:
        raise ConfigError(
            f"This is element {index} of a job array, but {SWEEP_VARIABLE} is not set: all elements would do the same. "
            f"Submit with --export=ALL,{SWEEP_VARIABLE}=FILE, where line N of FILE holds the overrides of element N."
        )
    text = sweep_line(Path(file), index)
    try:
        line = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"The sweep {file} holds {text!r} for element {index}: {error}. Fix this line.") from None
    before = load_job(recipe, [*overrides, *line])
    own = [*line, f"log.dir={before.log.dir}/sweep-{index}"]
    if load_job(recipe, [*overrides, *own]).checkpoint.dir == before.checkpoint.dir:
        raise ConfigError(
            f"checkpoint.dir is {before.checkpoint.dir} for every element of the array. Set it to "
            "'${log.dir}/checkpoints', or to a folder of its own in each line of the sweep."
        )
    return own


def sweep_line(file: Path, index: int) -> str:
    """Return the overrides on line ``index``."""
    if not file.is_file():
        raise ConfigError(f"The sweep {file} does not exist.")
    text = file.read_text(encoding="utf-8").splitlines()
    lines = [line for line in text if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ConfigError(f"The sweep {file} holds no line of overrides. Write one for each element of the array.")
    if not 0 <= index < len(lines):
        raise ConfigError(
            f"The sweep {file} has {len(lines)} lines, 0 to {len(lines) - 1}, but this is element {index}. "
            f"Submit with --array=0-{len(lines) - 1}."
        )
    return lines[index]
