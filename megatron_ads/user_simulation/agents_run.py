"""`users agents` from start to end: lessons, reflections, and how well agents rank the next purchase."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ads.config.user_simulation import AgentsConfig, RecommenderKind
from megatron_ads.metrics.ranking import ndcg_at
from megatron_ads.user_simulation.agents import Agents, Exam, exams_of, learn, rounds_of
from megatron_ads.user_simulation.business import open_business
from megatron_ads.user_simulation.language_agents import LanguageAgents
from megatron_ads.user_simulation.players import open_player
from megatron_ads.user_simulation.recommenders import RankerSettings, Ranking, best_ranking, rankings
from megatron_ads.user_simulation.reports import Pages, Table, score_of, scored
from megatron_ads.user_simulation.rule_agents import RuleAgents

BEFORE, AFTER, BEST = "agents, before any lesson", "agents, after reflection", "best reachable"
NDCGS = (1, 5, 10)
_BASELINES = (
    RecommenderKind.random, RecommenderKind.popular, RecommenderKind.recent, RecommenderKind.factors,
    RecommenderKind.two_towers,
)  # fmt: skip


def run_agents(config: AgentsConfig) -> dict[str, Any]:
    """Let agents learn and rank, and return the report, as JSON values.

    Raises:
        ConfigError: If a folder cannot be written, or no request to the model can succeed.
        DataError: If logs or pipeline cannot be used, or the model stopped answering.
    """
    out = Path(config.out)
    with open_player(config.model, out, seed=config.seed) as player:
        business = open_business(config.world, out, simulated=config.simulated, buying=True)
        exams = exams_of(business, config)
        language = None if player is None else LanguageAgents(player, business, config)
        agents: Agents = language or RuleAgents(business)
        before = agents.rank(exams)
        seen = learn(agents, rounds_of(business, config))
        after = agents.rank(exams)
        lines = {name: _line(exams, ranked) for name, ranked in ((BEFORE, before), (AFTER, after))}
        ordered = rankings(business, _BASELINES, RankerSettings(seed=config.seed)) | {BEST: best_ranking(business)}
        lines |= {name: _line(exams, _of_candidates(exams, ranking)) for name, ranking in ordered.items()}
        return {
            "users": config.simulated,
            "candidates": len(exams[0].candidates),
            "played_by": config.model.model or "fixed rules",
            "lines": lines,
            "change": score_of(np.subtract(_ndcg(exams, after, NDCGS[-1]), _ndcg(exams, before, NDCGS[-1])).tolist()),
            "rounds": [
                {"right": score_of(list(map(float, each.right))), "lessons": len(each.right) + each.unreadable,
                 "mistakes": each.right.count(False), "unreadable": each.unreadable}
                for each in seen
            ],
            "unreadable_reflections": language.unreadable_reflections if language is not None else 0,
            "usage": player.usage() if player is not None else None,
        }  # fmt: skip


def _of_candidates(exams: Sequence[Exam], ranking: Ranking) -> list[tuple[int, ...] | None]:
    """Return the candidates of each user in the order of a ranking of all advertisers."""
    place_UA = np.argsort(ranking, axis=1)
    return [tuple(sorted(exam.candidates, key=place_UA[exam.user].__getitem__)) for exam in exams]


def _ndcg(exams: Sequence[Exam], ranked: Sequence[tuple[int, ...] | None], k: int) -> list[float]:
    places = [own.index(exam.bought) + 1 if own is not None else None for exam, own in zip(exams, ranked, strict=True)]
    return [ndcg_at([place], k) or 0.0 for place in places]


def _line(exams: Sequence[Exam], ranked: Sequence[tuple[int, ...] | None]) -> dict[str, Any]:
    return {
        **{f"ndcg@{k}": score_of(_ndcg(exams, ranked, k)) for k in NDCGS},
        "unreadable": sum(own is None for own in ranked),
    }


def agents_pages(report: Mapping[str, Any]) -> Pages:
    """Return what people read of a report."""
    metrics = [f"ndcg@{k}" for k in NDCGS]
    rows = [
        [name, *(scored(line[metric]) for metric in metrics), f"{line['unreadable']:,}"]
        for name, line in report["lines"].items()
    ]
    rounds = [
        [str(number), scored(each["right"]), *(f"{each[name]:,}" for name in ("lessons", "mistakes", "unreadable"))]
        for number, each in enumerate(report["rounds"], start=1)
    ]
    return Pages(
        title="Agents of users and advertisers",
        lead=f"{report['users']} users whose agents, and those of advertisers, are played by {report['played_by']}; "
        f"the next purchase is ranked among {report['candidates']} candidates.",
        tables=[
            Table("The next purchase among the candidates", ["ranked by", *metrics, "not read"], rows),
            Table("Choices in lessons", ["round", "right", "lessons", "mistakes", "not read"], rounds),
        ],
        notes=[
            f"Reflection changed ndcg@{NDCGS[-1]} by {scored(report['change'])}, paired by user. Brackets hold "
            "bootstrap 95 % intervals over users. A ranking that cannot be read counts 0.",
            f"{report['unreadable_reflections']:,} reflections could not be read, and changed nothing. "
            "Candidates beside the next purchase, and the other advertiser of a lesson, are drawn by popularity.",
        ],
    )
