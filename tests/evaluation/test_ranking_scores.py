import math
from dataclasses import replace

import pytest

from megatron_ads.evaluation.answer_records import Answer, AnswerBeam
from megatron_ads.evaluation.ranking_scores import advertiser_rankings, ranking_scores
from megatron_ads.inference.name_answers import AdvertiserNames, names_trained_on
from megatron_ads.rows import Fact
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.answer_format import render_reasoned
from tests.evaluation.advertiser_rows import buyer, name_row

# Labels: A three times, B twice, C to F once.
TRAINING = [name_row(str(number), label) for number, label in enumerate("AAABBCDEF")]


def _answer(label: str, said: list[str], past: tuple[str, ...] = ()) -> Answer:
    texts = [render_reasoned("", name) for name in said]
    beams = tuple(AnswerBeam(text, -float(place), -float(place)) for place, text in enumerate(texts))
    return Answer(name_row(f"v{label}{past}", label, past), texts[0], True, beams if len(said) > 1 else ())


def test_model_and_baselines_worked_out_by_hand() -> None:
    answers = [
        _answer("A", ["A", "B", "C", "D", "E", "F"]),  # first
        _answer("F", ["A", "F", "C", "D", "E", "B"], past=("F",)),  # second
        _answer("F", ["A", "B", "C", "D", "E", "F"], past=("Z",)),  # sixth
        _answer("Z", ["A", "B", "C", "D", "E", "F"], past=("Q", "Z")),  # not valid, so never
    ]
    scores = ranking_scores(answers, TRAINING, names_trained_on(TRAINING))
    model, popular, recent = (scores["methods"][name] for name in ("model", "popular", "recent, then popular"))
    assert [model[f"recall@{k}"] for k in (1, 5, 20)] == [1 / 4, 2 / 4, 3 / 4]
    assert model["ndcg@20"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(7)) / 4)
    # Popular: A B C D E F, so the truths are at 1, 6, 6, nowhere.
    assert [popular[f"recall@{k}"] for k in (1, 5, 20)] == [1 / 4, 1 / 4, 3 / 4]
    # Recent first: A; F; Z A B C D E F; Q Z ... -> 1, 1, 7, 2.
    assert [recent[f"recall@{k}"] for k in (1, 5, 20)] == [2 / 4, 3 / 4, 1.0]
    assert recent["ndcg@20"] == pytest.approx((1 + 1 + 1 / math.log2(8) + 1 / math.log2(3)) / 4)
    assert (scores["valid_names"], scores["truth_is_valid"], scores["valid_rate"]) == (6, 3 / 4, 1.0)
    low, high = model["recall@5_95"]
    assert low < 0.5 < high


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_baselines_count_spellings_together_and_do_not_depend_on_the_number_of_beams(beams: int) -> None:
    many = [name_row(f"m{number}", f"Shop {number // 2}") for number in range(40)]
    spelt = [name_row(f"n{number}", name) for number, name in enumerate(["Nike", "NIKE", "nike\u200b"])]
    answers = [_answer("Nike", [f"Shop {number}" for number in range(20 + beams)], past=("nike", "NIKE "))]
    methods = ranking_scores(answers, [*many, *spelt], names_trained_on([*many, *spelt]))["methods"]
    assert methods["popular"]["recall@1"] == methods["recent, then popular"]["recall@1"] == 1.0


def test_baselines_name_only_what_a_list_of_names_has() -> None:
    answers = [_answer("C", ["A", "B"], past=("Z", "B"))]
    names = AdvertiserNames(("b", "C"), "names.txt", given=True)
    methods = ranking_scores(answers, TRAINING, names)["methods"]  # popular: B, C; recent: B, C
    assert [methods[name]["ndcg@20"] for name in ("popular", "recent, then popular")] == [1 / math.log2(3)] * 2


def test_longer_rankings_have_hit_rates() -> None:
    names = [f"N{number}" for number in range(60)]
    training = [name_row(str(number), name) for number, name in enumerate(names)]
    answers = [_answer("N0", names), _answer("N49", names), _answer("N50", names), _answer("N3", names)]
    methods = ranking_scores(answers, training, names_trained_on(training))["methods"]
    assert methods["model"]["hr@50"] == 3 / 4
    assert "hr@100" not in methods["model"]  # sixty were asked for
    # All are equally popular, so they stand by name, N10 before N2: N49 is the 45th, N50 the 47th.
    assert methods["popular"]["hr@50"] == 1.0
    shorter = ranking_scores([_answer("N0", names[:20])], training, names_trained_on(training))["methods"]
    assert not any(name.startswith("hr@") for method in shorter.values() for name in method)


def test_one_answer_is_no_ranking_of_five() -> None:
    answers = [_answer("A", ["A"]), _answer("B", ["Nobody"])]
    scores = ranking_scores(answers, TRAINING, names_trained_on(TRAINING))
    assert set(scores["methods"]["model"]) == {"recall@1", "recall@1_95"}
    assert "recall@20" in scores["methods"]["popular"]
    assert scores["valid_rate"] == 0.5


def test_fewer_names_than_twenty_are_a_whole_ranking() -> None:
    answers = [_answer("B", ["A", "B", "C"])]
    scores = ranking_scores(answers, TRAINING, AdvertiserNames(("A", "B", "C"), "here"))
    assert scores["methods"]["model"]["recall@20"] == 1.0
    of_six = ranking_scores(answers, TRAINING, names_trained_on(TRAINING))
    assert "recall@5" not in of_six["methods"]["model"]


def test_a_beam_that_cannot_be_read_keeps_its_place() -> None:
    beams = [AnswerBeam(text, -1.0, -1.0) for text in ("two\nlines", "<think></think>A")]
    answer = Answer(name_row("1", "A"), beams[0].text, True, tuple(beams))
    assert advertiser_rankings([answer]) == [["two\nlines", "A"]]


def test_a_ranking_in_xml_is_read_whole() -> None:
    request = next_advertiser.AdvertiserRequest(buyer("u", ["C"]))
    row = next_advertiser.ranking_row("1", request, ["A", "B"], [], label="B")
    text = next_advertiser.ranking_row("2", request, ["C", "B"], ["toys"], label="B").target
    said = Answer(row, text, ended=True)
    unread = Answer(row, "A, B", ended=True)
    assert advertiser_rankings([said, unread]) == [["C", "B"], []]
    names = AdvertiserNames(("A", "B", "C"), "here")
    assert ranking_scores([said, unread], [row], names)["methods"]["model"]["recall@5"] == 0.5


def test_free_text_is_grounded_in_the_nearest_valid_names() -> None:
    names = AdvertiserNames(("Acme Tools", "Bolt Works", "Cord"), "here")
    training = [name_row("1", "Cord")]
    answers = [_answer("Acme Tools", ["acme tool"]), _answer("Cord", ["Bolt"]), _answer("Bolt Works", ["xyz"])]
    methods = ranking_scores(answers, training, names, ground=True)["methods"]
    assert methods["model"]["recall@1"] == 0.0
    # Right; Bolt Works, then Cord or Acme Tools; nothing in common with any name.
    grounded = methods["model, nearest names"]
    assert [grounded["recall@1"], grounded["recall@5"]] == [1 / 3, 2 / 3]


def test_the_best_ranking_is_judged_where_every_row_has_one() -> None:
    plain = [_answer("A", ["B"]), _answer("B", ["B"])]
    known = [
        replace(answer, row=replace(answer.row, facts={**answer.row.facts, Fact.best_answers: ["A", "B"]}))
        for answer in plain
    ]
    names = names_trained_on(TRAINING)
    reachable = ranking_scores(known, TRAINING, names)["methods"]["best reachable"]
    assert [reachable["recall@1"], reachable["recall@5"]] == [0.5, 1.0]
    assert "best reachable" not in ranking_scores([plain[0], known[1]], TRAINING, names)["methods"]
