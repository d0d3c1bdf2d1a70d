"""Which ranks own what, worked out from the files of all ranks."""

import math
from collections import defaultdict

import pytest

from conversion.names import Split, parameters
from conversion.rank_files import OwnedSlice, RankFile, ShardsLayout, WrongCopies, wrong_copies
from megatron_ads.architecture import shape_from_config
from megatron_ads.layout import ParallelLayout, place_layers
from tests.models.checkpoints import V3

LAYOUTS = {
    "one": ParallelLayout(world=1),
    "pp2-ep2-replicated": ParallelLayout(world=8, pp=2, ep=2),
    "tp2-ep2": ParallelLayout(world=4, tp=2, ep=2),
    "etp2": ParallelLayout(world=4, tp=2, etp=2),
    "pp2-tp2-ep2-etp2": ParallelLayout(world=8, pp=2, tp=2, ep=2, etp=2),
    "pp2-vpp2": ParallelLayout(world=2, pp=2, vpp=2),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def shards(request: pytest.FixtureRequest) -> ShardsLayout:
    shape = shape_from_config(V3)
    return ShardsLayout(shape=shape, layout=request.param, placement=place_layers(shape, request.param))


def test_every_file_is_written_by_the_lowest_rank_that_holds_it(shards):
    lowest: dict[RankFile, int] = {}
    for rank in range(shards.layout.world):
        lowest.setdefault(shards.file_of(rank), rank)
    assert sorted(lowest, key=lowest.__getitem__) == list(shards.rank_files())
    writers = [rank for rank in range(shards.layout.world) if shards.writes_file(rank)]
    assert writers == sorted(lowest.values())


def test_the_owners_of_a_parameter_are_the_lowest_ranks_with_its_slices(shards):
    found: dict[str, dict[int, OwnedSlice]] = defaultdict(dict)
    for rank in range(shards.layout.world):
        file = shards.file_of(rank)
        for parameter in shards.owned(file):
            index, count = (0, 1) if parameter.split is Split.REPLICATED else shards.slice_of(parameter, file)
            found[parameter.name].setdefault(index, OwnedSlice(rank, index, count))
    assert found.keys() == parameters(shards.shape).keys()
    for parameter in parameters(shards.shape).values():
        assert shards.owners(parameter) == tuple(slices for _, slices in sorted(found[parameter.name].items()))


def test_a_word_embedding_that_mtp_repeats_belongs_to_the_first_stage():
    shape = shape_from_config(V3)
    layout = ParallelLayout(world=4, pp=2, tp=2)
    shards = ShardsLayout(shape=shape, layout=layout, placement=place_layers(shape, layout))
    assert shape.mtp_layers, "the last stage holds the embedding too"
    embedding = parameters(shape)["embedding.word_embeddings.weight"]
    assert shards.owners(embedding) == (OwnedSlice(0, 0, 2), OwnedSlice(1, 1, 2))


def test_ranks_that_hold_too_little_or_too_much_are_found(shards):
    held = [
        {parameter.name: math.prod(shards.slice_shape(parameter)) for parameter in shards.owned(shards.file_of(rank))}
        for rank in range(shards.layout.world)
    ]
    assert wrong_copies(shards, held) == []
    held[-1]["unknown"] = 3
    name = next(iter(held[-1]))
    size, lost = math.prod(parameters(shards.shape)[name].shape), held[-1].pop(name)
    short, unknown = wrong_copies(shards, held)
    assert (short.parameter, short.held) == (name, pytest.approx(short.expected - lost / size))
    assert unknown == WrongCopies("unknown", 3, 0)
