"""Where everything of one rehearsal lies, below the folder the user chose."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RehearsalFolder:
    """Paths below ``root``; nothing is created here."""

    root: Path

    @property
    def start(self) -> Path:
        """The random checkpoint, Hugging Face format, FP8 as DeepSeek publishes it."""
        return self.root / "model"

    @property
    def start_bf16(self) -> Path:
        """The same in BF16, which transformers runs on a CPU."""
        return self.root / "model-bf16"

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
        """The fine-tuned checkpoint, Hugging Face format, FP32 as trained."""
        return self.root / "tuned"

    @property
    def tuned_fp8(self) -> Path:
        """The fine-tuned checkpoint in FP8, as DeepSeek publishes it."""
        return self.root / "tuned-fp8"

    @property
    def tuned_fp8_bf16(self) -> Path:
        """What the FP8 checkpoint stands for, in BF16, which transformers runs on a CPU."""
        return self.root / "tuned-fp8-bf16"

    def answers(self, model: str) -> Path:
        """What a model wrote for every held-out row: ``before``, ``after`` or ``after-fp8``."""
        return self.root / f"answers-{model}.jsonl"

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
            ("random checkpoint it started from (Hugging Face, FP8)", self.start),
            ("the same as shards, one file per rank", self.shards),
            ("the same in BF16 for transformers", self.start_bf16),
            ("metrics of every step (JSONL, TensorBoard) and training checkpoints", self.run),
            ("fine-tuned weights as shards", self.trained_shards),
            ("fine-tuned checkpoint (Hugging Face, FP32)", self.tuned),
            ("fine-tuned checkpoint (Hugging Face, FP8)", self.tuned_fp8),
            ("the FP8 one read back (Hugging Face, BF16)", self.tuned_fp8_bf16),
            ("answers to the held-out rows before", self.answers("before")),
            ("answers after", self.answers("after")),
            ("answers after, from the FP8 checkpoint", self.answers("after-fp8")),
            ("output of every stage", self.root / "logs"),
        ]
