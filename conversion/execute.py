"""Carry out a conversion plan: one file at a time per worker, each complete before it gets its name."""

from collections.abc import Sequence
from pathlib import Path

from conversion.atomic_file import FileRecord, PreallocatedFile
from conversion.encode import Advance, write_quantized, write_values
from conversion.plan import ConversionPlan, OutputFile, Values


def write_output_file(folder: Path, file: OutputFile, advance: Advance) -> tuple[FileRecord, dict[str, float]]:
    """Write one planned file; return its record and the error of every weight that was quantised anew."""
    errors: dict[str, float] = {}
    with PreallocatedFile(folder / file.name, file.nbytes) as out:
        out.write_at(0, file.header)
        for item in file.items:
            if isinstance(item, Values):
                write_values(out, item, advance)
            elif error := write_quantized(out, item, advance):
                errors[item.name] = error
        return out.commit(), errors


def execute(plan: ConversionPlan) -> Sequence[FileRecord]:
    """Write every file of a plan."""
    plan.target.mkdir(parents=True, exist_ok=True)
    return [write_output_file(plan.target, file, lambda _: None)[0] for file in plan.files]
