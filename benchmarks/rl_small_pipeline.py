"""A frozen pipeline of the simulator's logs, and what it retrieves with the answers of a model in its queries."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ads.quickstart.job_stages import run_command

if TYPE_CHECKING:
    from megatron_ads.downstream.pipeline import Pipeline
    from megatron_ads.rows import ChatRow

K = 20


def reward_of(pipeline: Path) -> str:
    """Return the setting that rewards each answer by what it alone changes in ``pipeline``.

    NDCG of five times K items tells the answers of nearly every prompt apart; recall@K, which is what is scored, is the
    same for most of them. Without the penalty GRPO learns answers that cannot be read: they change nothing.
    """
    settings = f"{{pipeline: {pipeline}, metric: ndcg, k: {5 * K}, per_sample: true, unreadable_penalty: 0.5}}"
    return f"rewards.use=[{{name: downstream_batch, settings: {settings}}}]"


def make_pipeline(out: Path) -> dict[str, Any]:
    """Simulate logs, and train a retriever and a ranker on them, in ``out/pipeline``."""
    run_command(["data", "simulate", "--out", str(out / "simulated"), "--rows", "0"], out, "simulate")
    train = ["downstream", "train", "--logs", str(out / "simulated"), "--out", str(out / "pipeline")]
    return run_command(train, out, "pipeline")


def pipeline_scores(answers_file: Path, rows: Sequence["ChatRow"], folder: Path) -> dict[str, Any]:
    """Return recall@K of a pipeline with the answers to held-out rows in its queries, and what is beside it.

    ``of_rows`` has the value of each row, for the difference to another model's.
    """
    from megatron_ads.downstream.pipeline_folder import load_pipeline
    from megatron_ads.metrics.intervals import ends, mean_interval

    pipeline = load_pipeline(folder)
    said = [json.loads(line) for line in answers_file.read_text(encoding="utf-8").splitlines()]
    answered = _found(pipeline, rows, {one["id"]: one["text"] for one in said})
    lines = {"the pipeline alone": {}, "with the true advertiser": {row.id: row.target for row in rows}}
    return {
        "name": f"recall@{K} of the pipeline",
        "value": sum(answered) / len(answered),
        "interval": ends(mean_interval(answered, groups=[row.group for row in rows])),
        "of_rows": answered,
        "lines": {name: sum(found := _found(pipeline, rows, texts)) / len(found) for name, texts in lines.items()},
    }


def gain(before: Sequence[float] | None, after: Sequence[float] | None) -> dict[str, Any] | None:
    """Return the mean difference of the same rows' values with its interval; None without values of rows."""
    from megatron_ads.metrics.intervals import ends, mean_interval

    if before is None or after is None:
        return None
    differences = [new - old for old, new in zip(before, after, strict=True)]
    return {"value": sum(differences) / len(differences), "interval": ends(mean_interval(differences))}


def _found(pipeline: "Pipeline", rows: Sequence["ChatRow"], texts: Mapping[str, str]) -> list[float]:
    """Return for each row whether its true item is among K that are retrieved with what ``texts`` has for its id."""
    from megatron_ads.downstream.words import history_of
    from megatron_ads.rewards.frozen_pipeline import query_of, true_item
    from megatron_ads.tasks.answer_texts import texts_of_answer

    added = [texts_of_answer(row, texts[row.id]) if row.id in texts else [] for row in rows]
    queries = ["\n".join([query_of(row), *lines]) for row, lines in zip(rows, added, strict=True)]
    retrieved_NK = pipeline.retrieve(pipeline.users([history_of(row) for row in rows], queries), K)
    return [float(true_item(row, pipeline) in best) for row, best in zip(rows, retrieved_NK, strict=True)]
