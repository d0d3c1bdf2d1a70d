"""Many instructions over one record: the same next-advertiser example asked as one of several tasks.

Source: P5 (arXiv:2203.13366) and InstructRec (arXiv:2305.07001), which tune on many instructions over the same records
to do better under new ones. Which form a row has follows from its id, so that a corpus holds all of them.
"""

from collections.abc import Callable

from megatron_ads.data.rows import ChatRow
from megatron_ads.tasks import next_advertiser
from megatron_ads.tasks.conversation import single_turn
from megatron_ads.tasks.prompt_templates import Template
from megatron_ads.tasks.variants import choose_one, list_ranking, yes_no
from megatron_ads.tasks.variants.advertiser_question import AdvertiserQuestion


def name_row(question: AdvertiserQuestion) -> ChatRow:
    """Return the question for the name."""
    return single_turn(
        question.row_id,
        next_advertiser.TASK,
        f"{next_advertiser.TEMPLATE.instruction_of(question.row_id)}\n{question.history}",
        next_advertiser.render_target(question.advertiser, question.reasoning),
        facts=question.facts,
        group=question.group,
        label=question.advertiser,
    )


FORMS: dict[str, Callable[[AdvertiserQuestion], ChatRow]] = {
    next_advertiser.TASK: name_row,
    yes_no.TASK: yes_no.advertiser_row,
    choose_one.TASK: choose_one.chat_row,
    list_ranking.TASK: list_ranking.chat_row,
}
_DRAW = Template(task="several_forms", version=1, paraphrases=tuple(FORMS))


def chat_row(question: AdvertiserQuestion) -> ChatRow:
    """Return one example in the form that its id gives; the row's task is that of the form.

    Raises:
        DataError: If the question's pool has too few others for the form.
    """
    return tuple(FORMS.values())[_DRAW.wording_of(question.row_id)](question)
