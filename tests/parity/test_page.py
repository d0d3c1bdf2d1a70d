"""The page of a parity check."""

from dataclasses import replace

from megatron_ads.config.model import Precision
from megatron_ads.parity.verdict import LIMITS, Comparison, RungResult, render
from tests.parity.test_verdict import EXPERTS, LAYER, LOGITS, MTP

COMPARISON = Comparison((LAYER, EXPERTS, MTP), LOGITS)


def _page(passed: bool | None) -> str:
    results = [RungResult(rung=3, name="logits", passed=passed, detail="layer <0>")]
    return render("Parity of <model>", results, COMPARISON, LIMITS[Precision.fp32], {"precision": "fp32"})


def test_the_page_has_three_pictures_and_escapes_what_it_is_given() -> None:
    page = _page(True)
    assert page.count("<svg") == 3
    assert "&lt;model&gt;" in page
    assert "layer &lt;0&gt;" in page
    assert "<td>passed</td>" in page


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
    page = render(f"Parity of {script}", results, Comparison((layer,), LOGITS), LIMITS[Precision.fp32], facts)
    assert "<script" not in page
    for shown in ("Parity of ", "worst layer ", "parity --hf ", "<td>"):
        assert f"{shown}&lt;script&gt;" in page
