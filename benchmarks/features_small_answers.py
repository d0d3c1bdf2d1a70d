"""Answers to the rows of `downstream rows` on a simulation: a model's, and stand-ins that bound what they can do."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEAMS = 20


def stand_in(rows: Path, out: Path, simulated: Path, kind: str) -> dict[str, Any]:
    """Write the answers of a stand-in.

    Args:
        rows: What is answered.
        out: File to write.
        simulated: Folder of the logs, whose world is drawn again.
        kind: ``best`` ranks by the true probabilities, as far as the history can tell; ``noisy`` replaces half of its
            names by others, drawn evenly; ``random`` draws all of them.
    """
    from conversion.atomic_file import write_small
    from megatron_ads.data.jsonl import jsonl_rows
    from megatron_ads.downstream.user_answers import place_of
    from megatron_ads.metrics.ranking import each_once

    asked, names = jsonl_rows(rows), _names(simulated)
    places = {row.id: place_of(row) for row in asked}
    best = {} if kind == "random" else _best(simulated, {anchor for _, anchor in places.values()})
    draw, share = random.Random(f"stand-in {kind}"), {"best": 0.0, "noisy": 0.5, "random": 1.0}[kind]
    lines = []
    for row in asked:
        ranked = best.get(places[row.id], names)[:BEAMS]
        said = each_once(draw.choice(names) if draw.random() < share else name for name in ranked)
        scored = [(name, -float(place)) for place, name in enumerate(said)]
        beams = [{"text": name, "log_probability": score, "score": score} for name, score in scored]
        lines.append(json.dumps({"id": row.id, "text": said[0], "beams": beams}) + "\n")
    write_small(out, "".join(lines))
    return {"answers": len(lines)}


def answer(rows: Path, out: Path, model: Path, simulated: Path) -> dict[str, Any]:
    """Let a model name advertisers by constrained beams, and write its answers; continues where it stopped."""
    from megatron_ads.config.generation import GenerationConfig, Method
    from megatron_ads.data.jsonl import jsonl_rows
    from megatron_ads.evaluation.evaluated_model import open_model
    from megatron_ads.evaluation.generate import Asking
    from megatron_ads.inference.name_answers import AdvertiserNames

    asked = jsonl_rows(rows)
    names = AdvertiserNames(tuple(_names(simulated)), "the simulation", given=True)
    how = GenerationConfig(method=Method.constrained_beam, beams=BEAMS)
    limits = {row.task: 64 for row in asked}
    asking = Asking(how=how, max_new_tokens=limits, batch_size=BEAMS * 16, advertisers=names)
    with open_model(model) as opened:
        answers, seconds = opened.answer(asked, asking, out)
    return {"answers": len(answers), "seconds": seconds}


def recall(answers: Path, rows: Path, pipeline: Path, simulated: Path) -> dict[str, Any]:
    """Return how often the answers name the first purchase of users held out, among the first 1, 5 and 20."""
    from megatron_ads.downstream.examples import held_out_examples
    from megatron_ads.downstream.pipeline_folder import load_pipeline
    from megatron_ads.downstream.simulated_logs import read_logs
    from megatron_ads.downstream.user_answers import read_user_answers
    from megatron_ads.metrics.ranking import RECALLS, position_of, recall_at

    logs, config = read_logs(simulated), load_pipeline(pipeline).config
    examples = held_out_examples(logs, config)
    said = {(one.user, one.anchor): one.advertisers for one in read_user_answers(rows, answers).answers}
    first: dict[int, str] = {}
    for purchase in examples.purchases:
        first.setdefault(purchase.history, logs.items[purchase.item].name)
    places = examples.places
    positions = [position_of(name, said.get(places[number], ())) for number, name in first.items()]
    return {"users": len(positions), **{f"recall@{k}": recall_at(positions, k) for k in RECALLS}}


def _names(simulated: Path) -> list[str]:
    from megatron_ads.downstream.simulated_logs import read_logs

    return [item.name for item in read_logs(simulated).items]


def _best(simulated: Path, anchors: set[int]) -> dict[tuple[str, int], Sequence[str]]:
    """Return the best ranking for every user and anchor, from the world that a simulation was drawn from."""
    import numpy as np

    from megatron_ads.data.simulator.logs import START
    from megatron_ads.data.simulator.simulated_rows import users_at_anchor
    from megatron_ads.data.simulator.world import draw_world

    manifest = json.loads((simulated / "manifest.json").read_text(encoding="utf-8"))
    world = draw_world(manifest["seed"], advertisers=manifest["advertisers"])
    found: dict[tuple[str, int], Sequence[str]] = {}
    for anchor in sorted(anchors):
        days = round((anchor - START.timestamp()) / 86400)
        for user in users_at_anchor(world, days=days, users=manifest["users"]):
            order = np.argsort(-user.chance_A, kind="stable")[:BEAMS]
            found[user.history.user_id, anchor] = [world.advertisers[number].name for number in order]
    return found
