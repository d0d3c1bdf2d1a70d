"""Journals that were written before stay valid: keys and digests as they were recorded then.

They were made by the code of commit 9784edb, from the same requests and settings.
"""

import os
from pathlib import Path

import pytest

from megatron_ads.config.generation import AnsweringConfig, GenerationConfig, LengthRule, Method
from megatron_ads.config.synthesis import Style
from megatron_ads.evaluation.answer_records import fingerprint
from megatron_ads.evaluation.generate import Asking
from megatron_ads.inference.client import Client
from megatron_ads.inference.engine import Completion, Failure, Finish
from megatron_ads.inference.name_answers import AdvertiserNames
from megatron_ads.journal import digest_of
from megatron_ads.rows import ChatRow, Message, Role
from megatron_ads.synthesis.candidates import Candidate
from megatron_ads.synthesis.filters import verifier_messages
from megatron_ads.synthesis.prompts import chat_request, teacher_messages, templates_of

ROW = ChatRow(
    "r0",
    "query_ad_relevance",
    (
        Message(Role.user, "Query: crimson kettle\nAd: sturdy kettle"),
        Message(Role.assistant, "<think></think><Label>Good</Label>"),
    ),
    label="Good",
    group="q0",
)
WHY = [{"role": "user", "content": "Why?"}]


class Stateful:
    """An answerer of which only the state is asked for."""

    def __init__(self, state: str) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("config", "seed", "candidate", "state", "key"),
    [
        (AnsweringConfig(model="m"), 7, 2, "", "db94e906b27746088435beb2ca55b32067b74f547e68e8dad953ba16842658a7"),
        (
            AnsweringConfig(
                model="m", token_limit_field="max_completion_tokens", max_tokens=9, temperature=0.0, top_p=1.0
            ),
            0,
            0,
            "state of a folder",
            "15182ab3ed8030becb89dbbaa25d8a524917769da314321cb9cce0d3c68c4010",
        ),
    ],
    ids=["sampled", "greedy"],
)
def test_the_key_of_a_request(config: AnsweringConfig, seed: int, candidate: int, state: str, key: str) -> None:
    client = Client("teacher", config, Stateful(state), None)  # type: ignore[arg-type]
    assert client._key(chat_request(WHY, config, seed=seed, candidate=candidate)) == key


@pytest.mark.parametrize(
    ("style", "digest"),
    [
        (Style.label_given, "2550e61540718f54c2ac3f12187e3605f41570a53a73537b6e1312c59b813ee5"),
        (Style.reverse_engineered, "71f2137e5265672b2bcf2c0b001caba6d6413b089ee57964749e25182b9f2343"),
    ],
)
def test_what_a_teacher_is_asked(style: Style, digest: str) -> None:
    (template,) = templates_of(ROW.task, style)
    assert digest_of([teacher_messages(ROW, template, number) for number in range(len(template.wordings))]) == digest


def test_what_a_verifier_is_asked() -> None:
    asked = verifier_messages(Candidate(row=ROW, number=0, text="", reasoning="It fits."))
    assert digest_of(asked) == "6d5aa94d1a0d781b0988dce1379b80527c559fd0abc6f59e916b842e40cd4024"


def test_the_record_of_an_answer_reads_back_and_is_written_as_before() -> None:
    record = {
        "text": "said", "finish": "cut_off", "prompt_tokens": 3, "answer_tokens": 2, "seconds": 0.5,
        "failures": ["rate_limited"],
    }  # fmt: skip
    answer = Completion(
        text="said",
        finish=Finish.cut_off,
        prompt_tokens=3,
        answer_tokens=2,
        seconds=0.5,
        failures=(Failure.rate_limited,),
    )
    assert Completion.from_record(record) == answer
    assert {**answer.as_record(), "failures": list(answer.failures)} == record
    more = Completion(text="x", token_ids=(1, 2), log_probabilities=(-0.5, -1.0))
    assert Completion.from_record(more.as_record()) == more


@pytest.mark.parametrize(
    ("asking", "digest"),
    [
        (
            Asking(max_new_tokens={"b": 3, "a": 64}, batch_size=8),
            "349232e27fced276b33b9b809595d60b7a24d5caeb683ae9f16ed322105052e1",
        ),
        (
            Asking(
                how=GenerationConfig(method=Method.sampled, temperature=0.7, top_p=0.9, seed=3),
                max_new_tokens={"a": 64},
                batch_size=2,
            ),
            "45cb014bbae0a6892594a356173e2b78a21d7be3977b3595d58c85cfc7ff23d8",
        ),
        (
            Asking(
                how=GenerationConfig(method=Method.beam, beams=4, length=LengthRule.mean),
                max_new_tokens={"a": 64},
                batch_size=2,
            ),
            "b78f9fe0c2f24a839c5875ff835b4c8650fba426f3a0e38f2505d54541341ea9",
        ),
        (
            Asking(
                how=GenerationConfig(method=Method.constrained_beam, collaborative=0.5),
                max_new_tokens={"a": 64},
                batch_size=2,
                advertisers=AdvertiserNames(("Acme", "Bolt"), "here"),
                training=[ROW],
            ),
            "6690ec31f82953930e0a12c6563e776d3f8c2e24e5790806c194ada38cf3e7ba",
        ),
    ],
    ids=["greedy", "sampled", "beam", "constrained_beam"],
)
def test_the_digest_of_an_evaluations_settings(asking: Asking, digest: str) -> None:
    assert digest_of(asking.settings()) == digest


def test_the_fingerprint_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.utime(tmp_path / "config.json", ns=(5, 5))
    found = fingerprint(tmp_path, [ROW], {"x": 1})
    assert found["the held-out rows"] == "75627c8f51fb0aa0a24db981dd22aa8333b1881e6be09a39d37bce885bc9fd38"
    assert found["the settings"] == "5041bf1f713df204784353e82f6a4a535931cb64f1f4b4a5aeaffcb720918b22"
    assert list(found) == ["the model", "the held-out rows", "the settings"]
