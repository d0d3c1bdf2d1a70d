"""The tracks of ``benchmarks.rl_small``: a task, the recipes that lead to it, and what its held-out rows are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.rl_small_pipeline import pipeline_scores
from megatron_ads.config.generation import GenerationConfig, Method

if TYPE_CHECKING:
    from megatron_ads.evaluation.answer_records import Answer

SOURCE = "data.sources=[{{kind: simulator, task: {task}, rows: {rows}}}]"


@dataclass(frozen=True, slots=True)
class Track:
    """One task, and the recipes that lead to it."""

    task: str
    rl: str
    data: tuple[str, ...]
    """Settings of both recipes: the rows, and which of them are held out."""
    sft: str = "sft/small"
    preset: str = "shallow"
    """Shape of the random checkpoint."""
    reasoning: tuple[str, ...] = ("none",)
    """Ways to go along the path; the first alone unless more are asked for."""
    of_sft: tuple[str, ...] = ()
    of_rl: tuple[str, ...] = ()
    method: Method = Method.greedy
    """How held-out rows are answered."""
    reads_first: bool = True
    """Whether the model learns the language before it is fine-tuned."""
    single_advertiser: tuple[str, ...] = ()
    """Settings of rows that ask for one advertiser, where fine-tuning is on what logs tell (``rl_small_rows``)."""
    pipeline: bool = False
    """Whether answers are rewarded and scored by what a frozen pipeline retrieves with them."""


TRACKS = {
    "advertiser": Track(
        task="next_advertiser_ranking",
        rl="rl/advertiser_grpo",
        data=("data=simulator", "data.seq_length=1024", SOURCE.format(task="next_advertiser_ranking", rows=20000)),
        single_advertiser=("data=simulator", SOURCE.format(task="next_advertiser", rows=20000)),
        method=Method.sampled,
    ),
    "relevance": Track(
        task="query_ad_relevance",
        rl="rl/quickstart",
        data=(SOURCE.format(task="query_ad_relevance", rows=12000), "layout=pp1_ep1"),
        sft="sft/quickstart",
        preset="tiny",
        reasoning=("with", "without"),
        of_sft=("model.mtp_loss_weight=0",),
        reads_first=False,
    ),
    "brand": Track(
        task="next_advertiser",
        rl="rl/advertiser_grpo",
        data=("data=next_brand", "data.seq_length=512", "data.sources=[{kind: next_brand}]"),
        of_rl=("rewards.use=[{name: list_ranking}]", "rollout.valid_names=true", "rollout.max_new_tokens=24"),
        method=Method.constrained_beam,
    ),
    "downstream": Track(
        task="next_advertiser",
        rl="rl/downstream_reward",
        data=("data=simulator", "data.seq_length=512", SOURCE.format(task="next_advertiser", rows=20000)),
        of_rl=("layout=pp1_ep1",),
        pipeline=True,
    ),
}


def evaluated(
    track: Track, model: Path, overrides: Sequence[str], answers: Path, pipeline: Path | None
) -> dict[str, Any]:
    """Return the headline of the track, with the interval of resampled groups, beside what the baselines get."""
    from megatron_ads.config.recipes import load_job
    from megatron_ads.evaluation.evaluate import evaluate
    from megatron_ads.evaluation.given_answers import read_given_answers
    from megatron_ads.evaluation.held_out_rows import held_out
    from megatron_ads.evaluation.request import EvaluationRequest

    how = GenerationConfig(method=track.method)
    request = EvaluationRequest(recipe=track.sft, overrides=overrides, batch_size=64, answers_file=answers, how=how)
    scores = evaluate(model, request)["tasks"][track.task]
    if not pipeline and "ranking" not in scores:
        return _of_labels(scores)
    rows = held_out(load_job(track.sft, overrides, sections=["data"]).data).tasks
    if pipeline:
        return {**pipeline_scores(answers, rows, pipeline), "readable": scores["readable_share"]}
    return _of_rankings(scores, read_given_answers(answers, rows))


def _of_labels(scores: Mapping[str, Any]) -> dict[str, Any]:
    view = scores["views"]["fair"]
    beside = [name for name in ("baseline", "text_baseline", "reachable") if name in view]
    return {
        "name": "balanced accuracy", "value": view["model"]["balanced_accuracy"],
        "interval": view["balanced_accuracy_95"], "readable": scores["readable_share"],
        "lines": {name: view[name]["balanced_accuracy"] for name in beside},
    }  # fmt: skip


def _of_rankings(scores: Mapping[str, Any], answers: Sequence["Answer"]) -> dict[str, Any]:
    """Return recall@20, of each row too; ``beside`` has what else the paper's table 3 has, and the names of a list."""
    from megatron_ads.evaluation.ranking_scores import advertiser_rankings, found_by_rows

    methods = scores["ranking"]["methods"]
    beside = {name: methods["model"][name] for name in ("recall@1", "recall@5")}
    return {
        "name": "recall@20", "value": methods["model"]["recall@20"], "interval": methods["model"].get("recall@20_95"),
        "readable": scores["readable_share"], "of_rows": found_by_rows(answers)["recall@20"],
        "beside": {**beside, "names": mean(len(ranking) for ranking in advertiser_rankings(answers))},
        "lines": {name: values["recall@20"] for name, values in methods.items() if name != "model"},
    }  # fmt: skip
