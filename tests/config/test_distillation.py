"""Recipes of `distill`: the shipped one composes, and a setting that cannot work is refused with what to do."""

from pathlib import Path

import pytest

from megatron_ads.config.distillation import DistillConfig, Student, load_distill_recipe
from megatron_ads.config.recipes import load_job, shipped_recipes
from megatron_ads.errors import ConfigError


def load(tmp_path: Path, *overrides: str) -> DistillConfig:
    needed = ["teacher.model=m", f"student.load={tmp_path}", "teacher.tokenizer=t"]
    return load_distill_recipe("distill/simulated", [*needed, *overrides])


def test_the_shipped_recipe_needs_a_teacher_and_a_student_and_nothing_else(tmp_path: Path) -> None:
    assert shipped_recipes("distill") == ("distill/simulated",)
    config = load(tmp_path)
    assert config.students == [Student.checked, Student.unchecked]
    held_out = load_job(config.judged.recipe, config.judged_settings, sections=["data"]).data
    assert [source.task for source in held_out.sources] == [source.task for source in config.sources]
    with pytest.raises(ConfigError, match=r"student\.load must be set"):
        load_distill_recipe("distill/simulated", ["teacher.model=m"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources=[]", "sources and answered are both empty"),
        ("teacher.model=null", r"teacher\.model is null\. Name the model"),
        ("draws=1", r"quality\.min_agreement is 1, which has no effect with draws = 1"),
        (
            "teacher.tokenizer=null",
            r"min_probability is 0\.5, which needs the tokenizer.*set quality\.min_probability=0",
        ),
        ("students=[checked,checked]", "students lists checked more than once"),
        ("students=[]", r"students is empty\. Name some of checked, unchecked"),
        ("student.settings=['log.dir=x']", r"student\.settings has 'log\.dir=x', which is decided already"),
        ("quality.min_words=-1", r"quality\.min_words is -1; it must be at least 0"),
        ("quality.min_wordz=1", r"did you mean quality\.min_words"),
        ("judged.batch_size=0", r"judged\.batch_size is 0"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, override)


def test_each_draw_is_a_job_of_its_own_with_other_answers(tmp_path: Path) -> None:
    config = load(tmp_path, "attempts=2", f"out={tmp_path}")
    jobs = [config.label_job(tmp_path / "questions.jsonl", draw) for draw in range(3)]
    assert [job.out for job in jobs] == [f"{tmp_path}/answers/{draw}" for draw in range(3)]
    assert [job.log_probabilities for job in jobs] == [True, False, False]
    ways = [job.generation(attempt) for job in jobs for attempt in range(2)]
    assert [str(way.method) for way in ways] == ["greedy", *["sampled"] * 5]
    assert len({way.seed for way in ways}) == 6


def test_without_reasoning_none_is_asked_for_where_models_are_judged(tmp_path: Path) -> None:
    assert load(tmp_path, "reasoning=false").judged_settings[-1] == "data.reasoning=false"
    assert "data.reasoning=false" not in load(tmp_path).judged_settings
