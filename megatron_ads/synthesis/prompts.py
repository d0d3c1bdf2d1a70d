"""What a teacher is asked: the row's question, its answer, and how to write the reasoning in between.

The teacher writes ``<Reasoning>...</Reasoning>`` and repeats the answer. The tag is not ``<think>``: a teacher that
thinks by itself opens that one for its own thoughts, in which it speaks of the answer it was given. They are dropped.

Source: AdNanny, section 3.2 (the label is given, the steps, the repetition); Taiji, section 2.1.2 (reverse
engineering). The prompts of neither are public, so the words are ours.

Every request has sampling settings and a seed of its own, so that a run can be repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_ads.config.generation import AnsweringConfig
from megatron_ads.config.synthesis import Style, TemplateConfig
from megatron_ads.inference.client import Request
from megatron_ads.inference.openai_engine import request_body
from megatron_ads.rows import ChatRow, Role
from megatron_ads.stable_random import stable_integer
from megatron_ads.tasks.answer_format import CLOSE, OPEN, Reasoned, count_of, split_reasoning

TAG = "Reasoning"
OPEN_TASKS = frozenset({"next_advertiser", "next_advertiser_ranking", "choose_one", "list_ranking"})
"""They ask what somebody will do next: no label that rules decide."""
_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningTemplate:
    """One versioned prompt in several wordings, the plain one first; a version is never edited once it was used."""

    name: str
    style: Style
    wordings: tuple[str, ...]


_FORM = (
    f"Write only the reasoning, between <{TAG}> and </{TAG}>, and directly behind it the answer, repeated exactly as "
    "it stands above, tags included. Write nothing else."
)

LABEL_GIVEN = ReasoningTemplate(
    name="label_given/1",
    style=Style.label_given,
    wordings=(
        "The answer is settled; do not decide it again. Explain why it is right: say what is wanted, what is offered, "
        "and how the two compare, naming the details of this case that matter.",
        "Take the answer as a fact. Which details of this case lead to it? Go from what is asked, over what is there, "
        "to the answer, and quote the decisive words.",
        "Reconstruct how a careful expert arrives at this answer. Name what speaks for it in this case first, then "
        "what was looked for, then the conclusion. Do not question the answer.",
    ),
)
REVERSE_ENGINEERED = ReasoningTemplate(
    name="reverse_engineered/1",
    style=Style.reverse_engineered,
    wordings=(
        "This is what happened next. Work backwards: write the reasoning that leads to it from what was known before, "
        "through interests and needs that the events show. Name the events.",
        "Knowing the outcome, find the signs of it in what came before, and write them down as thoughts of somebody "
        "who does not know it yet and ends at it. Name the events that matter.",
        "Start from the earliest sign and go on to the latest: what did each say about what was wanted? End at the "
        "outcome above, as the likeliest one. Refer to the events themselves.",
    ),
)
_SECRET = "The reasoning is read by somebody who has not seen the answer: never mention that it was given."


def templates_of(task: str, style: Style, own: Sequence[TemplateConfig] = ()) -> list[ReasoningTemplate]:
    """Return the templates that rows of a task may be asked with: the recipe's own ones, else the built-in one."""
    by_task = Style.reverse_engineered if task in OPEN_TASKS else Style.label_given
    decided = by_task if style is Style.auto else style
    chosen = [
        ReasoningTemplate(name=template.name, style=decided, wordings=tuple(template.wordings))
        for template in own
        if not template.tasks or task in template.tasks
    ]
    return chosen or [LABEL_GIVEN if decided is Style.label_given else REVERSE_ENGINEERED]


def answer_of(row: ChatRow) -> str:
    """Return the answer that a row's target holds, without its reasoning."""
    parts = split_reasoning(row.target, required=False)
    assert isinstance(parts, Reasoned), "rows with unreadable targets were left out"
    return parts.answer


def question_of(row: ChatRow) -> str:
    """Return what the row asks, as one text; several messages are told apart."""
    if len(row.prompt) == 1:
        return row.prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in row.prompt)


def teacher_messages(row: ChatRow, template: ReasoningTemplate, wording: int) -> list[dict[str, str]]:
    """Return the conversation that asks for one piece of reasoning."""
    text = template.wordings[wording]
    content = f"A question:\n\n{question_of(row)}\n\nIts answer:\n\n{answer_of(row)}\n\n{text} {_SECRET}\n{_FORM}"
    return [{"role": str(Role.user), "content": content}]


_BROKEN = "\ufffd"


class FormFailure(StrEnum):
    """Why a teacher's answer is not reasoning followed by an answer."""

    empty = "empty"
    broken_characters = "broken_characters"
    """Half characters, which come of tokens that are cut."""
    no_reasoning = "no_reasoning"
    """No ``<Reasoning>...</Reasoning>``, or nothing in it."""
    several_reasonings = "several_reasonings"
    text_before_reasoning = "text_before_reasoning"
    tag_in_reasoning = "tag_in_reasoning"
    """``<think>`` or ``</think>`` inside, which would end the target's reasoning early."""


def read_teacher(text: str) -> Reasoned | FormFailure:
    """Separate the reasoning from the repeated answer, strictly; thoughts of the teacher's own in front are dropped."""
    whole = text.strip()
    if not whole:
        return FormFailure.empty
    if _BROKEN in whole:
        return FormFailure.broken_characters
    if CLOSE in whole and count_of(TAG, whole.split(CLOSE)[-1]):  # a chat template may have opened the block
        whole = whole.split(CLOSE)[-1].strip()
    if count_of(TAG, whole) != 1:
        return FormFailure.several_reasonings if count_of(TAG, whole) else FormFailure.no_reasoning
    before, _, rest = whole.partition(f"<{TAG}>")
    reasoning, _, answer = rest.partition(f"</{TAG}>")
    if before.strip():
        return FormFailure.text_before_reasoning
    if not reasoning.strip():
        return FormFailure.no_reasoning
    if OPEN in reasoning or CLOSE in reasoning:
        return FormFailure.tag_in_reasoning
    return Reasoned(reasoning.strip(), answer.strip())


def chat_request(
    messages: Sequence[dict[str, str]], config: AnsweringConfig, *, seed: int, candidate: int = 0
) -> Request:
    """Return a request for one answer."""
    body = request_body({"messages": list(messages)}, config, config.generation(seed), seed=seed)
    return Request(body=body, candidate=candidate, needs_words=True)


def reasoning_request(
    row: ChatRow, template: ReasoningTemplate, number: int, config: AnsweringConfig, *, seed: int
) -> Request:
    """Return the request for a row's candidate of that number; the template's wordings take turns, seeds differ."""
    return chat_request(
        teacher_messages(row, template, number % len(template.wordings)),
        config,
        seed=drawn(seed, row.id, template.name, number) % _SEEDS,
        candidate=number,
    )


def drawn(*parts: object) -> int:
    """Return a number that looks random and depends on nothing but ``parts``."""
    return stable_integer(*parts, separator="\x1f")
