"""The cosine of what was said and what is true."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_ads.errors import ConfigError
from tests.rewards.rollouts import answers, chat_row, rewards, values

ROW = chat_row(target="red shoes")


def test_tf_idf_of_a_group_by_hand() -> None:
    # Texts "red shoes", "red shoes", "red hat": of N = 3, "red" is in 3: idf log(4/4) + 1 = 1; "shoe" in 2:
    # log(4/3) + 1 = 1.28768; "hat" in 1: log(4/2) + 1 = 1.69315.
    # cos(red hat, red shoes) = 1 * 1 / (sqrt(1 + 1.69315^2) * sqrt(1 + 1.28768^2)) = 1 / (1.96641 * 1.63037)
    found = values("semantic", answers(ROW, ["<think>Red?</think>red shoes", "red hat"]))
    assert found == pytest.approx([1.0, 1 / (1.96641 * 1.63037)], abs=1e-5)


def test_what_has_no_word_in_common_or_cannot_be_read_is_worth_nothing() -> None:
    assert values("semantic", answers(ROW, ["blue hat", "<think>red shoes", ""])) == pytest.approx([0.0, 0.0, 0.0])


def test_a_value_depends_on_its_group_alone() -> None:
    one, other = answers(ROW, ["red hat", "red shoes"]), answers(chat_row("s", target="a hat"), ["hat"], group=1)
    assert values("semantic", one + other)[:2] == values("semantic", one)


def test_ads_tasks_are_compared_without_markup() -> None:
    row = chat_row(
        task="next_advertiser", target="Blue Shoes Ltd", facts={"ground_truth": {"advertiser": "Blue Shoes"}}
    )
    assert values("semantic", answers(row, ["Blue Shoes"])) == pytest.approx([1.0])


def test_an_embedding_fitted_to_a_file_makes_synonyms_alike(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = ["red shoes", "red sneakers", "blue shoes", "blue sneakers", "big house", "old house"] * 2
    file.write_text("".join(json.dumps({"title": text}) + "\n" for text in texts))
    settings = {"texts": str(file), "text_column": "title", "dimensions": 2}
    near, far = values("semantic", answers(ROW, ["blue sneakers", "old house"]), settings)
    assert near > 0.99 and abs(far) < 0.01
    apart = values("semantic", answers(ROW, ["blue sneakers", "old house"]))
    assert apart[0] == pytest.approx(0.0), "without the file no text says that they are alike"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": "nowhere.jsonl"}, "semantic's setting texts cannot be read: nowhere.jsonl is not a file"),
        ({"texts": "x", "model": "y"}, "Remove one"),
        ({"text_column": "title"}, "semantic has text_column = 'title', which has no effect without texts. Remove it"),
        ({"model": "gte", "dimensions": 8}, "dimensions = 8, which has no effect with a model"),
        ({"dimensions": 0}, "dimensions = 0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards("semantic", settings)


@pytest.mark.skipif(find_spec("sentence_transformers") is not None, reason="sentence-transformers is installed")
def test_a_model_needs_sentence_transformers() -> None:
    with pytest.raises(ConfigError, match=r"setting model is 'gte', but sentence-transformers is not installed"):
        rewards("semantic", {"model": "gte"})


@pytest.mark.parametrize("is_fitted", [False, True])
def test_a_row_without_a_true_text_is_named_and_costs_its_answers_alone(is_fitted: bool, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "red shoes"}\n{"text": "blue hat"}\n')
    settings = {"texts": str(tmp_path / "texts.jsonl")} if is_fitted else {}
    row = chat_row(target="<think>x")
    scores = rewards("semantic", settings).score(answers(row, ["a"]) + answers(ROW, ["red shoes"], group=1))
    assert math.isnan(scores.values["semantic"][0]) and scores.faults == {"semantic/raised": 1}
    assert scores.values["semantic"][1] == pytest.approx(1.0)
