"""One result for each rung, from measurements made up by hand, and the page of a check."""

from dataclasses import replace

import pytest

from megatron_ads.config.model import Precision
from megatron_ads.parity.verdict import (
    LIMITS,
    LayerKind,
    LayerResult,
    LogitResult,
    RouterResult,
    RungResult,
    StreamResult,
    first_departure,
    render,
    rungs,
)

LIMIT = LIMITS[Precision.fp32]
NAMES = RungResult(rung=1, name="names", passed=True, detail="")
LAYER = LayerResult(
    layer=0,
    kind=LayerKind.DENSE,
    difference=1e-7,
    carried=2e-7,
    largest=1e-6,
    changed_tensors=(),
    router=None,
    seconds=1.0,
)
ROUTER = RouterResult(tokens=100, rerouted=0, near_ties=1, weight_difference=1e-7)
EXPERTS = replace(LAYER, layer=1, kind=LayerKind.EXPERTS, router=ROUTER)
MTP = replace(LAYER, layer=2, kind=LayerKind.MTP, router=ROUTER)
LOGITS = LogitResult(
    tokens=100, rerouted=0, max_abs_difference=1e-6, divergence=1e-9, agreement=1.0, by_position=(1e-7, 1e-6)
)


def _passed(
    *layers: LayerResult, logits: LogitResult = LOGITS, outside: tuple[str, ...] = ()
) -> dict[int, bool | None]:
    results = rungs(NAMES, StreamResult(layers, logits), outside, LIMIT)
    return {one.rung: one.passed for one in results}


def test_a_right_checkpoint_passes_and_what_does_not_fit_has_no_verdict() -> None:
    expected = {1: True, 2: True, 3: True, 4: True, 5: None, 6: True, 7: None, 8: None, 9: None, 10: None}
    assert _passed(LAYER, EXPERTS, MTP) == expected


def test_changed_bits_fail_the_round_trip_alone() -> None:
    changed = replace(EXPERTS, changed_tensors=("decoder.layers.1.mlp.router.weight",))
    assert [rung for rung, passed in _passed(LAYER, changed, MTP).items() if passed is False] == [2]
    assert _passed(LAYER, EXPERTS, outside=("output_layer.weight",))[2] is False


def test_the_first_layer_beyond_the_limit_is_named() -> None:
    wrong = replace(EXPERTS, difference=1e-3)
    results = rungs(NAMES, StreamResult((LAYER, wrong, replace(wrong, layer=7)), LOGITS), (), LIMIT)
    assert results[2].detail.startswith("layer 1 departs first, by 1.0e-03 of its size")
    assert first_departure([LAYER, EXPERTS], LIMIT) is None


def test_a_difference_that_is_not_a_number_fails() -> None:
    assert _passed(replace(LAYER, difference=float("nan")), EXPERTS)[3] is False


def test_a_large_divergence_fails_with_every_layer_right() -> None:
    assert _passed(LAYER, EXPERTS, logits=replace(LOGITS, divergence=1e-3))[3] is False


def test_tokens_sent_elsewhere_fail_the_router_and_near_ties_do_not() -> None:
    elsewhere = replace(EXPERTS, router=replace(ROUTER, rerouted=1))
    assert _passed(LAYER, elsewhere)[4] is False
    assert _passed(LAYER, replace(EXPERTS, router=replace(ROUTER, near_ties=50)))[4] is True


def test_an_error_of_the_mtp_layer_fails_its_rung_alone() -> None:
    verdicts = _passed(LAYER, EXPERTS, replace(MTP, difference=1e-3))
    assert [rung for rung, passed in verdicts.items() if passed is False] == [6]
    assert _passed(LAYER, EXPERTS)[6] is None


@pytest.mark.parametrize(("tokens", "rerouted", "passed"), [(24, 2, True), (24, 3, False), (10_000, 240, True)])
def test_in_bf16_a_share_of_tokens_may_be_rerouted_at_any_length(tokens: int, rerouted: int, passed: bool) -> None:
    limits = LIMITS[Precision.bf16]
    routers = [replace(ROUTER, tokens=tokens, rerouted=rerouted)]
    assert limits.allows(routers) is passed
    assert not limits.allows([replace(ROUTER, tokens=10_000, rerouted=300)])


def test_tokens_of_the_mtp_layer_sent_elsewhere_fail_its_rung() -> None:
    assert _passed(LAYER, EXPERTS, replace(MTP, router=replace(ROUTER, rerouted=1)))[6] is False


# ---- the page ----

COMPARISON = StreamResult((LAYER, EXPERTS, MTP), LOGITS)


def _page(passed: bool | None) -> str:
    results = [RungResult(rung=3, name="logits", passed=passed, detail="layer <0>")]
    return render("Parity of <model>", results, COMPARISON, LIMITS[Precision.fp32], {"precision": "fp32"})


def test_the_page_has_three_pictures_and_escapes_what_it_is_given() -> None:
    page = _page(True)
    assert page.count("<svg") == 3
    assert "&lt;model&gt;" in page
    assert "layer &lt;0&gt;" in page
    assert "<td>passed</td>" in page


def test_the_picture_of_the_routers_goes_from_none_to_all_of_the_tokens() -> None:
    picture = _page(True).split("<svg")[3]
    assert [f">{value}</text>" in picture for value in ("0", "40", "100", "105")] == [True, True, True, False]


def test_a_failed_rung_is_the_headline() -> None:
    page = _page(False)
    assert "rung 3 failed" in page
    assert "<td>FAILED</td>" in page
    assert "not run" in _page(None)


def test_paths_prompts_and_details_cannot_become_markup() -> None:
    script = "<script>x</script>"
    layer = replace(LAYER, kind=script)
    results = [RungResult(rung=3, name=script, passed=True, detail=f"worst layer {script}")]
    facts = {"command": f"megatron-ads parity --hf {script}", script: script}
    page = render(f"Parity of {script}", results, StreamResult((layer,), LOGITS), LIMITS[Precision.fp32], facts)
    assert "<script" not in page
    for shown in ("Parity of ", "worst layer ", "parity --hf ", "<td>"):
        assert f"{shown}&lt;script&gt;" in page
