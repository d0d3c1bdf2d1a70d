import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from megatron_ads.evaluation.answer_records import Answer, AnswerBeam
from megatron_ads.evaluation.page import NOT_READ, confusion, evaluation_page, judge, samples
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.tasks import relevance
from megatron_ads.tasks.answer_format import render_reasoned
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label
from tests.evaluation.advertiser_rows import name_row


def _judged(label: Label, said: Label | None, query: str) -> Answer:
    row = relevance.chat_row(f"{query}-{label}", query, Ad(title="<b>bold</b> ad"), label, "because")
    text = relevance.chat_row("x", query, Ad(title="a"), said, "because").target if said else "<think>cut"
    return Answer(row, text, ended=said is not None)


JUDGED = [
    _judged(Label.bad, Label.bad, "q1"),
    _judged(Label.bad, Label.good, "q2"),
    _judged(Label.good, Label.good, "q3"),
    _judged(Label.fair, None, "q4"),
    _judged(Label.good, None, "q5"),
]


def _named(label: str, probabilities: list[tuple[str, float]]) -> Answer:
    beams = tuple(
        AnswerBeam(render_reasoned("", name), math.log(share), math.log(share)) for name, share in probabilities
    )
    return Answer(name_row(f"n{label}{probabilities[0]}", label), beams[0].text, True, beams)


NAMED = [
    _named("A", [("A", 0.3), ("B", 0.1)]),
    _named("A", [("B", 0.12), ("A", 0.04)]),
    _named("B", [("B", 0.9), ("A", 0.1)]),
]


def test_every_pair_of_labels_is_counted_and_what_was_not_read_too() -> None:
    truths, given, pairs = confusion(judge(JUDGED))
    assert truths == ["Bad", "Fair", "Good"]
    assert given == [*truths, NOT_READ]
    assert pairs == {
        ("Bad", "Bad"): 1, ("Bad", "Good"): 1, ("Good", "Good"): 1, ("Fair", NOT_READ): 1, ("Good", NOT_READ): 1,
    }  # fmt: skip


def test_a_name_in_other_letters_is_the_same_label() -> None:
    answers = [_named("Acme", [("ACME\u200b", 0.3)]), _named("acme", [("Bolt", 0.3)])]
    truths, given, pairs = confusion(judge(answers))
    assert (truths, given, pairs) == (["Acme"], ["Acme", "Bolt"], {("Acme", "Acme"): 1, ("Acme", "Bolt"): 1})


def test_answers_are_sampled_by_kind_and_the_right_ones_come_last() -> None:
    found = samples(judge(JUDGED), most=1)
    assert [(kind, count, len(chosen)) for kind, count, chosen in found] == [
        ("not read: unclosed_reasoning", 2, 1),
        ("read, and wrong", 1, 1),
        ("right", 2, 1),
    ]
    assert found[0][2][0].answer is JUDGED[3]


def test_the_probability_of_an_answer_is_its_share_among_the_beams() -> None:
    outcomes = judge(NAMED)
    assert [one.probability for one in outcomes] == pytest.approx([0.75, 0.75, 0.9])
    assert [one.right for one in outcomes] == [True, False, True]
    assert judge(JUDGED)[0].probability is None


class _Tables(HTMLParser):
    """The cells of every table, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data


def _page() -> str:
    answers = [*JUDGED, *NAMED]
    tasks = task_scores(answers, [answer.row for answer in answers])
    general = {"gsm8k": {"rows": 3, "perplexity": 7.5}}
    scores = {"rows": len(answers), "seconds": 1.0, "reasoning": True, "tasks": tasks, "general": general}
    return evaluation_page(scores, answers, title="Evaluation of <m>", about="5 rows & 3.")


def test_the_page_has_each_tasks_tables() -> None:
    parser = _Tables()
    parser.feed(_page())
    assert [
        ["true", "Bad", "Fair", "Good", NOT_READ],
        ["Bad", "1", "0", "1", "0"],
        ["Fair", "0", "0", "0", "1"],
        ["Good", "0", "0", "1", "1"],
    ] in parser.tables
    assert [["true", "A", "B"], ["A", "1", "1"], ["B", "0", "1"]] in parser.tables
    heads = {table[0][0]: table for table in parser.tables}
    bad, _ = (table for table in parser.tables if "Model DR" in table[0])
    # Two of five are bad; one was found, and of the three others one was read, rightly.
    assert bad[1][:4] == ["model", "20.00", shown_mean(1 / 2, 1 / 3), "40.00"]
    assert [row[0] for row in heads["method"][1:]] == ["model", "popular", "recent, then popular"]
    assert heads["method"][1][1].startswith("0.667")


def shown_mean(first: float, second: float) -> str:
    return f"{50 * (first + second):.2f}"


def test_the_page_says_how_sure_answers_were_right() -> None:
    page = _page()
    # Of the answers with 0.75 one of two is right, that with 0.9 is: 2/3 * 0.25 + 1/3 * 0.1 = 0.2.
    assert "3 answers; expected calibration error 0.200." in page
    assert page.count("<svg") == 1


def test_the_page_needs_nothing_else_and_shows_text_as_text() -> None:
    page = _page()
    assert "&lt;b&gt;bold&lt;/b&gt; ad" in page
    assert "<b>" not in page
    assert "Evaluation of &lt;m&gt;" in page
    assert not re.search(r"""src\s*=|href\s*="[^#]|<script|@import|url\(""", page)


def test_answers_names_and_paths_cannot_become_markup() -> None:
    script = "<script>x</script>"
    named = _named(script, [(f"{script}\n{script}", 0.3), (script, 0.1)])
    pair = replace(_judged(Label.bad, None, script), text=f"{script}</td>")
    answers = [named, pair]
    scores = {
        "rows": 2, "tasks": task_scores(answers, [one.row for one in answers]),
        "general": {script: {"rows": 1, "perplexity": 2.0}},
    }  # fmt: skip
    page = evaluation_page(scores, answers, title=f"Evaluation of runs/{script}", about=f"data.path={script}.")
    assert "<script" not in page
    for shown in ("Evaluation of runs/", "data.path=", '<td data-name="answer">', '<div class="name">'):
        assert f"{shown}&lt;script&gt;" in page
    assert page.count("</td>") == page.count("<td")


def test_the_contents_lead_to_every_part_and_beams_are_there_on_request() -> None:
    page = _page()
    places = re.findall(r'href="#([^"]+)"', page)
    assert places[0] == "t1"
    assert len(places) == len(set(places)) == 7  # two tasks; confusion and answers of both, calibration of one
    for place in places:
        assert page.count(f'id="{place}"') == 1
    assert page.count("<details>") == 3
    assert "<li>&lt;think&gt;&lt;/think&gt;B <small>log-probability -2.30, score -2.30</small></li>" in page  # log 0.1


def test_a_cell_of_the_confusion_is_as_dark_as_its_share_of_the_row() -> None:
    page = _page()
    # Of two bad ads one was called bad, rightly, and one good.
    assert '<td class="number right" style="--share: 0.500">1</td>' in page
    assert '<td class="number" style="--share: 0.500">1</td>' in page


def test_a_phone_shows_it_at_its_own_width_and_scrolls_tables_alone() -> None:
    page = _page()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table") == page.count('<div class="scroll"><table')
    assert not re.search(r"^td [^}]*overflow-wrap: anywhere", page, re.MULTILINE)  # it would part names in the middle
