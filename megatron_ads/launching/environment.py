"""What the environment says about a job: the nodes and ranks of a Slurm allocation, or this node's part under torchrun.

Under torchrun, several nodes run the same command, each with these environment variables, which are torchrun's own:

    NNODES          number of nodes                                                         (default 1)
    NODE_RANK       number of this one, from 0; the ranks meet on node 0                    (default 0)
    MASTER_ADDR     address of node 0, as the others reach it                         (required with several nodes)
    MASTER_PORT     a free port there                                                       (default 29500)
    NPROC_PER_NODE  ranks on each node              (default: the fewest for the layout, divided among the nodes)
    MEGATRON_ADS_MAX_RESTARTS  maximum number of restarts of all ranks after a failure, from the last checkpoint
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_ads.config.run import RunConfig
from megatron_ads.errors import ConfigError


def environment_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the number in a variable, the default if it is unset or empty; anything else is refused."""
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; it must be a whole number.")
    return int(text)


CORES_PER_RANK = 4
"""A rank on a GPU computes, differentiates, communicates and watches its peers in threads of their own."""


def core_warnings(ranks_here: int, environment: Mapping[str, str]) -> list[str]:
    """Return what there is to say about the cores of this node; Slurm gives a task one unless it is asked for more."""
    cores = environment_number(environment, "SLURM_CPUS_ON_NODE", len(os.sched_getaffinity(0)))
    if cores >= CORES_PER_RANK * ranks_here:
        return []
    return [
        f"{cores} cores for {ranks_here} ranks with a GPU each: their threads will wait for each other. Give each rank "
        f"{CORES_PER_RANK} at least (sbatch --cpus-per-task={CORES_PER_RANK}, or more)."
    ]


def rank_variables(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the ranks that depend on the recipe; those set already are left out."""
    variables = {
        name: str(Path(config.log.dir).absolute() / "nccl_flight_")  # torch adds the rank
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch 2.13, and before
    }
    if config.layout.tp * config.layout.cp > 1:
        # One hardware queue, so that kernels start in the order in which they were issued: Megatron's overlap of
        # tensor- and context-parallel communication with computation relies on it. Others it would only slow down.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {name: value for name, value in variables.items() if name not in environment}


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


def meeting_place(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return address and port at which node 0 listens: this node, whose free ports are known here."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = int(probe.getsockname()[1])
    port = environment_number(environment, "MASTER_PORT", free)
    return environment.get("MASTER_ADDR") or socket.gethostname(), str(port)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePart:
    """Which part of a job this node runs."""

    nodes: int
    node: int
    ranks_here: int
    host: str
    port: int
    max_restarts: int

    @classmethod
    def of(cls, environment: Mapping[str, str], ranks: int | None, fewest: int) -> Self:
        """Read the environment.

        Args:
            environment: Of this process.
            ranks: Of the whole job, as the user says; None: as the environment or the layout says.
            fewest: Ranks that the layout needs.

        Raises:
            ConfigError: If the numbers do not fit together, or several nodes have no rendezvous.
        """
        nodes, node = environment_number(environment, "NNODES", 1), environment_number(environment, "NODE_RANK", 0)
        here = environment.get("NPROC_PER_NODE")
        if ranks is None:
            ranks = nodes * environment_number(environment, "NPROC_PER_NODE", 1) if here else fewest
        if ranks < 1:
            raise ConfigError(f"--ranks is {ranks}; it must be at least 1.")
        if nodes < 1 or not 0 <= node < nodes:
            raise ConfigError(f"NODE_RANK is {node} and NNODES is {nodes}; NODE_RANK must be 0 to NNODES - 1.")
        if ranks % nodes:
            raise ConfigError(
                f"{ranks} ranks cannot be shared evenly by {nodes} nodes (NNODES). Set NPROC_PER_NODE, or other NNODES."
            )
        if nodes > 1 and not environment.get("MASTER_ADDR"):
            raise ConfigError(f"NNODES is {nodes}, but MASTER_ADDR is not set. Set it to the address of node 0.")
        return cls(
            nodes=nodes,
            node=node,
            ranks_here=ranks // nodes,
            host=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=environment_number(environment, "MASTER_PORT", 29500),
            max_restarts=environment_number(environment, "MEGATRON_ADS_MAX_RESTARTS", 0),
        )

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.ranks_here
