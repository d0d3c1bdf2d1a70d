"""Layouts as algebra: against real Megatron-Core process groups and its own pipeline-string parser."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from conversion.published_models import published_file
from megatron_ads.architecture import ModelShape, read_model_shape
from megatron_ads.errors import ConfigError
from megatron_ads.layout import Coordinates, ParallelLayout, expand_pipeline, place_layers

R1 = read_model_shape(published_file("deepseek_r1"))


def small_shape(num_layers: int, mtp_layers: int = 0, first_dense_layers: int = 1) -> ModelShape:
    return replace(R1, num_layers=num_layers, mtp_layers=mtp_layers, first_dense_layers=first_dense_layers)


LAYOUTS = [
    ParallelLayout(world=1),
    ParallelLayout(world=4, pp=2, ep=2),
    ParallelLayout(world=8, pp=4, ep=2),
    ParallelLayout(world=8, tp=2, pp=2, ep=2),
    ParallelLayout(world=8, tp=2, ep=8),
    ParallelLayout(world=8, cp=2, pp=2, ep=4),
    ParallelLayout(world=16, tp=2, cp=2, pp=2, ep=2, etp=2),
    ParallelLayout(world=16, tp=4, ep=2, etp=2),
    ParallelLayout(world=16, tp=1, pp=2, ep=2, etp=4),
    ParallelLayout(world=24, tp=2, cp=1, pp=3, ep=4),
    ParallelLayout(world=248, pp=31, ep=8),
    ParallelLayout(world=496, pp=31, ep=8, tp=2, cp=4),
]


def layout_id(layout: ParallelLayout) -> str:
    sizes = "-".join(
        f"{name}{getattr(layout, name)}" for name in ("tp", "cp", "pp", "ep", "etp") if getattr(layout, name) > 1
    )
    return f"{layout.world}ranks-{sizes or 'single'}"


AXES = {
    # axis: (Megatron's accessor, the grid in which the other indices stay fixed)
    "tp": ("get_tensor_model_parallel_group", ("pp", "dp", "cp", "tp")),
    "cp": ("get_context_parallel_group", ("pp", "dp", "cp", "tp")),
    "dp": ("get_data_parallel_group", ("pp", "dp", "cp", "tp")),
    "pp": ("get_pipeline_model_parallel_group", ("pp", "dp", "cp", "tp")),
    "etp": ("get_expert_tensor_parallel_group", ("pp", "edp", "ep", "etp")),
    "ep": ("get_expert_model_parallel_group", ("pp", "edp", "ep", "etp")),
    "edp": ("get_expert_data_parallel_group", ("pp", "edp", "ep", "etp")),
}


def expected_group(layout: ParallelLayout, rank: int, axis: str) -> list[int]:
    """Return the ranks that differ from ``rank`` along ``axis`` only, in the order of that axis."""
    _, grid = AXES[axis]
    here = layout.coordinates(rank)
    members = [
        other
        for other in range(layout.world)
        if all(getattr(layout.coordinates(other), name) == getattr(here, name) for name in grid if name != axis)
    ]
    return sorted(members, key=lambda other: getattr(layout.coordinates(other), axis))


def megatron_groups(layout: ParallelLayout, rank: int) -> dict[str, list[int]]:
    """Return the members of every group that Megatron-Core builds for ``rank``, without any process started."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )
        return {
            axis: dist.get_process_group_ranks(getattr(parallel_state, accessor)())
            for axis, (accessor, _) in AXES.items()
        }
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_coordinates_are_those_of_megatrons_process_groups(layout: ParallelLayout) -> None:
    ranks = range(layout.world) if layout.world <= 24 else (0, 1, 7, 8, 100, layout.world // 2, layout.world - 1)
    for rank in ranks:
        expected = {axis: expected_group(layout, rank, axis) for axis in AXES}
        assert megatron_groups(layout, rank) == expected, f"rank {rank}"


def test_the_comparison_with_megatron_sees_a_wrong_rank_order() -> None:
    layout = ParallelLayout(world=8, tp=2, pp=2, ep=2)
    swapped = ParallelLayout(world=8, tp=2, pp=4, ep=2)
    assert megatron_groups(layout, 5)["pp"] != expected_group(swapped, 5, "pp")


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_no_two_ranks_have_the_same_coordinates(layout: ParallelLayout) -> None:
    assert len({layout.coordinates(rank) for rank in range(layout.world)}) == layout.world


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_stage_ranks_are_those_whose_coordinates_say_so(layout: ParallelLayout) -> None:
    for stage in range(layout.pp):
        assert list(layout.stage_ranks(stage)) == [
            rank for rank in range(layout.world) if layout.coordinates(rank).pp == stage
        ]


def test_the_published_layout_has_eight_replicas_and_one_of_each_expert() -> None:
    layout = ParallelLayout(world=248, pp=31, ep=8)
    assert (layout.dp, layout.edp) == (8, 1)
    # 256 experts / 8 ranks = 32 each; the last rank of stage 3 is 3 * 8 + 7 = 31.
    assert layout.coordinates(31) == Coordinates(pp=3, dp=7, cp=0, tp=0, edp=0, ep=7, etp=0)
    assert layout.local_experts(256, 7) == range(224, 256)


def test_smallest_layout_holds_both_grids_once() -> None:
    # lcm(2 * 1, 3 * 1) = 6 ranks a stage
    layout = ParallelLayout.smallest(pp=2, tp=2, ep=3)
    assert (layout.world, layout.dp, layout.edp) == (12, 3, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 8, "tp": 0}, r"layout\.tp is 0; it must be at least 1"),
        ({"world": 0}, r"layout\.world is 0; it must be at least 1"),
        ({"world": 64, "pp": 3, "cp": 2, "tp": 2}, r"pp \* cp \* tp = 3 \* 2 \* 2 = 12, which does not divide the 64"),
        ({"world": 8, "pp": 2, "ep": 3}, r"pp \* ep \* etp = 2 \* 3 \* 1 = 6, which does not divide the 8 ranks"),
        ({"world": 2, "vpp": 2}, r"layout\.vpp is 2 with layout\.pp = 1"),
    ],
)
def test_impossible_sizes_are_refused_with_the_equation(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelLayout(**sizes)


def test_smallest_names_the_size_that_is_not_positive() -> None:
    with pytest.raises(ConfigError, match=r"layout\.tp is 0"):
        ParallelLayout.smallest(tp=0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(world=7, ep=7), r"256 routed experts cannot be spread evenly over layout\.ep = 7 ranks"),
        (ParallelLayout(world=3, tp=3), r"128 attention heads cannot be cut into layout\.tp = 3 equal parts"),
        (ParallelLayout(world=3, etp=3), r"2048 routed-expert columns cannot be cut into layout\.etp = 3"),
    ],
)
def test_a_model_that_cannot_be_cut_evenly_is_refused(layout: ParallelLayout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.check_model(R1)


# ---- pipeline strings ----

STRINGS = [
    "EtL",
    "Et|tL",
    "E|t|t|L",
    "Ett|(tt|)*29tL",
    "Et|(tt|)*29tmL",
    "Ettt|(tt|)*28,t|mL",
    "E,t*3|(t*2|)*29,m|L",
    "Et|(t|)*60mL",
    "E|(|t)*2||mL",
    "Et*0|tL",
    "Et*10|(t|tt|)*3L",
    "E||L",
    "",
    "|",
    "Ettx|L",
    "E((t|)*2|)*2L",
    "Et**2L",
    "E(t)2L",
    "()*3EtL",
    "Et*2*2L",
    "(Et|)*1(t|)*2L",
    "et|tL",
    "LtE",
    "EtEtL",
    "Ett|tm|mL",
    "Etmt|L",
    "Em|ttL",
    "Etm|t|t|L",
    "E|m|tt|L",
    "EttmL|",
    "Et|t|tm|L",
    "Et|t|t|mL",
    "Et|t|t|m|L|",
    "t|EttL",
    "Et|t|m|L",
    "Etm|L",
    "|EttL",
]


def expand_with_megatron(pipeline: str) -> list[str] | None:
    """Return Megatron-Core's reading of a string, one string per chunk; None where it refuses it."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.mtp: "m", LayerType.loss: "L"}
    try:
        rows = PipelineParallelLayerLayout.parse_str_to_list(pipeline)
    except AssertionError:
        return None
    return ["".join(letters[layer] for layer in row) for row in rows]


@pytest.mark.parametrize("pipeline", STRINGS)
def test_strings_are_unrolled_as_megatron_does(pipeline: str) -> None:
    expected = expand_with_megatron(pipeline)
    if expected is None:
        with pytest.raises(ConfigError, match="the letters are E"):
            expand_pipeline(pipeline)
    else:
        assert expand_pipeline(pipeline) == expected


@pytest.mark.parametrize("pipeline", ["E(t|)*999999999L", "Et*1000L", "Et*" + "9" * 5000 + "L"])
def test_an_absurd_number_of_repeats_is_refused_at_once(pipeline: str) -> None:
    with pytest.raises(ConfigError, match="repeats something 1,000 times or more"):
        expand_pipeline(pipeline)


def test_spaces_are_ignored_although_megatron_refuses_them() -> None:
    assert expand_with_megatron("Et | tL") is None
    assert expand_pipeline("Et | tL") == ["Et", "tL"]


def accepted_by_megatron(pipeline: str, *, pp: int, num_layers: int, mtp_layers: int) -> bool:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        PipelineParallelLayerLayout(pipeline, pp).validate_layer_layout(num_layers, mtp_layers)
    except (AssertionError, IndexError):
        return False
    return True


def accepted_here(pipeline: str, *, pp: int, num_layers: int, mtp_layers: int) -> bool:
    try:
        chunks = len(expand_pipeline(pipeline))
        layout = ParallelLayout(world=pp, pp=pp, vpp=max(1, chunks // pp))
        place_layers(small_shape(num_layers, mtp_layers, first_dense_layers=0), layout, pipeline=pipeline)
    except ConfigError:
        return False
    return True


def runs_nowhere(pipeline: str, pp: int) -> bool:
    """Whether Megatron-Core 0.16 accepts what it cannot run, so that being stricter is right.

    It builds the embedding in the first and the head in the last chunk whatever E and L say, and forgets the last
    virtual chunk of stage 0 when it forbids MTP layers on that stage.
    """
    chunks = expand_pipeline(pipeline)
    return "E" not in chunks[0] or "L" not in chunks[-1] or (pp > 1 and "m" in "".join(chunks[-pp::pp]))


def test_placements_are_accepted_exactly_where_megatron_accepts_and_runs_them() -> None:
    accepted = refused = stricter = 0
    for pipeline, pp, num_layers, mtp_layers in product(STRINGS, (1, 2, 4), (1, 2, 3, 4), (0, 1, 2)):
        if pp == 1 and "|" in pipeline:
            continue  # virtual chunks need pipeline stages here, and in Megatron when it runs
        if mtp_layers and "m" not in pipeline:
            continue  # MTP layers that the string leaves out go beside the loss here
        sizes = {"pp": pp, "num_layers": num_layers, "mtp_layers": mtp_layers}
        ours, theirs = accepted_here(pipeline, **sizes), accepted_by_megatron(pipeline, **sizes)
        if theirs and runs_nowhere(pipeline, pp):
            assert not ours, (pipeline, sizes)
            stricter += 1
        else:
            assert ours == theirs, (pipeline, sizes)
        accepted += ours
        refused += not ours
    assert accepted >= 10  # the comparison is not one of refusals only
    assert refused >= 300
    assert stricter >= 4


# ---- placements ----


def layers_of(pipeline: str, *, pp: int, num_layers: int, mtp_layers: int = 0) -> list[tuple[int, ...]]:
    layout = ParallelLayout(world=pp, pp=pp, vpp=len(expand_pipeline(pipeline)) // pp)
    placement = place_layers(small_shape(num_layers, mtp_layers), layout, pipeline=pipeline)
    return [chunk.layers for chunk in placement.chunks]


@pytest.mark.parametrize(
    ("pipeline", "pp", "num_layers", "mtp_layers"),
    [
        ("Ett|tt|t|L", 4, 5, 0),
        ("E|tt|tt|L", 4, 4, 0),
        ("Et|(tt|)*29tmL", 31, 60, 1),
        ("Et|(t|)*60mL", 31, 61, 1),
        ("Et|t|tt|t|t|mL", 2, 6, 1),
        ("Et|t|tt|t|t|mL", 3, 6, 1),
    ],
)
def test_layers_and_stages_are_those_megatron_would_build(
    pipeline: str, pp: int, num_layers: int, mtp_layers: int
) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    megatron = PipelineParallelLayerLayout(pipeline, pp)
    vpp = megatron.virtual_pipeline_model_parallel_size
    layout = ParallelLayout(world=pp, pp=pp, vpp=vpp)
    placement = place_layers(small_shape(num_layers, mtp_layers), layout, pipeline=pipeline)

    layer = 0
    for virtual in range(vpp):
        for stage in range(pp):
            row = megatron.layout[stage][virtual]
            (chunk,) = [c for c in placement.stage_chunks(stage) if c.virtual == virtual]
            count = row.count(LayerType.decoder)
            assert chunk.layers == tuple(range(layer, layer + count))
            assert len(chunk.mtp_layers) == row.count(LayerType.mtp)
            assert chunk.has_embedding == (LayerType.embedding in row)
            assert chunk.has_loss == (LayerType.loss in row)
            layer += count
    assert layer == num_layers
    assert placement.string == "|".join(expand_pipeline(pipeline))


def test_the_published_r1_layout_leaves_stage_0_without_experts() -> None:
    layout = ParallelLayout(world=248, pp=31, ep=8)
    placement = place_layers(R1, layout, last_stage_layers=1)
    assert placement.string == "|".join(expand_pipeline("Ett|(tt|)*29tmL"))
    # Layers 0, 1 and 2 are dense: stage 0 holds 0 and 1, stage 1 holds 2 and 3.
    assert [placement.chunks[stage].layers for stage in (0, 1, 30)] == [(0, 1), (2, 3), (60,)]
    assert placement.expert_less_stages(R1) == (0,)
    assert placement.chunks[30].needs_embedding
    assert not placement.chunks[30].has_embedding


def test_the_interleaved_r1_layout_gives_every_stage_experts() -> None:
    layout = ParallelLayout(world=248, pp=31, vpp=2, ep=8)
    placement = place_layers(R1, layout, pipeline="Et|(t|)*60mL")
    assert len(placement.stage_chunks(0)) == 2
    assert placement.expert_less_stages(R1) == ()
    # Stage 0 runs chunks 0 and 31, which hold layers 0 (dense) and 31 (experts).
    assert [chunk.layers for chunk in placement.stage_chunks(0)] == [(0,), (31,)]
    assert [(chunk.layers, chunk.mtp_layers) for chunk in placement.stage_chunks(30)] == [((30,), ()), ((), (0,))]


def test_without_experts_on_the_last_stages_they_are_listed_too() -> None:
    # Chunk 0: layer 0 (dense); chunk 3: loss only. Only 1 and 2 hold MoE layers.
    layout = ParallelLayout(world=4, pp=4)
    placement = place_layers(small_shape(5), layout, pipeline="Et|tt|tt|L")
    assert placement.expert_less_stages(small_shape(5)) == (0, 3)


def test_an_mtp_layer_alone_brings_experts_to_its_stage() -> None:
    shape = small_shape(3, mtp_layers=1, first_dense_layers=2)
    placement = place_layers(shape, ParallelLayout(world=3, pp=3), pipeline="Ett|t|mL")
    assert placement.expert_less_stages(shape) == (0,)


def test_layers_are_spread_evenly_after_the_given_ones() -> None:
    # (9 - 1 - 2) / 2 = 3
    placement = place_layers(small_shape(9), ParallelLayout(world=4, pp=4), first_stage_layers=1, last_stage_layers=2)
    assert placement.string == "Et|ttt|ttt|ttL"
    assert place_layers(small_shape(8), ParallelLayout(world=2, pp=2, vpp=2)).string == "Ett|tt|tt|ttL"
    assert place_layers(small_shape(2, 1), ParallelLayout(world=1)).string == "EttmL"


@pytest.mark.parametrize(
    ("sizes", "kwargs", "message"),
    [
        ({"pp": 31}, {}, r"61 decoder layers = 61, which 31 chunks .*31 \* 1 = 31, less 0 given\) cannot share evenly"),
        ({"pp": 4}, {"first_stage_layers": 2}, r"61 decoder layers - 2 \(layout\.first_stage_layers\) = 59, which 3"),
        ({"pp": 2}, {"first_stage_layers": 30, "last_stage_layers": 30}, r"- 30 .* - 30 .* = 1, which 0 chunks"),
        ({"pp": 2}, {"first_stage_layers": 62}, r"= -1, which 1 chunks"),
        ({"pp": 2}, {"last_stage_layers": -1}, r"layout\.last_stage_layers is -1; it must be at least 0"),
        ({"pp": 1}, {"last_stage_layers": 61}, r"layout\.last_stage_layers is 61, but layout\.pp = 1"),
        ({"pp": 2, "vpp": 2}, {"last_stage_layers": 1}, r"layout\.pp = 2 and layout\.vpp = 2"),
        ({"pp": 2}, {"pipeline": "Et*30|t*31L", "first_stage_layers": 30}, r"layout\.pipeline already says"),
        ({"pp": 2}, {"pipeline": "Et*61L"}, r"has 1 chunks, but layout\.pp \* layout\.vpp = 2 \* 1 = 2"),
        ({"pp": 2}, {"pipeline": "Et*30|t*30L"}, r"places 60 decoder layers \(t\), but the model has 61: -1"),
        ({"pp": 2}, {"pipeline": "Et*30|t*31mmL"}, r"places 2 MTP layers \(m\), but the model has 1: \+1"),
        ({"pp": 2}, {"pipeline": "Et*30|Et*31L"}, r"places 2 embeddings \(E\), but the model has 1: \+1"),
        ({"pp": 2}, {"pipeline": "Et*30|t*31"}, r"places 0 losses \(L\)|places 0 MTP layers"),
        ({"pp": 2}, {"pipeline": "Et*61mL|"}, r"must have E in the first chunk and L in the last one"),
        ({"pp": 2}, {"pipeline": "Et*30m|t*31L"}, r"out of order: first E, then every t, then every m, then L"),
        (
            {"pp": 2, "vpp": 2},
            {"pipeline": "Et*61|m||L"},
            r"virtual chunk 0 of stage 1; they must be in the last one, 1",
        ),
        ({"pp": 2, "vpp": 2}, {"pipeline": "Et*60|t|m|L"}, r"MTP layers \(m\) on pipeline stage 0"),
    ],
)
def test_impossible_placements_are_refused_with_the_numbers(
    sizes: dict[str, int], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        place_layers(R1, ParallelLayout(world=sizes["pp"], **sizes), **kwargs)


def test_mtp_layers_on_two_chunks_are_refused() -> None:
    shape = small_shape(2, mtp_layers=2)
    with pytest.raises(ConfigError, match="spreads the MTP layers"):
        place_layers(shape, ParallelLayout(world=3, pp=3), pipeline="Ett|m|mL")
