"""Zero-shot, fine-tuned, then reinforced: what each step gains on a small model, on a CPU, and what it costs.

    python -m benchmarks.rl_small --out DIR [--track NAME] [--seeds 3] [--sft-steps N] [--rl-steps N]

For each seed a random checkpoint is made and taken along the path; after each step it answers the same held-out rows
greedily, where nothing else is said. The tracks:

    advertiser   20 advertisers and 5 interests in XML, `sft/small` then `rl/advertiser_grpo`; recall@20 of sampled
                 answers. A model that only knows the language and the form (texts of prompts, lists of 1 to 20 names
                 drawn evenly) is the zero-shot one. Fine-tuning is on what logs tell: the true advertiser alone, and in
                 front of 0 to 19 popular ones. There is no reasoning: the paper found it of no use there.
    relevance    query and ad, `sft/quickstart` then `rl/quickstart`; balanced accuracy; with and without reasoning. The
                 cheaper one: the random model itself is the zero-shot one.
    brand        the brand that a buyer of office products takes next, of `MEGATRON_ADS_DATA`; recall@20 of beams that
                 spell brands; the language first, `sft/small`, then GRPO with the list-ranking reward.
    downstream   the next advertiser goes into the queries of a frozen pipeline; its recall@20, rewarded by what each
                 answer changes of NDCG@100; the language first, then `sft/small`, then `rl/downstream_reward`.

Each stage is done once; the same command continues where it was interrupted. DIR/results.md has the tables,
DIR/results.json their numbers, DIR/STAGE/report.html the curves. The seed decides the first weights, the order of
rows and the draws; the held-out rows are the same for all.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.rl_small_pipeline import gain, make_pipeline, reward_of
from benchmarks.rl_small_table import tables
from benchmarks.rl_small_tracks import TRACKS, Track, evaluated
from benchmarks.sft_small import run_path, write_results, write_texts
from megatron_ads.cli import exit_status
from megatron_ads.errors import ConfigError
from megatron_ads.observability.provenance import own_code_digest
from megatron_ads.quickstart.job_stages import command_stage, train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the tables."""
    return exit_status("benchmarks.rl_small", partial(_run, _parse(argv)))


def _run(arguments: argparse.Namespace) -> int:
    out, track = arguments.out.resolve(), TRACKS[arguments.track]
    path = RlPath(out, track, arguments)
    ways = track.reasoning if arguments.reasoning == "both" else (arguments.reasoning or track.reasoning[0],)
    if unknown := [way for way in ways if way not in track.reasoning]:
        raise ConfigError(f"--reasoning is {unknown[0]}, which --track {arguments.track} does not have. Leave it out.")
    stages = [stage for seed in range(arguments.seeds) for stage in path.stages(seed, ways)]
    records = run_path(stages, out)
    results = {way: [path.results(seed, way, records) for seed in range(arguments.seeds)] for way in ways}
    sizes = {name: value for name, value in vars(arguments).items() if name not in ("out", "reasoning")}
    gains = {way: path.gain_of_seeds(arguments.seeds, way, records) for way in ways}
    write_results(out, {**sizes, "reasoning": results, "gain_of_seeds": gains}, tables(results, gains))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument("--track", choices=list(TRACKS), default="advertiser")
    parser.add_argument("--reasoning", choices=["with", "without", "both"], help="relevance (default: with)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of the whole path (default 3)")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--text-steps", type=int, default=800, help="on the texts; not of relevance (default 800)")
    parser.add_argument("--sft-steps", type=int, default=1600, help="steps of the fine-tuning (default 1600)")
    parser.add_argument("--rl-steps", type=int, default=100, help="steps of GRPO (default 100)")
    parser.add_argument("--held-out", type=int, default=256, help="rows to answer (default 256)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the GRPO: rollout.samples=4")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True, slots=True)
class RlPath:
    """From a random checkpoint to a reinforced one."""

    out: Path
    track: Track
    arguments: argparse.Namespace

    def stages(self, seed: int, ways: Sequence[str]) -> Iterator[Stage]:
        """Yield the stages of one seed."""
        yield from self.before_tuning(seed)
        start, folder = self._start(seed)
        for way in ways:
            data = self.data(way)
            yield self._score(f"zero-{way}-{seed}", folder, data, after=start)
            tuning = self.tuning(seed, way)
            sft, rl = tuning.name, f"grpo-{way}-{seed}"
            yield tuning
            yield self._score(f"{sft}-scores", self.out / sft / "export", data, after=sft)
            settings = [*data, *self._of_rl(), f"train.max_steps={self.arguments.rl_steps}"]
            yield self._train(rl, self.track.rl, self.out / sft / "export", seed, settings, after=sft)
            yield self._score(f"{rl}-scores", self.out / rl / "export", data, after=rl)
            if seed == 0:
                yield self._cost(f"cost-{way}", self.out / sft / "export", data, after=sft)

    def before_tuning(self, seed: int) -> Iterator[Stage]:
        """Yield the stages that make the model to fine-tune, and the pipeline."""
        model = f"model-{seed}"
        make = ["demo-model", str(self.out / model), "--preset", self.track.preset]
        make += ["--dtype", "fp32", "--seed", str(seed)]
        yield command_stage(model, f"seed {seed}: make a random checkpoint", make, self.out, [model])
        if self.track.pipeline and seed == 0:
            yield Stage(
                name="pipeline", title="train the pipeline", outputs=[self.out / "pipeline"],
                settings={"code": own_code_digest()}, run=partial(make_pipeline, self.out),
            )  # fmt: skip
        if self.track.reads_first:
            yield from self._language(f"language-{seed}", seed, after=model)

    def _start(self, seed: int) -> tuple[str, Path]:
        """Return the stage whose model is fine-tuned, and the model."""
        if self.track.reads_first:
            return f"language-{seed}", self.out / f"language-{seed}" / "export"
        return f"model-{seed}", self.out / f"model-{seed}"

    def tuning(self, seed: int, way: str) -> Stage:
        """Return the fine-tuning; its model is in ``sft-WAY-SEED/export``."""
        rows = self._files("singles", "lists") if self.track.single_advertiser else self.data(way)
        settings = [*self.track.of_sft, *rows, f"train.max_steps={self.arguments.sft_steps}"]
        start, folder = self._start(seed)
        return self._train(f"sft-{way}-{seed}", self.track.sft, folder, seed, settings, after=start)

    def data(self, way: str) -> list[str]:
        """Return the settings of the rows."""
        reasoning = ["data.reasoning=false"] if way == "without" else []
        return [*self.track.data, f"data.validation_rows={self.arguments.held_out}", *reasoning]

    def _of_rl(self) -> list[str]:
        rewards = [reward_of(self.out / "pipeline")] if self.track.pipeline else []
        return [*self.track.of_rl, *rewards, *self.arguments.overrides]

    def _language(self, name: str, seed: int, *, after: str) -> Iterator[Stage]:
        section = self.data("none")
        if seed == 0:
            texts = self.out / "texts.jsonl"
            yield Stage(
                name="texts", title="write the texts to learn from", outputs=[texts],
                settings={"section": section, "code": own_code_digest()}, run=partial(write_texts, texts, [section]),
            )  # fmt: skip
            if self.track.single_advertiser:
                yield self._rows_of_logs(section)
        files, written = (["texts", "forms"], "rows") if self.track.single_advertiser else (["texts"], "texts")
        learn = [
            *self._files(*files), "loss.normalize=token", "optim.min_learning_rate=4.0e-4",
            f"train.max_steps={self.arguments.text_steps}",
        ]  # fmt: skip
        yield self._train(name, self.track.sft, self.out / after, seed, learn, after=after, reads=written)

    def _rows_of_logs(self, section: Sequence[str]) -> Stage:
        from benchmarks.rl_small_rows import write_rows_of_logs

        return Stage(
            name="rows", title="write the rows that logs tell", after=["texts"],
            outputs=[self.out / f"{name}.jsonl" for name in ("forms", "singles", "lists")],
            settings={"section": section, "code": own_code_digest()},
            run=partial(write_rows_of_logs, self.out, section, self.track.single_advertiser),
        )  # fmt: skip

    def _files(self, *names: str) -> list[str]:
        """Return the settings of rows in files of this run."""
        sources = ", ".join(f"{{kind: jsonl, path: {self.out / name}.jsonl}}" for name in names)
        return ["data=jsonl", "data.seq_length=768", "data.validation_rows=200", f"data.sources=[{sources}]"]

    def _train(
        self, name: str, recipe: str, model: Path, seed: int, settings: Sequence[str], *, after: str, reads: str = ""
    ) -> Stage:
        own = [f"model.load={model}", f"log.dir={self.out / name}", f"train.seed={seed}", *settings]
        needs = [after, reads] if reads else [after]
        return train_stage(name, name, own, self.out, self.arguments.ranks, after=needs, recipe=recipe)

    def _score(self, name: str, model: Path, data: Sequence[str], *, after: str) -> Stage:
        answers = self.out / f"{name}.jsonl"
        pipeline = self.out / "pipeline" if self.track.pipeline else None
        run = partial(evaluated, self.track, model, [*self.track.of_sft, *data], answers, pipeline)
        return Stage(
            name=name, title=name, settings={"data": list(data)}, after=[after, *(["pipeline"] if pipeline else [])],
            outputs=[answers], resumable=True, run=run,
        )  # fmt: skip

    def _cost(self, name: str, model: Path, data: Sequence[str], *, after: str) -> Stage:
        from benchmarks.rl_small_cost import compared

        settings = [*data, *self._of_rl()]
        run = partial(compared, model, self.track.rl, settings)
        return Stage(name=name, title=name, settings={"settings": settings}, after=[after], outputs=[], run=run)

    def gain_of_seeds(self, seeds: int, way: str, records: Mapping[str, StageRecord]) -> dict[str, Any] | None:
        """Return what GRPO adds to the mean of the seeds of each row; None for tracks without values of rows."""
        of_rows = {
            about: [records[f"{about}-{way}-{seed}-scores"].result.get("of_rows") for seed in range(seeds)]
            for about in ("sft", "grpo")
        }
        if any(values is None for each in of_rows.values() for values in each):
            return None
        before, after = ([mean(row) for row in zip(*each, strict=True)] for each in of_rows.values())
        return gain(before, after)

    def results(self, seed: int, way: str, records: Mapping[str, StageRecord]) -> dict[str, Any]:
        """Return the scores and the seconds of one seed."""
        from megatron_ads.observability.metrics import read_metrics

        rl = self.out / f"grpo-{way}-{seed}"
        names = {
            "zero-shot": f"zero-{way}-{seed}",
            "SFT": f"sft-{way}-{seed}-scores",
            "SFT + GRPO": f"{rl.name}-scores",
        }
        steps = [row for row in read_metrics(rl) if "timing_s/rollout" in row]
        phases = {name: [row[name] for row in steps] for name in steps[0] if name.startswith("timing_s/")}
        scores = {about: dict(records[name].result) for about, name in names.items()}
        of_rows = {about: found.pop("of_rows", None) for about, found in scores.items()}
        before, after = (self.out / f"{names[about]}.jsonl" for about in ("SFT", "SFT + GRPO"))
        return {
            "scores": scores,
            "gain": gain(of_rows["SFT"], of_rows["SFT + GRPO"]),
            "by_length": self._by_length(before, after),
            "step_seconds": [row["step_seconds"] for row in steps],
            "phases": phases,
            "reward": [row.get("critic/rewards/mean") for row in steps],
            "cost": records[f"cost-{way}"].result if seed == 0 else None,
        }

    def _by_length(self, before: Path, after: Path) -> dict[str, float]:
        from benchmarks.rl_small_lists import recalls_by_length

        return recalls_by_length(before, after, self.out / "singles.jsonl") if self.track.single_advertiser else {}


if __name__ == "__main__":
    import sys

    sys.exit(main())
