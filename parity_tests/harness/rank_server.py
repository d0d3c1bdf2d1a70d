"""The process that ranks of distributed tests are forked from: it has imported what they need once for all.

Started by ``ranks`` as ``python -m parity_tests.harness.rank_server``. It forks a rank for each line on its standard
input (``fork RANK WORLD ADDRESS FOLDER``, answered with the process id) and reports how one ended (``wait PID``). Ranks
die with it, and it ends when its standard input closes, so that nothing outlives the test session, however that ends.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NoReturn

STACK_SIGNAL = signal.SIGRTMIN + 3
"""Makes a rank write the Python stacks of its threads to ``stack-RANK`` in its folder."""

_PR_SET_PDEATHSIG = 1
_IMPORTED_ONCE = (
    "torch._dynamo",  # torch imports it when the first optimizer is made: 0.7 s of CPU time
    "parity_tests.harness.training_jobs",
    "parity_tests.reference",  # transformers' model, which takes longer than all others together
    "megatron_ads.training.build",
    "megatron_ads.training.checkpoint",
    "megatron_ads.training.export",
    "megatron_ads.training.step",
)
"""Modules that most ranks use. None may start a thread, which a fork would lose (pyarrow does, so no data is read)."""


def main() -> None:
    """Serve until standard input closes."""
    import torch

    from megatron_ads.runtime import cpu_compat

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test session, which then ends this process
    load_storage = torch.storage._load_from_bytes
    cpu_compat.install()
    torch.set_num_threads(1)
    for module in _IMPORTED_ONCE:
        importlib.import_module(module)
    # Tensors are sent as torch sends them: megatron-core 0.19 puts a function of its own here, and the test session
    # would import it, unpatched.
    torch.storage._load_from_bytes = load_storage
    gc.freeze()  # a collection in a rank leaves these objects, and so their memory shared
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "fork":
            rank, world, address, folder = arguments
            answer = os.fork() or _live_as_rank(int(rank), int(world), address, Path(folder))
        else:
            answer = _end_of_rank(int(arguments[0]))
        print(answer, file=answers, flush=True)


def _end_of_rank(pid: int) -> int:
    """Wait until a rank has ended, end what it has started, and return its exit status."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until it is waited for, its group's number is nobody else's
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _live_as_rank(rank: int, world: int, address: str, folder: Path) -> NoReturn:
    """Answer calls in a fresh fork until the other end hangs up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)  # with what it starts: Megatron-Core's own save leaves a process that would outlive it
    log = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True)
    with Client(address, "AF_UNIX") as connection:
        connection.send_bytes(str(rank).encode())
        _answer_calls(connection, rank, world)
    os._exit(0)


def _answer_calls(connection: Connection, rank: int, world: int) -> None:
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args, port, with_group = pickle.loads(call)
            answer = (True, _call(function, args, rank, world, port, with_group))
        except BaseException:  # noqa: BLE001 - a process boundary: whatever it was belongs to the test
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        connection.send_bytes(pickle.dumps(answer))


def _call(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, port: int, group: bool) -> Any:
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "0",
    }  # fmt: skip
    if group:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
        dist.barrier()  # a rank that ended at once would break the connections that others are still making
    try:
        return function(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
