"""POPO and POPO-light against fixed weights of two rewards, on a small model, on a CPU (the shape of Taiji's table 4).

    python -m benchmarks.popo_small --out DIR [--seeds 3] [--rl-steps 60]

One model learns the language and the next advertiser as in the track ``downstream`` of ``benchmarks.rl_small``. From
there it is reinforced with ``rl/taiji_popo`` for each seed and way to weigh: how near the named advertiser is to the
true one, and CTCVR by the frozen ranker. After each it answers the same held-out rows greedily; both rewards of an
answer are its score. A better trade-off is one that raises both.

Each stage is done once; the same command continues where it was interrupted. DIR/results.md has the table,
DIR/results.json its numbers, DIR/WAY-SEED/report.html the curves of the weights. The seed decides the draws.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.rl_small import RlPath
from benchmarks.rl_small_pipeline import gain
from benchmarks.rl_small_tracks import TRACKS
from benchmarks.sft_small import run_path, write_results
from megatron_ads.cli import exit_status
from megatron_ads.quickstart.job_stages import train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord
from megatron_ads.reporting.markdown import markdown

if TYPE_CHECKING:
    from megatron_ads.rollouts import Rollout
    from megatron_ads.rows import ChatRow

TRACK, RECIPE, WAY = TRACKS["downstream"], "rl/taiji_popo", "none"
SFT = f"sft-{WAY}-0"
COMBINED = ("fixed", "popo_light", "popo")
REWARDS = ("semantic", "ctcvr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the table."""
    return exit_status("benchmarks.popo_small", partial(_run, parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each way (default 3)")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--text-steps", type=int, default=150, help="on the texts (default 150)")
    parser.add_argument("--sft-steps", type=int, default=400, help="steps of the fine-tuning (default 400)")
    parser.add_argument("--rl-steps", type=int, default=60, help="steps of GRPO (default 60)")
    parser.add_argument("--held-out", type=int, default=1024, help="rows to answer (default 1024)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the GRPO: rollout.samples=8")
    return parser.parse_intermixed_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    out = arguments.out.resolve()
    path = _PopoPath(out, arguments)
    records = run_path(list(path.stages()), out)
    results = path.results(records)
    sizes = {name: value for name, value in vars(arguments).items() if name != "out"}
    write_results(out, {**sizes, **results}, table(results))
    return 0


@dataclass(frozen=True, slots=True)
class _PopoPath:
    """From a random checkpoint to ones that are reinforced in each way."""

    out: Path
    arguments: argparse.Namespace

    def stages(self) -> Iterator[Stage]:
        """Yield the stages."""
        until_tuned = RlPath(self.out, TRACK, self.arguments)
        yield from until_tuned.before_tuning(0)
        yield until_tuned.tuning(0, WAY)
        data = until_tuned.data(WAY)
        yield self._score(SFT, data)
        for seed in range(self.arguments.seeds):
            for combined in COMBINED:
                yield self._reinforced(combined, seed, data)
                yield self._score(f"{combined}-{seed}", data)

    def _reinforced(self, combined: str, seed: int, data: Sequence[str]) -> Stage:
        name, pipeline = f"{combined}-{seed}", self.out / "pipeline"
        use = f"[{{name: semantic}}, {{name: ctcvr, settings: {{pipeline: {pipeline}}}}}]"
        settings = [
            f"model.load={self.out / SFT / 'export'}", f"log.dir={self.out / name}", *data, f"train.seed={seed}",
            f"train.max_steps={self.arguments.rl_steps}", "train.evaluate_every=1000", "layout=pp1_ep1",
            f"rewards.combine={combined}", f"rewards.use={use}", *self.arguments.overrides,
        ]  # fmt: skip
        return train_stage(name, name, settings, self.out, self.arguments.ranks, after=[SFT, "pipeline"], recipe=RECIPE)

    def _score(self, of: str, data: Sequence[str]) -> Stage:
        answers = self.out / f"{of}.jsonl"
        return Stage(
            name=f"{of}-scores", title=f"{of}-scores", settings={"data": list(data)}, after=[of, "pipeline"],
            outputs=[answers], resumable=True,
            run=partial(rewards_of, self.out / of / "export", data, answers, self.out / "pipeline"),
        )  # fmt: skip

    def results(self, records: Mapping[str, StageRecord]) -> dict[str, Any]:
        """Return the mean of each reward by way and seed, and what the ways change against fixed weights."""
        seeds = range(self.arguments.seeds)
        of_way = {way: [records[f"{way}-{seed}-scores"].result for seed in seeds] for way in COMBINED}
        tuned = records[f"{SFT}-scores"].result
        rows = {way: {name: _mean_rows(found, name) for name in REWARDS} for way, found in of_way.items()}
        against = {
            "SFT": {way: {name: gain(tuned[name], rows[way][name]) for name in REWARDS} for way in COMBINED},
            "fixed": {
                way: {name: gain(rows["fixed"][name], rows[way][name]) for name in REWARDS} for way in COMBINED[1:]
            },
        }
        means = {
            way: [{name: mean(one[name]) for name in REWARDS} | {"readable": one["readable"]} for one in found]
            for way, found in {"SFT": [tuned], **of_way}.items()
        }
        return {"means": means, "against": against, "weights": {way: self._weights(way) for way in COMBINED}}

    def _weights(self, way: str) -> list[dict[str, float]]:
        """Return the last weights of each seed's rewards."""
        from megatron_ads.observability.metrics import read_metrics

        steps = [read_metrics(self.out / f"{way}-{seed}") for seed in range(self.arguments.seeds)]
        last = [[row for row in rows if f"reward_weight/{REWARDS[0]}" in row][-1:] for rows in steps]
        return [{name: row[f"reward_weight/{name}"] for name in REWARDS} for rows in last for row in rows]


def rewards_of(model: Path, data: Sequence[str], answers: Path, pipeline: Path) -> dict[str, Any]:
    """Let a model answer the held-out rows, and return both rewards of each of them."""
    from benchmarks.rl_small_tracks import evaluated
    from megatron_ads.config.recipes import load_job
    from megatron_ads.evaluation.held_out_rows import held_out
    from megatron_ads.rewards.ctcvr import Ctcvr
    from megatron_ads.rewards.semantic import Semantic

    readable = evaluated(TRACK, model, data, answers, pipeline)["readable"]
    rows = held_out(load_job(TRACK.sft, data, sections=["data"]).data).tasks
    said = {one["id"]: one["text"] for one in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
    groups = [[_answered(row, place, said[row.id])] for place, row in enumerate(rows)]
    judges: dict[str, Callable[[Sequence[Rollout]], Sequence[float | None]]]
    judges = {"semantic": Semantic(), "ctcvr": Ctcvr(pipeline=str(pipeline))}
    return {name: [judge(group)[0] for group in groups] for name, judge in judges.items()} | {"readable": readable}


def _answered(row: "ChatRow", group: int, text: str) -> "Rollout":
    """Return an answer as rewards take it, of which only the text is known."""
    from megatron_ads.rollouts import Rollout

    return Rollout(
        row=row, group=group, text=text, prompt_tokens=(), answer_tokens=(), log_probabilities=(), cut_off=False,
        weights="",
    )  # fmt: skip


def _mean_rows(found: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [mean(values) for values in zip(*(one[name] for one in found), strict=True)]


def table(results: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    rows = [["", "semantic, mean (each seed)", "against SFT", "CTCVR, mean (each seed)", "against SFT", "readable"]]
    for way, seeds in results["means"].items():
        cells = [way]
        for name in REWARDS:
            each = ", ".join(f"{one[name]:.3f}" for one in seeds)
            cells.append(f"{mean(one[name] for one in seeds):.3f} ({each})")
            cells.append(_change(results["against"]["SFT"].get(way, {}).get(name)))
        rows.append([*cells, f"{mean(one['readable'] for one in seeds):.2f}"])
    for way, changes in results["against"]["fixed"].items():
        rows.append([f"{way} against fixed", "", _change(changes["semantic"]), "", _change(changes["ctcvr"]), ""])
    return markdown(rows)


def _change(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = found["interval"]
    return f"{found['value']:+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    import sys

    sys.exit(main())
