"""What generated queries find."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_ads.config.data import AdsTask
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.data.simulator.simulated_rows import simulated_examples
from megatron_ads.data.sources import read_source
from megatron_ads.errors import ConfigError
from megatron_ads.rewards.registry import open_rewards
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import Fact
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief
from tests.rewards.rollouts import answers, chat_row, rewards, values
from tests.tasks.examples import SHOES

DOCUMENTS = {"d1": "red shoes", "d2": "blue shoes", "d3": "a red hat", "d4": "garden chair"}


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in DOCUMENTS.items()))
    return {"corpus": str(file), "relevant": "wanted"}


def test_ndcg_and_recall_of_one_relevant_document(corpus: dict[str, object]) -> None:
    row = chat_row(facts={"wanted": "d2"})
    # "red shoes" finds d1 (both words), then d2 (shoes; shorter than d3) and d3 (red).
    queries = ["blue shoes", "red shoes", "garden", "<think>open"]
    assert values("retrieval", answers(row, queries), corpus) == pytest.approx([1.0, 1 / math.log2(3), 0.0, 0.0])
    assert values("retrieval", answers(row, queries), corpus | {"metric": "recall"}) == [1.0, 1.0, 0.0, 0.0]
    assert values("retrieval", answers(row, queries), corpus | {"metric": "recall", "k": 1}) == [1.0, 0.0, 0.0, 0.0]


def test_several_relevant_documents(corpus: dict[str, object]) -> None:
    row = chat_row(facts={"wanted": ["d1", "d3"]})
    # d1, d2, d3: gains 1 + 1/2 of the best 1 + 1/log2(3).
    best = 1 + 1 / math.log2(3)
    assert values("retrieval", answers(row, ["red shoes"]), corpus) == pytest.approx([1.5 / best])
    # Of the first two, d1 alone: the best order of k = 2 has both.
    assert values("retrieval", answers(row, ["red shoes"]), corpus | {"k": 2}) == pytest.approx([1 / best])
    assert values("retrieval", answers(row, ["red shoes"]), corpus | {"k": 2, "metric": "recall"}) == [0.5]


def test_the_queries_of_one_answer_count_alike(corpus: dict[str, object]) -> None:
    row = query_generation.chat_row("r", KeywordBrief("shoes"), [GeneratedQuery("blue shoes", "why")], "So.")
    row = chat_row(task=row.task, target=row.target, facts={**row.facts, "wanted": "d2"})
    text = "<think>So.</think><Query>blue shoes</Query><Reason>a</Reason><Query>garden</Query><Reason>b</Reason>"
    assert values("retrieval", answers(row, [text, "no queries"]), corpus) == [0.5, 0.0]


def test_a_dense_index_finds_by_cosine(corpus: dict[str, object]) -> None:
    row = chat_row(facts={"wanted": "d2"})
    assert values("retrieval", answers(row, ["blue shoes", "chair"]), corpus | {"index": "dense", "k": 1}) == [1.0, 0.0]


def test_rows_that_say_no_document_have_no_value_and_unknown_ones_are_named(corpus: dict[str, object]) -> None:
    rollouts = [
        *answers(chat_row("a"), ["red"]),
        *answers(chat_row("b", facts={"wanted": "d9"}), ["red"], group=1),
        *answers(chat_row("c", facts={"wanted": "d1"}), ["red shoes"], group=2),
    ]
    scores = rewards("retrieval", corpus).score(rollouts)
    assert [math.isnan(value) for value in scores.values["retrieval"]] == [True, True, False]
    assert scores.faults == {"retrieval/raised": 1}


def test_without_a_corpus_the_ads_of_the_simulated_business_are_searched() -> None:
    rows = [example.row for example in simulated_examples(AdsTask.query_generation, 40, seed=3)]
    with_ad = [row for row in rows if Fact.ad in row.facts]
    assert len(with_ad) > 10
    settings = {"seed": 3, "k": 50}
    found = values("retrieval", [each for row in with_ad for each in answers(row, [row.target])], settings)
    assert sum(found) / len(found) > 0.2, "true queries find their ads"  # 0.41; those of other rows 0.02
    pairs = zip(with_ad, [*with_ad[1:], with_ad[0]], strict=True)
    wrong = values("retrieval", [each for row, next_row in pairs for each in answers(row, [next_row.target])], settings)
    assert sum(wrong) / len(wrong) < 0.1
    other = values("retrieval", answers(chat_row(facts={Fact.ad: SHOES.as_fact()}), ["shoes"]) + answers(
        with_ad[0], [with_ad[0].target], group=1), {"seed": 3})  # fmt: skip
    assert math.isnan(other[0]), "no ad of the simulated business"


def test_the_recipe_rewards_every_row_and_true_queries_more_than_titles_and_queries_for_others() -> None:
    recipe = load_job("rl/recr1_query", ["model.load=x", "data.seed=3"])
    assert isinstance(recipe, RlConfig)
    (source,) = recipe.data.sources
    source.rows = 60
    rows = read_source(source, seed=recipe.data.seed)
    form = "<think>So.</think><Query>{}</Query><Reason>r</Reason>"
    rollouts: list[Rollout] = []
    for group, (row, other) in enumerate(zip(rows, [*rows[1:], rows[0]], strict=True)):
        title = ad["title"] if isinstance(ad := row.facts.get(Fact.ad), dict) else "no ad"
        rollouts += answers(row, [row.target, form.format(title), other.target], group=group)
    scores = open_rewards(recipe.rewards).score(rollouts)
    assert not scores.faults, "the ads of the corpus are those of the rows, whatever data.seed is"
    found, near = (scores.values[name].reshape(-1, 3) for name in ("retrieval", "semantic"))
    with_ad = ~np.isnan(found[:, 0])
    assert 20 < with_ad.sum() < 40
    true, title, other = found[with_ad].mean(axis=0)  # 0.32, 1, 0.01 over many
    assert 0.2 < true < title == 1 and other < 0.1
    true, title, other = near.mean(axis=0)  # 1, 0.1, 0.2 over many
    assert true == pytest.approx(1) and max(title, other) < 0.5, "what is found best is not natural"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "mrr"}, "metric = 'mrr'; known: ndcg, recall"),
        ({"index": "faiss"}, "index = 'faiss'; known: bm25, dense"),
        ({"k": 0}, "k = 0"),
        ({"model": "gte"}, "retrieval has model = 'gte', which has no effect with index bm25. Remove it"),
        ({"id_column": "asin"}, "id_column = 'asin', which has no effect without corpus"),
        ({"text_column": "title"}, "text_column = 'title', which has no effect without corpus"),
        ({"corpus": "x.jsonl", "seed": 3}, "seed = 3, which has no effect with a corpus"),
        ({"corpus": "nowhere.jsonl"}, "retrieval's setting corpus cannot be read"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards("retrieval", settings)


def test_a_corpus_without_the_column_is_named(corpus: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("name,text\nred shoes,b\n")
    settings = {"corpus": str(tmp_path / "table.csv"), "id_column": "text", "text_column": "name", "relevant": "wanted"}
    assert values("retrieval", answers(chat_row(facts={"wanted": "b"}), ["shoes"]), settings) == [1.0]
    with pytest.raises(ConfigError, match="has no column 'id'"):
        rewards("retrieval", {"corpus": str(tmp_path / "table.csv")})
