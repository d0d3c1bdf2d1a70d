"""Answers and what they teach: generation next to transformers', and each part of a GRPO step."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.speed.measure import Comparison, Effort, clocked, in_turn, seconds_in_queue

RECIPE = "rl/quickstart"
_PARTS = {
    "rollout": "answers generated",
    "reward": "answers judged",
    "update": "the policy updated",
    "sync": "new weights given to the engine",
}
_PRODUCT_SIZE, _PRODUCTS = 512, 20
_REPEATS = 30


def generation(effort: Effort) -> Iterator[Comparison]:
    """Sample answers next to transformers, and give an engine new weights next to a copy of them."""
    import torch

    from benchmarks.rl_small_cost import generation_of, weight_update_of

    torch.set_num_threads(1)
    model = _demo_model(effort.folder)
    settings = ["layout=pp1_ep1", f"rollout.batch_size={32 if effort.quick else 64}"]
    settings += [f"rollout.max_new_tokens={24 if effort.quick else 64}"]
    made = generation_of(model, RECIPE, settings)
    found = in_turn({"ours": clocked(made.ours), "theirs": clocked(made.theirs)}, seconds=effort.seconds)
    yield Comparison(
        name="generation/sampled",
        work=f"{made.facts['answers']} sampled answers of {made.facts['tokens_per_answer']} tokens",
        reference="transformers' generate",
        work_seconds=found["ours"],
        reference_seconds=found["theirs"],
        figures=made.facts,
    )
    weights = weight_update_of(model)
    often = {name: clocked(_repeated(work)) for name, work in (("ours", weights.update), ("theirs", weights.copy))}
    found = in_turn(often, seconds=effort.seconds / 4)
    yield Comparison(
        name="generation/new-weights",
        work=f"{weights.nbytes / 1e6:.1f} MB of weights given to the engine, {_REPEATS} times",
        reference="the same tensors copied",
        work_seconds=found["ours"],
        reference_seconds=found["theirs"],
        tolerance=0.25,
        figures={"bytes": weights.nbytes},
    )


def _repeated(work: Callable[[], object]) -> Callable[[], object]:
    """Return ``work`` so often that it takes long enough to be timed."""
    return lambda: [work() for _ in range(_REPEATS)]


def weight_sync(effort: Effort) -> Iterator[Comparison]:
    """Bring all weights of a trained model to an engine of the same process, next to a copy of the same tensors."""
    import torch

    from benchmarks import step_time

    step_time.start_one_rank(threads=1)
    from megatron_ads.inference.transformers_engine import TransformersEngine
    from megatron_ads.training.weight_sync import WeightSync

    followed = step_time.random_model(step_time.CONFIG if effort.quick else step_time.LARGER_CONFIG)
    trained, engine = step_time.build_ours(followed), TransformersEngine(followed.eval(), end_token=0)
    followed.save_pretrained(effort.folder / "model")
    source, shards = step_time.on_one_rank(effort.folder / "model")
    sync = WeightSync(shards, source)
    tensors = [parameter.data for parameter in followed.parameters()]
    held, size = [tensor.clone() for tensor in tensors], sum(tensor.nbytes for tensor in tensors)
    works = {
        "sync": lambda: engine.update_weights(sync.tensors(trained.models, trained.spec)),
        "copy": lambda: torch._foreach_copy_(held, tensors),
    }
    found = in_turn({name: clocked(_repeated(work)) for name, work in works.items()}, seconds=effort.seconds / 2)
    yield Comparison(
        name="sync/one-rank",
        work=f"{_REPEATS} times new weights for an engine: {size / 1e6:.0f} MB in {len(tensors)} tensors",
        reference="copies of the same tensors",
        work_seconds=found["sync"],
        reference_seconds=found["copy"],
        figures={"bytes": size},
    )


def grpo(effort: Effort) -> Iterator[Comparison]:
    """Run a job of GRPO on one rank; its own timing of each part, next to matrix products before each step."""
    steps = 8 if effort.quick else 30
    model, folder = _demo_model(effort.folder), effort.folder / "run"
    settings = [f"model.load={model}", "layout=pp1_ep1", f"train.max_steps={steps}", "train.evaluate_every=null",
                f"log.dir={folder}", "checkpoint.save_every=1000", "runtime.threads=1",
                "data.sources=[{kind: simulator, task: query_ad_relevance, rows: 2000}]",
                "rollout.max_new_tokens=16", "train.global_batch_size=2", "train.micro_batch_size=2"]  # fmt: skip
    with _products_before_each_step() as products:
        _train(settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "timing_s/rollout" in row]
    assert len(rows) == len(products) == steps
    for part, work in _PARTS.items():
        yield Comparison(
            name=f"grpo/{part}",
            work=f"{work}, of a step of 2 prompts with 8 answers",
            reference=f"{_PRODUCTS} matrix products, before each step",
            work_seconds=[row[f"timing_s/{part}"] for row in rows[1:]],
            reference_seconds=products[1:],
            tolerance=0.25,
        )


def _train(settings: list[str]) -> None:
    from megatron_ads.config.recipes import load_job
    from megatron_ads.config.rl import RlConfig
    from megatron_ads.runtime import cpu_compat, process_groups
    from megatron_ads.training.stopping import StopRequest

    cpu_compat.install()
    process_groups.silence_upstream_warnings()
    from megatron_ads.training import rl

    config = load_job(RECIPE, settings)
    assert isinstance(config, RlConfig)
    with StopRequest() as stop:
        rl.run(config, stop)


@contextmanager
def _products_before_each_step() -> Iterator[list[float]]:
    """Have each step of a job begin with matrix products; yield their seconds, which grow by one a step.

    The parts that the job times itself are without the waits for a core, as everything is here.
    """
    import torch

    from megatron_ads.runtime import cpu_compat

    cpu_compat.install()
    from megatron_ads.training import rl
    from megatron_ads.training.rollout.metrics import PhaseTimes

    torch.set_num_threads(1)
    left, right = torch.randn(2, _PRODUCT_SIZE, _PRODUCT_SIZE)
    timed = clocked(lambda: [torch.mm(left, right) for _ in range(_PRODUCTS)])
    seconds, step, measured = list[float](), rl._step, PhaseTimes.measured

    def after_products(job: Any) -> bool:
        seconds.append(timed())
        return step(job)

    @contextmanager
    def without_queue(times: Any, phase: str) -> Iterator[None]:
        waited = seconds_in_queue()
        with measured(times, phase):
            yield
        times.add({phase: waited - seconds_in_queue()})

    with patch.object(rl, "_step", after_products), patch.object(PhaseTimes, "measured", without_queue):
        yield seconds


def _demo_model(folder: Path) -> Path:
    from megatron_ads.demo_model import CONFIGS, EMBEDDING_SPREADS, Preset, write_demo_model

    config = CONFIGS[Preset.tiny] | {"torch_dtype": "float32"}
    write_demo_model(folder / "model", config, embedding_spread=EMBEDDING_SPREADS[Preset.tiny])
    return folder / "model"
