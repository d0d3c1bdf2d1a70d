"""Rewards of one's own: how they are called, and that nothing they do harms a job."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.data.verl_rows import verl_rows
from megatron_ads.errors import ConfigError
from megatron_ads.rewards.own_function import load
from megatron_ads.rewards.registry import Rewards
from megatron_ads.rewards.scores import Scores
from megatron_ads.rollouts import Rollout
from tests.rewards.rollouts import answers, chat_row, failures, rewards

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
import math, os, re, subprocess, sys, time

def lengths(prompts, completions, scale, **columns):
    print("for whoever debugs it")
    keys = sorted(columns)
    assert keys == ["completion_ids", "group", "id", "label", "price", "task"], keys
    assert columns["price"] == [3, 3, None] and columns["group"] == [0, 0, 1], columns
    assert prompts[0] == [{"role": "user", "content": "Question a?"}], prompts
    texts = [message["content"] for [message] in completions]
    return [None if label == "skip" else scale * len(text) for text, label in zip(texts, columns["label"])]

def best_of_group(prompt, completions, price):
    assert isinstance(price, int) and prompt[0]["content"].startswith("Question"), (prompt, price)
    texts = [completion[0]["content"] for completion in completions]
    return [price * (len(text) == max(map(len, texts))) for text in texts] + [0] * ("x" in texts)

def act(completion):
    [message] = completion
    assert message["role"] == "assistant", message
    completion = message["content"]
    if completion == "raise":
        raise ValueError("no good")
    if completion == "loop":
        while True:
            pass
    if completion == "sleep":
        time.sleep(1000)
    if completion == "exit":
        sys.exit("bye")
    if completion == "die":
        os._exit(3)
    return {"nan": math.nan, "inf": math.inf, "text": "7", "none": None, "list": [1, 2]}.get(completion, 1)

def shorter(completions):
    return [1.0] * (len(completions) - 1)

def hang(completions):
    time.sleep(1000)

def hang_with_child(completions, pids):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=False)
    with open(pids, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(1000)

def of_arrays(completions):
    import numpy
    return numpy.array([len(completion[0]["content"]) for completion in completions], dtype=numpy.float32)

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    if data_source == "dict":
        return {"score": 0.5, "acc": True}
    if data_source == "list":
        return [0.25, "why"]
    assert extra_info == {"price": 3, "id": "b", "label": "yes"}, extra_info
    return float(solution_str == ground_truth) + bonus

def verl_unchanged(data_source, solution_str, ground_truth, extra_info, expected):
    return float([data_source, ground_truth, extra_info] == expected[solution_str])

def format_reward(completions, **kwargs):  # as those of TRL
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match("<think>.*</think>", content) else 0.0 for content in contents]

def nothing(text):
    return 1.0

def dear(completions, price, colour, limit=3):
    return [1.0] * len(completions)
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Rewards]]:
    file, opened = tmp_path / "own.py", list[Rewards]()
    file.write_text(FUNCTIONS)

    def make(name: str, settings: Mapping[str, Any] | None = None, *, timeout_seconds: float = 60.0) -> Rewards:
        opened.append(rewards(name if ":" in name else f"{file}:{name}", settings, timeout_seconds=timeout_seconds))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def column(scores: Scores) -> list[float]:
    (values,) = scores.values.values()
    return list(values)


def faults(scores: Scores) -> dict[str, int]:
    return {name.rpartition("/")[2]: count for name, count in scores.faults.items()}


def acting(*texts: str) -> list[Rollout]:
    return answers(chat_row(), texts)


def test_a_function_over_all_answers_is_given_columns(
    own: Callable[..., Rewards], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = chat_row("a", facts={"price": 3}), chat_row("b", label="skip")
    rollouts = [*answers(first, ["1", "123"]), *answers(second, ["12"], group=1)]
    scores = own("lengths", {"scale": 0.5}).score(rollouts)
    assert column(scores)[:2] == [0.5, 1.5] and math.isnan(column(scores)[2])
    assert scores.faults == {}, "None is no fault"
    printed = capfd.readouterr()
    assert (printed.out, "for whoever debugs it" in printed.err) == ("", True), "what it prints is no result"


def test_a_function_that_needs_a_column_that_is_not_there_is_told_of_the_others(own: Callable[..., Rewards]) -> None:
    rollouts = answers(chat_row("a", facts={"price": 3}), ["1", "2"])
    there = "completion_ids, completions, group, id, label, price, prompts, task"
    said = f"raised: LookupError: it needs colour, and the rows have {there}"
    assert failures(own("dear").score(rollouts)) == [said] * 2
    assert column(own("dear", {"colour": "red"}).score(rollouts)) == [1.0, 1.0]


def test_a_function_over_groups_loses_one_group_when_it_fails(own: Callable[..., Rewards]) -> None:
    row = chat_row(facts={"price": 3})
    reward = own("best_of_group")
    scores = reward.score(
        answers(row, ["1", "123"]) + answers(row, ["x", "y"], group=1) + answers(row, ["12"], group=2)
    )
    assert [column(scores)[place] for place in (0, 1, 4)] == [0.0, 3.0, 3.0]
    assert faults(scores) == {"wrong_length": 2}


def test_functions_of_trl_for_conversations_work_unchanged(own: Callable[..., Rewards]) -> None:
    assert column(own("format_reward").score(acting("<think>So.</think>yes", "yes"))) == [1.0, 0.0]


def test_a_function_in_the_form_of_verl(own: Callable[..., Rewards]) -> None:
    known = chat_row("b", "mine", facts={"price": 3, "ground_truth": "no"}, label="yes")
    labelled = chat_row("b", "mine", facts={"price": 3}, label="yes")
    rollouts = answers(known, ["yes", "no"]) + answers(labelled, ["yes"], group=1)
    rollouts += [each for name in ("dict", "list") for each in answers(chat_row(task=name), ["x"], group=2)]
    assert column(own("compute_score", {"bonus": 0.125}).score(rollouts)) == [0.125, 1.125, 1.125, 0.5, 0.25]


def test_rows_of_verl_reach_it_unchanged(own: Callable[..., Rewards], tmp_path: Path) -> None:
    extras = [{"index": 0, "answer": "why 7", "id": "a", "label": None, "deep": {"x": [1, None]}}, {}]
    truths: list[Any] = ["7", {"accepts": ["a", "b"]}]
    records = [
        {"data_source": f"mine/{extra.get('index')}", "prompt": [{"role": "user", "content": "Q?"}], "ability": "math",
         "reward_model": {"style": "rule", "ground_truth": truth}, "extra_info": extra}
        for extra, truth in zip(extras, truths, strict=True)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = verl_rows(tmp_path / "rows.jsonl")
    expected = {
        str(place): [record["data_source"], truths[place], record["extra_info"]] for place, record in enumerate(records)
    }
    rollouts = [each for place, row in enumerate(rows) for each in answers(row, [str(place)], group=place)]
    assert column(own("verl_unchanged", {"expected": expected}).score(rollouts)) == [1.0, 1.0]


def test_what_fails_is_named_counted_and_alone(own: Callable[..., Rewards]) -> None:
    reward = own("act", timeout_seconds=4.0)
    bad = ["raise", "nan", "inf", "loop", "text", "sleep", "exit", "die", "list", "none"]
    began = time.monotonic()
    scores = reward.score(acting("fine", *bad, "fine"))
    assert time.monotonic() - began < 30
    assert [column(scores)[place] for place in (0, -1)] == [1.0, 1.0]
    assert all(map(math.isnan, column(scores)[1:-1]))
    counts = {"raised": 2, "not_finite": 2, "timed_out": 2, "wrong_type": 2, "died": 1}
    assert faults(scores) == counts
    assert failures(scores)[0] == "raised: ValueError: no good"
    assert column(reward.score(acting("fine"))) == [1.0], "the next step finds a process again"
    assert all(map(math.isnan, column(reward.score(acting("none", "none"))))), "to decline is not to fail"


def test_what_fails_for_all_has_no_values(own: Callable[..., Rewards]) -> None:
    assert failures(own("shorter").score(acting("a", "b"))) == ["wrong_length: 1 values for 2 rollouts"] * 2


def test_a_process_that_dies_again_and_again_is_given_up_for_the_step(
    own: Callable[..., Rewards], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ads.rewards.registry.MAX_KILLS", 2)
    scores = own("act").score(acting("fine", "die", "die", "fine", "fine"))
    assert column(scores)[0] == 1.0 and faults(scores) == {"died": 4}


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def test_a_process_that_hangs_goes_with_its_children(own: Callable[..., Rewards], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    scores = own("hang_with_child", {"pids": str(pids)}, timeout_seconds=3.0).score(acting("a"))
    assert failures(scores) == ["timed_out: took longer than 3 s"]
    assert wait_until(lambda: not any(map(is_alive, map(int, pids.read_text().split()))))


def test_a_process_does_not_outlive_a_killed_trainer(own: Callable[..., Rewards], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    own("hang_with_child", {"pids": str(pids)})  # writes own.py
    script = (
        "from tests.rewards.rollouts import *\n"
        f"rewards({str(tmp_path / 'own.py')!r} + ':hang_with_child', {{'pids': {str(pids)!r}}}).score("
        "answers(chat_row(), ['a']))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert wait_until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert wait_until(lambda: not any(map(is_alive, map(int, pids.read_text().split()))))


def test_a_slow_import_takes_no_time_from_the_step(own: Callable[..., Rewards], tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(1.2)\ndef one(completion):\n    return 1\n")
    assert column(own(f"{slow}:one", timeout_seconds=1.0).score(acting("a", "b"))) == [1.0, 1.0]


def test_a_function_of_a_module_may_return_an_array(
    own: Callable[..., Rewards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "team_rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "lengths.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    assert column(own("team_rewards.lengths:of_arrays").score(acting("a", "bcd"))) == [1.0, 3.0]


def test_without_rollouts_there_is_nothing_to_ask(own: Callable[..., Rewards]) -> None:
    assert column(own("hang").score([])) == []


def test_the_function_of_the_readme_works(tmp_path: Path) -> None:
    (block,) = re.findall(r"```\n(def brief.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(block)
    function = load(f"{tmp_path / 'my_rewards.py'}:brief", {"longest": 4})
    rollouts = answers(chat_row(task="query_generation"), ["eight123", "four"]) + answers(chat_row(), ["x"], group=1)
    assert function.outcomes(rollouts) == [-1.0, 0.0, None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:f", r"use\[0\].name is 'nowhere.py:f', and there is no such file or module"),
        ("no_such_module.at_all:f", "and there is no such file or module"),
        ("json:not a name", "and there is no such file or module"),
    ],
)
def test_a_function_that_is_nowhere_is_refused_at_once(own: Callable[..., Rewards], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("missing", {}, r"cannot be imported \(AttributeError: module 'own' has no attribute 'missing'\)"),
        ("nothing", {}, r"takes \(text\). It must take completions, completion or solution_str"),
        ("act", {"scale": 1}, "has no parameter 'scale', which its settings name"),
    ],
)
def test_a_function_that_cannot_be_called_is_named(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    with pytest.raises(ConfigError, match=message):
        load(f"{tmp_path / 'own.py'}:{name}", settings)


def test_what_is_wrong_with_an_import_reaches_the_trainer(own: Callable[..., Rewards], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import sys\nsys.exit('no licence')\n")
    with pytest.raises(ConfigError, match=r"broken.py:f cannot be imported \(SystemExit: no licence\)"):
        own(f"{tmp_path / 'broken.py'}:f").score(acting("a"))
