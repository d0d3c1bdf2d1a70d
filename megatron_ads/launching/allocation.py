"""What Slurm gave a job: its nodes, and the ranks that are to run on each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from megatron_ads.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """The allocation that the environment of a batch script describes."""

    job: str
    """As Slurm's programs name it; an element of an array is ``7_2``: its number alone may mean the whole array."""
    nodes: int
    ranks: int
    restarts: int
    """How often Slurm has started this job before."""
    array_index: int | None
    """None for a job that is not an element of an array."""

    @property
    def ranks_per_node(self) -> int:
        """The same on every node."""
        return self.ranks // self.nodes

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Read the environment of a batch script.

        Raises:
            ConfigError: Outside of a batch job, or if the nodes do not have the same number of tasks each.
        """
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError(
                "SLURM_JOB_ID is not set: this is the inside of a Slurm job. Submit it with "
                "'sbatch --nodes=N --ntasks-per-node=M launch/slurm.sbatch RECIPE'."
            )
        counts = tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", "1"))
        if len(set(counts)) > 1:
            raise ConfigError(
                f"The nodes have different numbers of tasks ({environment['SLURM_TASKS_PER_NODE']}); every node must "
                "have the same. Submit with --nodes and --ntasks-per-node, without --ntasks."
            )
        index, job = environment.get("SLURM_ARRAY_TASK_ID"), environment["SLURM_JOB_ID"]
        return cls(
            job=job if index is None else f"{environment['SLURM_ARRAY_JOB_ID']}_{index}",
            nodes=len(counts),
            ranks=sum(counts),
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            array_index=None if index is None else int(index),
        )


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's notation: ``2(x3),1`` is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE is {text!r}, which is not of the form 8(x31).")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
