"""The papers' tables: their columns, and numbers worked out by hand."""

from dataclasses import replace

from megatron_ads.evaluation.answer_records import Answer
from megatron_ads.evaluation.dataset_tables import text_tables
from megatron_ads.evaluation.paper_tables import paper_tables
from megatron_ads.evaluation.table_form import ScoreTable
from megatron_ads.evaluation.task_scores import task_scores
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.tasks import ad_user_relevance, model_comparison, next_advertiser, relevance
from megatron_ads.tasks.model_comparison import Assessment, Risk, SharedRequest, Verdict
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Flag, Label
from megatron_ads.tasks.user_history import UserHistory

NO_REASONING = "<think></think>"


def _tables(answers: list[Answer], training: list[ChatRow]) -> list[ScoreTable]:
    (scores,) = task_scores(answers, training).values()
    return paper_tables(scores)


def _three(row_id: str, location: Flag, said: Flag) -> Answer:
    row = relevance.chat_row(row_id, row_id, Ad("a"), Label.good, "r", location=location, quality=Flag.good)
    text = relevance.chat_row("x", "q", Ad("a"), Label.good, "r", location=said, quality=Flag.good).target
    return Answer(row, text, ended=True)


def test_relevance_has_tables_1_to_4_of_adnanny() -> None:
    answers = [_three("1", Flag.good, Flag.good), _three("2", Flag.good, Flag.bad), _three("3", Flag.bad, Flag.bad)]
    answers += [replace(answers[0], row=replace(answers[0].row, id="4", group="4"))]
    tables = _tables(answers, [answer.row for answer in answers])
    assert [table.title.split(":")[0] for table in tables] == [f"AdNanny, table {number}" for number in (1, 2, 3, 4)]
    assert tables[0].head == [
        "", "Model DR", "BACC", "Acc", "PosAcc", "PosPrec", "NegAcc", "NegPrec", "PosF1", "NegF1",
    ]  # fmt: skip
    location = tables[2]
    assert location.title.endswith("(DR 25.00 of 4 rows)")
    # Two called bad, one of them rightly; two called good, both rightly; three are good.
    assert location.rows[0] == [
        "model",
        "50.00",
        "83.33",
        "75.00",
        "66.67",
        "100.00",
        "100.00",
        "50.00",
        "80.00",
        "66.67",
    ]
    assert location.rows[1][:3] == ["most frequent label", "0.00", "50.00"]


def test_rows_of_one_label_have_no_tables_of_place_and_quality() -> None:
    row = relevance.chat_row("1", "q", Ad("a"), Label.good, "r")
    assert len(_tables([Answer(row, row.target, ended=True)], [row])) == 2


def test_ad_user_relevance_has_table_5() -> None:
    user = UserHistory(user_id="u")
    answers = []
    for number, (true, said) in enumerate([(0, 0), (0, 1), (2, 3), (3, 0)]):
        row = ad_user_relevance.chat_row(str(number), replace(user, user_id=str(number)), Ad("a"), true, "r")
        text = ad_user_relevance.chat_row("x", user, Ad("a"), said, "r").target
        answers.append(Answer(row, text, ended=True))
    (table,) = _tables(answers, [answer.row for answer in answers])
    assert table.head == ["", "Model RR", "BACC", "Acc", "PosAcc", "NegAcc", "AUC"]
    # Scores of matches 3 and 0, of bad ads 0 and 1: of four pairs 2 are in order, and one is level.
    assert table.rows[0] == ["model", "50.00", "50.00", "50.00", "50.00", "50.00", "62.50"]


def test_comparisons_are_added_up_beside_the_true_ones() -> None:
    answers = []
    for number in range(30):
        assessment = Assessment(strengths=("price",), risk=Risk.none, verdict=Verdict.better, reasoning="r")
        row = model_comparison.chat_row(str(number), SharedRequest(f"q{number}", "old", "new"), assessment)
        said = replace(assessment, verdict=Verdict.same, strengths=())
        text = model_comparison.chat_row("x", SharedRequest("q", "old", "new"), said).target
        answers.append(Answer(row, text if number else "", ended=True))
    (table,) = _tables(answers, [])
    found = {name: (model, truth) for name, model, truth in table.rows}
    assert found["advice"] == ("undecided", "test online")
    assert found["not read"] == ("empty 1", "none")
    assert found["verdicts"] == ("Worse 0, Same 29, Better 0", "Worse 0, Same 0, Better 30")
    assert found["net share of better"] == ("+0.00 (+0.00 to +0.00)", "+100.00 (+100.00 to +100.00)")
    assert found["strengths"] == ("none", "price 30")


def test_answers_without_reasoning_count_where_the_model_was_taught_so() -> None:
    row = relevance.chat_row("1", "q", Ad("a"), Label.good, "r")
    bad = relevance.chat_row("2", "q2", Ad("a"), Label.bad, "r")
    answers = [Answer(one, one.target.replace("<think>r</think>", NO_REASONING), ended=True) for one in (row, bad)]
    silent = [replace(one, messages=(*one.prompt, Message(Role.assistant, answers[0].text))) for one in (row, bad)]
    answers += [replace(answer, row=one) for answer, one in zip(answers, silent, strict=True)]
    for said, expected in ((answers[:2], "0.00"), (answers[2:], "100.00")):
        table = _tables(said, [row, bad])[0]
        assert table.rows[0][2] == expected
        assert table.note == "Too few groups, or one class alone: no interval of the BACC."
        text = text_tables({"rows": 2, "seconds": 1.0, "tasks": task_scores(said, [row]), "general": {}})
        assert ("Not read: no_reasoning 2." in text) is (expected == "0.00")


def test_answers_that_would_be_right_if_case_did_not_count_are_counted() -> None:
    row = relevance.chat_row("1", "q", Ad("a"), Label.good, "r")
    user = ad_user_relevance.chat_row("1", UserHistory(user_id="u"), Ad("a"), 2, "r")
    said = [
        *(Answer(row, row.target.replace(*change), ended=True) for change in (("Good", "good"), ("Good", "bad"))),
        *(
            Answer(user, user.target.replace(*change), ended=True)
            for change in (("Score", "SCORE"), ("Score", "Points"))
        ),
    ]
    tasks = task_scores(said, [row, user])
    assert [scores["right_but_for_case"] for scores in tasks.values()] == [1, 1]
    text = text_tables({"rows": 4, "seconds": 1.0, "tasks": tasks, "general": {}})
    assert "Not read: unknown_label 2. 1 more would be right if case did not count." in text


def test_text_for_the_terminal_has_the_tables_in_columns() -> None:
    row = relevance.chat_row("1", "q", Ad("a"), Label.good, "r")
    tasks = task_scores([Answer(row, row.target, ended=True)], [row])
    lines = text_tables({"rows": 1, "seconds": 1.0, "tasks": tasks, "general": {}}).splitlines()
    head = next(line for line in lines if "Model DR" in line)
    model = lines[lines.index(head) + 1]
    assert model.index("100.00", head.index("Acc")) == head.index("Acc", head.index("BACC") + 4)


def test_a_task_without_a_table_in_the_papers_has_none() -> None:
    assert paper_tables({"task": next_advertiser.TASK, "metrics": {}}) == []
