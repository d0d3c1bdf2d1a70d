"""Prove of a plan, before it runs, that every element of the model is written, and that no two pieces overlap."""

from itertools import combinations

from conversion.plan import ConversionPlan
from conversion.regions import Rectangle, whole
from conversion.sources import WeightSource
from megatron_ads.errors import ConversionError


def check_coverage(plan: ConversionPlan, source: WeightSource) -> None:
    """Check that the planned pieces of every parameter, copies counted once, tile it without gap or overlap.

    Raises:
        ConversionError: If they do not; the plan is wrong, and nothing has been written.
    """
    pieces: dict[str, set[Rectangle]] = {}
    for file in plan.files:
        for item in file.items:
            for view in item.views:
                pieces.setdefault(view.parameter, set()).add(view.rectangle)
    for name in source.names():
        rectangles, full = pieces.pop(name, set()), whole(source.parameter(name).shape)
        covered = sum(rectangle.rows * rectangle.columns for rectangle in rectangles)
        overlap = any(one.overlap(other) for one, other in combinations(rectangles, 2))
        if overlap or covered != full.rows * full.columns:
            raise ConversionError(
                f"The plan writes {covered} of the {full.rows * full.columns} elements of {name}"
                f"{', some of them twice' if overlap else ''}. Nothing was written; please report this layout."
            )
    if pieces:
        raise ConversionError(f"The plan writes parameters that the source does not have, first {min(pieces)}.")
