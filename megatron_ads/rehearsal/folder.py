"""Where everything of one rehearsal lies, below the folder the user chose."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RehearsalFolder:
    """Paths below ``root``; nothing is created here."""

    root: Path

    @property
    def start(self) -> Path:
        """The random checkpoint, Hugging Face format."""
        return self.root / "model"

    @property
    def shards(self) -> Path:
        """The same, one file per rank."""
        return self.root / "shards"

    @property
    def run(self) -> Path:
        """Metrics, TensorBoard files and training checkpoints."""
        return self.root / "run"

    @property
    def trained_shards(self) -> Path:
        """The weights after the last step, one file per rank; written by the trainer."""
        return self.run / "export"

    @property
    def tuned(self) -> Path:
        """The fine-tuned checkpoint, Hugging Face format."""
        return self.root / "tuned"

    def answers(self, when: str) -> Path:
        """What the model wrote for every held-out row, ``before`` or ``after``."""
        return self.root / f"answers-{when}.jsonl"

    def log(self, stage: str) -> Path:
        """What one stage's processes printed."""
        return self.root / "logs" / f"{stage}.log"

    @property
    def report_html(self) -> Path:
        """The report for people."""
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        """The report for programs."""
        return self.root / "report.json"

    def described(self) -> list[tuple[str, Path]]:
        """Return what there is for a user to look at, with a description each."""
        return [
            ("report for people", self.report_html),
            ("report for programs", self.report_json),
            ("random checkpoint it started from (Hugging Face)", self.start),
            ("the same as shards, one file per rank", self.shards),
            ("metrics of every step (JSONL, TensorBoard) and training checkpoints", self.run),
            ("fine-tuned weights as shards", self.trained_shards),
            ("fine-tuned checkpoint (Hugging Face)", self.tuned),
            ("answers to the held-out rows before", self.answers("before")),
            ("answers to the held-out rows after", self.answers("after")),
            ("output of every stage", self.root / "logs"),
        ]
