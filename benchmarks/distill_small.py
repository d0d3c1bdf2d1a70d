"""What a smaller model learns from a larger one's answers, with and without data quality control, on a CPU.

    python -m benchmarks.distill_small --out DIR [--student DIR] [--rows N] [--sft-steps N] [key=value ...]

The teacher is a small model of the family: random weights, the language of the prompts, then the recipe `sft/small` on
the true answers to query-ad relevance and query generation. The student has about a quarter of its weights, apart
from the embedding, and knows the same language; `--student` gives any other checkpoint. `megatron-ads distill` does the
rest on rows that the teacher has not seen, and both answer held-out rows that neither has. A third student of the same
size and steps learns the same rows with their true answers: what a perfect teacher would give.

Each stage is done once; the same command continues where it was interrupted. DIR/results.md has the tables,
DIR/results.json their numbers, DIR/distilled/rows/checked.md what quality control removed. Settings, key=value, are
those of `distill`.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sft_small import run_path, write_results, write_texts
from megatron_ads.cli import exit_status
from megatron_ads.observability.provenance import own_code_digest
from megatron_ads.quickstart.job_stages import run_command, train_stage
from megatron_ads.quickstart.stages import Stage, StageRecord
from megatron_ads.reporting.markdown import markdown

TASKS = ("query_ad_relevance", "query_generation")
TRUTH = "true answers"
STUDENT = {
    "num_hidden_layers": 2, "n_routed_experts": 4, "moe_intermediate_size": 96, "intermediate_size": 192,
}  # fmt: skip
"""What the student's config has in place of the teacher's, the preset ``shallow``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not complete yet, and write and print the tables."""
    return exit_status("benchmarks.distill_small", partial(_run, parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything it writes")
    parser.add_argument("--student", type=Path, metavar="DIR", help="checkpoint that the student starts from")
    parser.add_argument(
        "--rows", type=int, default=2000, metavar="N", help="of each task, for teacher and student each (default 2000)"
    )
    parser.add_argument("--judged", type=int, default=800, metavar="N", help="rows held out (default 800)")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--text-steps", type=int, default=400, metavar="N", help="on the texts (default 400)")
    parser.add_argument("--sft-steps", type=int, default=1400, metavar="N", help="of the teacher (default 1400)")
    parser.add_argument("--student-steps", type=int, default=800, metavar="N", help="of students (default 800)")
    parser.add_argument("--longest", type=int, default=256, metavar="N", help="tokens of an answer (default 256)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of `distill`: draws=5")
    return parser.parse_intermixed_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    out = arguments.out.resolve()
    path = DistillPath(out, arguments)
    records = run_path(list(path.stages()), out)
    report = path.results(records)
    write_results(out, report, tables(report))
    return 0


@dataclass(frozen=True, slots=True)
class DistillPath:
    """From random weights to tables."""

    out: Path
    arguments: argparse.Namespace

    @property
    def taught(self) -> Path:
        """Rows with true answers, of which the teacher learns from those that are not judged."""
        return self.out / "taught.jsonl"

    @property
    def untaught(self) -> Path:
        """Rows of the same business, of other queries and keywords, for the teacher to answer."""
        return self.out / "untaught.jsonl"

    @property
    def judged(self) -> list[str]:
        """Settings of what the teacher learns from, which hold the judged rows out."""
        return [*_rows_of(self.taught), f"data.validation_rows={self.arguments.judged}"]

    @property
    def _validation(self) -> str:
        return f"data.validation_rows={min(100, self.arguments.rows // 4)}"

    def stages(self) -> Iterator[Stage]:
        """Yield the stages."""
        yield self._stage("rows", "write rows", [self.taught, self.untaught], self._write_rows)
        texts = self.out / "texts.jsonl"
        write = partial(write_texts, texts, [self.judged])
        yield self._stage("texts", "write the texts to learn from", [texts], write, after=["rows"])
        yield from self._speaker("teacher-start", {})
        yield self._training("teacher", "fine-tune the teacher", "teacher-start-language", self.judged, "sft")
        if self.arguments.student is None:
            yield from self._speaker("student-start", STUDENT)
        yield self._distilled()
        of_rows = [*_rows_of(self.untaught), self._validation]
        yield self._training("truth", "fine-tune a student on true answers", self._student_start, of_rows, "student")
        yield self._stage(
            "truth-scores", "judge it", [self.out / "truth.jsonl"], self._judge_truth, after=["truth", "distilled"]
        )

    def _stage(self, name: str, title: str, outputs: Sequence[Path], run: Any, after: Sequence[str] = ()) -> Stage:
        sizes = {key: str(value) for key, value in vars(self.arguments).items() if key in ("rows", "judged", "longest")}
        return Stage(
            name=name, title=title, settings={**sizes, "code": own_code_digest()}, after=after, outputs=outputs, run=run
        )

    def _speaker(self, name: str, differs: Mapping[str, int]) -> Iterator[Stage]:
        """Yield the stages of a random model that learns the language of the prompts."""
        yield self._stage(name, f"make random weights: {name}", [self.out / name], lambda: self._make(name, differs))
        texts = [*_rows_of(self.out / "texts.jsonl"), self._validation, "loss.normalize=token"]
        after = [name, "texts"]
        yield self._training(f"{name}-language", "learn the language", name, texts, "text", after=after, exported=False)

    def _make(self, name: str, differs: Mapping[str, int]) -> dict[str, Any]:
        from megatron_ads.demo_model import CONFIGS, EMBEDDING_SPREADS, Preset, write_demo_model

        config = {**CONFIGS[Preset.shallow], **differs, "torch_dtype": "float32"}
        spread = EMBEDDING_SPREADS[Preset.shallow]
        return {"parameters": write_demo_model(self.out / name, config, embedding_spread=spread)}

    @property
    def _student_start(self) -> str:
        return "student-start-language" if self.arguments.student is None else ""

    def _start_of(self, stage: str) -> Path:
        """Return the checkpoint that a stage has trained; without a stage, the student's own."""
        return self.out / stage / "export" if stage else self.arguments.student.resolve()

    def _training(
        self, name: str, title: str, start: str, data: Sequence[str], kind: str, *, after: Sequence[str] | None = None,
        exported: bool = True,
    ) -> Stage:  # fmt: skip
        """Return the stage that trains from what the stage ``start`` has left."""
        load = self._start_of(start) if exported else self.out / start
        settings = [f"model.load={load}", f"log.dir={self.out / name}", *data, *self._steps(kind)]
        waits = [start] if after is None and start else (after or [])
        return train_stage(name, title, settings, self.out, self.arguments.ranks, after=waits)

    def _steps(self, kind: str) -> list[str]:
        steps = vars(self.arguments)[f"{kind}_steps"]
        warmup = min(30, steps // 2)
        return [
            "data.seq_length=512", f"train.max_steps={steps}", f"optim.warmup_steps={warmup}",
            f"train.evaluate_every={min(400, steps)}", *(["optim.min_learning_rate=4.0e-4"] if kind == "text" else []),
        ]  # fmt: skip

    def _write_rows(self) -> dict[str, Any]:
        """Write the rows of about half of all queries and keywords for the teacher to learn, the others to answer."""
        from megatron_ads.config.recipes import load_job
        from megatron_ads.data.corpus import read_corpus
        from megatron_ads.data.split import group_of
        from megatron_ads.distillation.questions import write_rows
        from megatron_ads.stable_random import stable_integer

        sources = ", ".join(f"{{kind: simulator, task: {task}, rows: {2 * self.arguments.rows}}}" for task in TASKS)
        settings = [f"data.sources=[{sources}]", "data.validation_rows=0"]
        (*of_tasks,) = read_corpus(load_job("sft/small", settings, sections=["data"]).data).training
        halves: dict[Path, list[Any]] = {self.taught: [], self.untaught: []}
        for row in (row for rows in of_tasks for row in rows):
            halves[self.untaught if stable_integer("half", group_of(row)) % 2 else self.taught].append(row)
        for file, rows in halves.items():
            write_rows(file, rows)
        return {file.stem: dict(Counter(row.task for row in rows)) for file, rows in halves.items()}

    def _distilled(self) -> Stage:
        start = self._start_of(self._student_start)
        command = [
            "distill", "--recipe", "distill/simulated", "--out", str(self.out / "distilled"),
            f"sources=[{{kind: jsonl, path: {self.untaught}}}]", "teacher.kind=local", "teacher.url=null",
            f"teacher.model={self._start_of('teacher')}", f"teacher.max_tokens={self.arguments.longest}",
            f"student.load={start}", f"student.ranks={self.arguments.ranks}",
            self._validation.replace("data", "student"), f"student.settings={json.dumps(self._steps('student'))}",
            f"judged.settings={json.dumps(self.judged)}",
            f"judged.max_new_tokens={self.arguments.longest}", *self.arguments.overrides,
        ]  # fmt: skip
        return Stage(
            name="distilled", title="distill the teacher", settings={"command": command}, resumable=True,
            after=["teacher", *([self._student_start] if self._student_start else [])],
            # Of a changed recipe, `distill` itself knows what stays; it keeps the teacher's answers.
            outputs=[self.out / "distilled" / "report.json"], run=partial(run_command, command, self.out, "distilled"),
        )  # fmt: skip

    def _judge_truth(self) -> dict[str, Any]:
        from megatron_ads.config.recipes import load_job
        from megatron_ads.distillation.agreement import agreement
        from megatron_ads.distillation.workflow import TEACHER, judged_file
        from megatron_ads.evaluation.evaluate import evaluate
        from megatron_ads.evaluation.given_answers import read_given_answers
        from megatron_ads.evaluation.held_out_rows import held_out
        from megatron_ads.evaluation.request import EvaluationRequest

        said = self.out / "truth.jsonl"
        request = EvaluationRequest(
            recipe="sft/small", overrides=self.judged, batch_size=64, answers_file=said,
            max_new_tokens=self.arguments.longest,
        )  # fmt: skip
        scores = evaluate(self._start_of("truth"), request)
        rows = held_out(load_job("sft/small", self.judged, sections=["data"]).data).tasks
        teacher = read_given_answers(judged_file(self.out / "distilled", TEACHER), rows)
        return {"scores": scores, "agreement": agreement(read_given_answers(said, rows), teacher)}

    def results(self, records: Mapping[str, StageRecord]) -> dict[str, Any]:
        """Return the report of `distill`, with the student of true answers and the sizes of both models."""
        report = json.loads((self.out / "distilled" / "report.json").read_text(encoding="utf-8"))
        del report["out"]  # a path of this machine
        truth, taught = records["truth-scores"].result, sum(records["rows"].result["untaught"].values())
        report["models"][TRUTH] = {
            **truth, "minutes": records["truth"].seconds / 60,
            "rows": {"answers": taught, "kept": taught, "kept_by_task": {}, "removed": {}},
        }  # fmt: skip
        rows = self.out / "distilled" / "rows"
        report["right_labels"] = {
            file.stem: right_labels(file, self.untaught) for file in sorted(rows.glob("*.jsonl"))
        }  # fmt: skip
        made = {
            name: records[name].result["parameters"] for name in ("teacher-start", "student-start") if name in records
        }
        minutes = sum(record.seconds for record in records.values()) / 60
        given = {name: str(value) for name, value in vars(self.arguments).items() if name != "out"}
        interrupted = any(record.resumed for record in records.values())
        return {**report, "arguments": given, "parameters": made, "minutes": minutes, "interrupted": interrupted}


def right_labels(answered: Path, truth: Path) -> dict[str, float]:
    """Return how many rows have a label, and which share of these labels is the true one."""
    from megatron_ads.data.jsonl import jsonl_rows

    labels = {row.id: row.label for row in jsonl_rows(truth)}
    right = [row.label == labels[row.id] for row in jsonl_rows(answered) if row.label is not None]
    return {"rows": len(right), "right": sum(right) / len(right) if right else 0.0}


def _rows_of(file: Path) -> list[str]:
    return ["data=jsonl", f"data.sources=[{{kind: jsonl, path: {file}}}]"]


def tables(report: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    from megatron_ads.distillation.report import text_of

    sizes = markdown(
        [["model", "parameters"], *([name, f"{count:,}"] for name, count in report["parameters"].items())]
    )  # fmt: skip
    return f"{sizes}\n{text_of(report)}"


if __name__ == "__main__":
    import sys

    sys.exit(main())
