"""Jobs of several ranks over gloo on this machine: virtual pipeline stages, and what more ranks cost.

Each rank is a process that waits for a word: it then runs a training step, or matrix products, and answers with the
seconds. So jobs of different layouts take turns, and a job's reference runs on as many processes as the job does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

from benchmarks.bounded_process import ROOT
from benchmarks.memory_model import MeasuredLayout
from benchmarks.speed.measure import Comparison, Effort, Timed, in_turn

_PRODUCT_SIZE, _PRODUCTS = 512, 40
"""FP32 products of square matrices: about as long as a microbatch."""
_END_SECONDS = 20


class RankJob:
    """The processes of one job; as a context, it ends them."""

    def __init__(self, layout: MeasuredLayout, tokens: int) -> None:
        """Start them, with microbatches of so many tokens; they build their part of the model meanwhile."""
        from parity_tests.harness.ranks import free_port

        port = str(free_port())
        self._ranks = [_start(rank, layout, tokens, port) for rank in range(layout.world)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.communicate(timeout=_END_SECONDS)

    def run(self, word: str) -> float:
        """Have every rank do what ``word`` says at the same time; return the seconds of the slowest."""
        for rank in self._ranks:
            assert rank.stdin is not None
            print(word, file=rank.stdin, flush=True)
        return max(float(_answer(rank)) for rank in self._ranks)

    def timed(self, word: str) -> Timed:
        return lambda: self.run(word)


def _start(rank: int, layout: MeasuredLayout, tokens: int, port: str) -> "subprocess.Popen[str]":
    fields = {"world": layout.world, "layout": layout.layout, "pipeline": layout.pipeline}
    given = json.dumps({**fields, "microbatches": layout.microbatches})
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(layout.world)}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed.ranks", given, str(tokens)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **addresses, "LOCAL_RANK": str(rank)},
    )  # fmt: skip


def _answer(rank: "subprocess.Popen[str]") -> str:
    assert rank.stdout is not None
    if not (line := rank.stdout.readline()):
        raise RuntimeError(f"a rank ended with status {rank.wait()}; what it said is above")
    return line


def vpp(effort: Effort) -> Iterator[Comparison]:
    """Time the steps of a pipeline of two stages, next to the same with two virtual stages on each rank."""
    microbatches = 4 if effort.quick else 8
    layouts = {
        "vpp2": MeasuredLayout(
            world=2, layout={"pp": 2, "vpp": 2}, pipeline="Ett|tt|t|tmL", microbatches=microbatches
        ),
        "pp2": MeasuredLayout(world=2, layout={"pp": 2}, pipeline="Ettt|tttmL", microbatches=microbatches),
    }  # fmt: skip
    tokens = _tokens(effort)
    with ExitStack() as opened:
        jobs = {name: opened.enter_context(RankJob(layout, tokens)) for name, layout in layouts.items()}
        found = in_turn({name: job.timed("step") for name, job in jobs.items()}, seconds=effort.seconds)
    yield Comparison(
        name="vpp/pp2-vpp2",
        work=f"a step of {microbatches} microbatches of {tokens} tokens on 2 stages, each in two parts",
        reference="on 2 stages, each in one part",
        work_seconds=found["vpp2"],
        reference_seconds=found["pp2"],
        tolerance=0.15,
    )


def growth(effort: Effort) -> Iterator[Comparison]:
    """Time the steps of jobs of more and more replicas, each on as many tokens, next to products on as many ranks."""
    counts: Sequence[int] = (1, 2) if effort.quick else (1, 2, 4)
    for count in counts:
        with RankJob(MeasuredLayout(world=count, microbatches=1), _tokens(effort)) as job:
            works = {word: job.timed(word) for word in ("step", "products")}
            found = in_turn(works, seconds=effort.seconds)
        yield Comparison(
            name=f"growth/ranks/{count}",
            work=f"a step of {count} replicas, a microbatch of {_tokens(effort)} tokens each",
            reference="matrix products on as many processes",
            work_seconds=found["step"],
            reference_seconds=found["products"],
            tolerance=0.15,
            growth=("ranks", count),
        )


def _tokens(effort: Effort) -> int:
    return 128 if effort.quick else 512


def _serve(given: dict[str, Any], tokens: int) -> None:
    """As one rank: build, then do what is asked until there is nothing more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    import torch

    from benchmarks.memory_model import build_step, planned_job
    from benchmarks.speed.measure import clocked
    from megatron_ads.runtime import device, process_groups

    torch.set_num_threads(1)
    job = replace(planned_job(MeasuredLayout(**given)), seq_length=tokens, micro_batch_size=1)
    process_groups.start(job.layout)
    device.seed_everything(0)
    left, right = torch.randn(2, _PRODUCT_SIZE, _PRODUCT_SIZE)

    def products() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(left, right)

    words = {"step": clocked(build_step(job)()), "products": clocked(products)}
    for line in sys.stdin:
        print(words[line.strip()](), file=answers, flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]), int(sys.argv[2]))
