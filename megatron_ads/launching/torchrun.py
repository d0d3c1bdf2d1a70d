"""One node's part of a job under torchrun: how torchrun is called, and how its ranks are told to stop.

Several nodes run the same command, each with these environment variables, which are torchrun's own names:

    NNODES       how many nodes                                                        (default 1)
    NODE_RANK    number of this one, from 0; node 0 is where the ranks meet            (default 0)
    MASTER_ADDR  address of node 0, as the others reach it                             (required with several nodes)
    MASTER_PORT  a free port there                                                     (default 29500)
    NPROC_PER_NODE  ranks on each node                   (default: the fewest for the layout, shared by the nodes)
    MEGATRON_ADS_MAX_RESTARTS  how often torchrun starts all ranks again after a failure, from the last checkpoint
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from megatron_ads.errors import ConfigError
from megatron_ads.launching.environment_number import environment_number
from megatron_ads.training.stopping import STOP_SIGNALS

_RENDEZVOUS_SECONDS = 600


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
            ConfigError: If the numbers do not fit together, or several nodes have nowhere to meet.
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

    def command(self, recipe: str, overrides: Sequence[str]) -> list[str]:
        """Return torchrun's command line."""
        if self.nodes == 1:
            meeting = ["--standalone"]
        else:
            is_host = "true" if self.node == 0 else "false"
            meeting = [
                *(f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.host}:{self.port}"),
                *("--rdzv-id=megatron-ads", f"--rdzv-conf=is_host={is_host},join_timeout={_RENDEZVOUS_SECONDS}"),
            ]
        return [
            *(sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={self.ranks_here}"),
            *(f"--max-restarts={self.max_restarts}", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
            *("--module", "megatron_ads.training", "--recipe", recipe, *overrides),
        ]


def rendezvous_problems(environment: Mapping[str, str], seconds: float = 300.0) -> list[str]:
    """Return why node 0 cannot be reached from here; node 0 may be started up to ``seconds`` later."""
    try:
        nodes, node = environment_number(environment, "NNODES", 1), environment_number(environment, "NODE_RANK", 0)
        port = environment_number(environment, "MASTER_PORT", 29500)
    except ConfigError as error:
        return [str(error)]
    host = environment.get("MASTER_ADDR")
    if not host or node == 0 or nodes == 1:
        return []
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return []
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(2)
                continue
            return [
                f"node 0 cannot be reached at {host}:{port} (MASTER_ADDR:MASTER_PORT) within {seconds:.0f} s: {error}. "
                "Start the job there too, and open the port between the nodes."
            ]


def wait_passing_signals_on(job: "subprocess.Popen[bytes]") -> int:
    """Wait for torchrun; pass signals that ask for a stop on to its ranks.

    Not to torchrun: it would kill the ranks 30 s later, which is too short for a large checkpoint. Ctrl-C reaches the
    ranks without help.
    """

    def pass_on(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:
            for pid in children(job.pid) or [job.pid]:
                _signal(pid, number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        return job.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started and that are still there; none where Linux's /proc is missing."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in file.read_text().split()]
        except OSError:
            continue
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
