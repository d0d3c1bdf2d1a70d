"""Training steps on one thread next to transformers', to their matrix products alone, and to the other way to do it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.speed.measure import Comparison, Effort, clocked, in_turn
from benchmarks.step_time import (
    BATCHES,
    CONFIG,
    LOSS_TOLERANCE,
    Step,
    build_ours,
    our_step,
    packed,
    random_model,
    random_samples,
    start_one_rank,
    transformers_step,
)

THREADS = 1
"""With several threads a step waits for the one whose core does something else besides; its reference might not."""


def _lengths(batch: str, effort: Effort) -> Sequence[int]:
    """Return the lengths of the samples of one of ``BATCHES``; every other one of them where that is to be quick."""
    return BATCHES[batch][:: 2 if effort.quick else 1]


def train_step(effort: Effort) -> Iterator[Comparison]:
    """Time steps on full rows and on samples of many lengths, next to transformers."""
    start_one_rank(THREADS)
    for name in BATCHES:
        lengths = _lengths(name, effort)
        model, samples = random_model(CONFIG), random_samples(lengths)
        ours, theirs = our_step(build_ours(model), [packed(samples)]), transformers_step(model, samples)
        _require_equal(ours(), theirs())
        found = in_turn({"ours": clocked(ours), "theirs": clocked(theirs)}, seconds=effort.seconds)
        yield Comparison(
            name=f"train-step/{name}",
            work=f"a step on {sum(lengths)} tokens, samples of {min(lengths)} to {max(lengths)}",
            reference="transformers with torch's AdamW, samples padded",
            work_seconds=found["ours"],
            reference_seconds=found["theirs"],
        )


def products(effort: Effort) -> Iterator[Comparison]:
    """Time a step next to the matrix products and attention kernels that it runs, alone: what no step can beat."""
    from benchmarks.speed.products import products_of

    start_one_rank(THREADS)
    model, samples = random_model(CONFIG), random_samples(_lengths("full", effort))
    step = our_step(build_ours(model), [packed(samples)])
    alone = products_of(step)
    found = in_turn({"step": clocked(step), "products": clocked(alone)}, seconds=effort.seconds, warm_up=2)
    yield Comparison(
        name="train-step/products",
        work=f"a step on {sum(_lengths('full', effort))} tokens",
        reference=f"its {len(alone.calls)} matrix products and attention kernels alone",
        work_seconds=found["step"],
        reference_seconds=found["products"],
        figures={"calls": alone.counts()},
    )


def experts(effort: Effort) -> Iterator[Comparison]:
    """Time a step with grouped experts next to one with experts one by one."""
    start_one_rank(THREADS)
    model, samples = random_model(CONFIG), random_samples(_lengths("full", effort))
    steps = {spec: our_step(build_ours(model, spec), [packed(samples)]) for spec in ("grouped", "local")}
    _require_equal(*(step() for step in steps.values()))
    found = in_turn({spec: clocked(step) for spec, step in steps.items()}, seconds=effort.seconds)
    yield Comparison(
        name="experts/grouped",
        work=f"a step with {CONFIG['n_routed_experts']} experts in grouped products",
        reference="experts one by one (model.layer_spec=local)",
        work_seconds=found["grouped"],
        reference_seconds=found["local"],
    )


def packing(effort: Effort) -> Iterator[Comparison]:
    """Time a step on packed rows next to one on the same samples, each in a row of its own."""
    start_one_rank(THREADS)
    trained = build_ours(random_model(CONFIG))
    rows = _rows(lengths := _lengths("mixed", effort))
    batches = {name: _batches(rows, packing=name == "packed") for name in ("packed", "padded")}
    steps = {name: our_step(trained, each) for name, each in batches.items()}
    found = in_turn({name: clocked(step) for name, step in steps.items()}, seconds=effort.seconds)
    yield Comparison(
        name="packing/packed",
        work=f"a step on {len(rows)} samples of {min(lengths)} to {max(lengths)} tokens, packed",
        reference="each in a row of its own, padded (data.packing=false)",
        work_seconds=found["packed"],
        reference_seconds=found["padded"],
    )


def _rows(lengths: Sequence[int]) -> list[Any]:
    """Return samples that predict so many tokens each."""
    import numpy as np

    from megatron_ads.rows import TokenizedRow

    tokens = [sample.tolist() for sample in random_samples([length + 1 for length in lengths])]
    return [
        TokenizedRow(id=str(number), task="packing", tokens=np.array(each), loss_weights=np.ones(len(each), np.float32))
        for number, each in enumerate(tokens)
    ]


def _batches(rows: Sequence[Any], *, packing: bool) -> list[Any]:
    from megatron_ads.data.batches import ReplicaShare, batches_of_all

    longest = max(row.predictions for row in rows)
    full = -(-sum(row.predictions for row in rows) // longest)
    count = full if packing else len(rows)
    share = ReplicaShare(global_batch_size=count, micro_batch_size=count, dp_rank=0, dp_size=1)
    return batches_of_all(rows, share, seq_length=longest, packing=packing)


def growth(effort: Effort) -> Iterator[Comparison]:
    """Time steps of growing models and rows next to the smallest of each kind, all in turn."""
    start_one_rank(THREADS)
    points: dict[str, tuple[int, ...]] = {
        "experts": (8, 16, 32),
        "layers": (3, 6, 12),
        "tokens in a row": (256, 512, 1024),
    }
    if not effort.quick:
        points = {"experts": (8, 16, 32, 64), "layers": (3, 6, 12, 24), "tokens in a row": (256, 512, 1024, 2048)}
    for what, sizes in points.items():
        steps = {str(size): clocked(_grown(what, size, points[what][-1])) for size in sizes}
        found = in_turn(steps, seconds=effort.seconds)
        for size in sizes[1:]:
            yield Comparison(
                name=f"growth/{what.replace(' ', '-')}/{size}",
                work=f"a step with {size} {what}",
                reference=f"{sizes[0]}" + (", times the layers" if what == "layers" else ""),
                work_seconds=found[str(size)],
                reference_seconds=found[str(sizes[0])],
                amount=size / sizes[0] if what == "layers" else 1.0,
                growth=(what, size),
            )


def _grown(what: str, size: int, largest: int) -> Step:
    """Return a step on as many tokens whatever the size; a token passes as many experts whatever their number."""
    changed: Mapping[str, Any] = {
        "experts": {"n_routed_experts": size},
        "layers": {"num_hidden_layers": size, "first_k_dense_replace": size // 3},
    }.get(what, {})
    lengths = [size] * (largest // size) if what == "tokens in a row" else [256, 256]
    trained = build_ours(random_model({**CONFIG, **changed}))
    return our_step(trained, [packed(random_samples(lengths))])


def _require_equal(ours: float, theirs: float) -> None:
    if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
        raise ArithmeticError(f"the first losses differ, {ours:.7f} and {theirs:.7f}: what would be timed is not equal")
