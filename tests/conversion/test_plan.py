"""Plans are checked before they run, and say what they will take."""

from dataclasses import replace

import pytest
import torch

from conversion.convert import check_coverage, lay_out, to_shards
from conversion.plan import Values, dry_run
from conversion.sources import open_source
from conversion.to_shards import ShardsTarget
from megatron_ads.config.model import LayoutConfig
from megatron_ads.errors import ConversionError
from parity_tests.harness.hf_checkpoints import bf16_checkpoint


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    source = open_source(bf16_checkpoint(folder / "hf"))
    plan = ShardsTarget(source, folder / "shards", lay_out(source.shape, LayoutConfig(pp=2, tp=2, ep=2))).plan()
    return source, plan


def test_a_plan_covers_every_parameter_exactly_once(planned):
    source, plan = planned
    times = {name: torch.zeros(source.parameter(name).shape, dtype=torch.int) for name in source.names()}
    views = {(view.parameter, view.rectangle) for file in plan.files for item in file.items for view in item.views}
    for name, part in views:  # copies on several ranks are one piece
        values = times[name].view(-1, times[name].shape[-1])
        values[part.row : part.row + part.rows, part.column : part.column + part.columns] += 1
    assert len(views) > len(times), "nothing was cut"
    assert all(bool((counted == 1).all()) for counted in times.values())
    check_coverage(plan, source)


def _without(plan, file_index):
    return replace(plan, files=plan.files[:file_index] + plan.files[file_index + 1 :])


@pytest.mark.parametrize("file_index", range(4))
def test_a_plan_that_leaves_out_a_file_is_refused(planned, file_index):
    source, plan = planned
    with pytest.raises(ConversionError, match=r"The plan writes \d+ of the \d+ elements of"):
        check_coverage(_without(plan, file_index), source)


def test_a_plan_with_overlapping_pieces_is_refused(planned):
    source, plan = planned
    first = plan.files[0]
    item = next(item for item in first.items if isinstance(item, Values) and item.name.endswith("linear_fc1.weight"))
    view = item.views[0]
    shifted = replace(view, rectangle=replace(view.rectangle, row=view.rectangle.row + 1))
    broken = replace(item, views=(shifted, *item.views[1:]))
    items = tuple(broken if one is item else one for one in first.items)
    with pytest.raises(ConversionError, match=r"linear_fc1\.weight, some of them twice"):
        check_coverage(replace(plan, files=(replace(first, items=items), *plan.files[1:])), source)


def test_a_plan_is_made_without_writing_anything(planned):
    _, plan = planned
    assert not plan.target.exists()
    assert len(plan.digest) == 64


def test_a_dry_run_counts_what_is_then_written(planned):
    source, plan = planned
    expected = dry_run(plan, workers=2)
    assert expected.fits and expected.seconds > 0
    to_shards(source.path, plan.target, LayoutConfig(pp=2, tp=2, ep=2))
    written = [file.stat().st_size for file in plan.target.glob("*.safetensors")]
    assert (expected.files, expected.written_bytes) == (len(written), sum(written))
    assert expected.largest_file_bytes == max(written)
    assert 0.3e9 < expected.worker_bytes < 1.5e9
