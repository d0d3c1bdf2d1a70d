"""A second model judges each piece of reasoning: does it fit the input, does it support the answer, is it sound?

Source: AdNanny, section 3.4 (textual alignment with the input, logical soundness, faithfulness); the words are ours.
"""

from collections.abc import Sequence

from megatron_ads.cooking.answering import Answer, Desk, Finish
from megatron_ads.cooking.candidates import Candidate, Removed, passing
from megatron_ads.cooking.config import AnsweringConfig
from megatron_ads.cooking.prompts import answer_of, question_of
from megatron_ads.cooking.requests import chat_request
from megatron_ads.data.rows import Role
from megatron_ads.tasks.answer_format import CLOSE, ReadFailure, read_parts

ASPECTS = ("Aligned", "Sound", "Faithful")
_YES, _NO = "yes", "no"
_TEXT = (
    "Judge the reasoning. Aligned: everything it says about the case stands in the question. Sound: its steps follow "
    "from one another. Faithful: it supports the answer and does not contradict it. Answer with "
    "<Aligned>yes or no</Aligned><Sound>yes or no</Sound><Faithful>yes or no</Faithful> and nothing else."
)


def remove_rejected(candidates: Sequence[Candidate], desk: Desk, config: AnsweringConfig, *, seed: int) -> None:
    """Ask about every candidate that is left, and remove those that fail in any aspect.

    Raises:
        DataError: If the verifier stopped answering.
    """
    left = passing(candidates)
    requests = (chat_request(verifier_messages(candidate), config, seed=seed) for candidate in left)
    answers = desk.ask(requests, total=len(left), description="verifying")
    for candidate, answer in zip(left, answers, strict=True):
        _judge(candidate, answer)


def verifier_messages(candidate: Candidate) -> list[dict[str, str]]:
    """Return the conversation that asks for a verdict on one piece of reasoning."""
    content = (
        f"A question:\n\n{question_of(candidate.row)}\n\nReasoning:\n\n{candidate.reasoning}\n\nIts answer:\n\n"
        f"{answer_of(candidate.row)}\n\n{_TEXT}"
    )
    return [{"role": str(Role.user), "content": content}]


def _judge(candidate: Candidate, answer: Answer | None) -> None:
    if answer is None or answer.finish is not Finish.ended:
        candidate.remove(Removed.verifier_unreadable, "no answer" if answer is None else str(answer.finish))
        return
    verdicts = read_parts(answer.text.rpartition(CLOSE)[2].strip(), ASPECTS)  # without thoughts of its own
    if isinstance(verdicts, ReadFailure):
        candidate.remove(Removed.verifier_unreadable, str(verdicts))
        return
    said = {aspect: verdict.lower() for aspect, verdict in verdicts.items()}
    if not set(said.values()) <= {_YES, _NO}:
        candidate.remove(Removed.verifier_unreadable, "neither yes nor no")
    elif failed := [aspect for aspect, verdict in said.items() if verdict == _NO]:
        candidate.remove(Removed.verifier_rejects, f"not {', not '.join(failed).lower()}")
