"""Several samples of one row as one answer: what most of them say comes first.

Samples say the same if the same label is read from them, such as an advertiser's name, whatever reasoning stands before
it. They are ordered by how many say it, then by the mean log-probability of these samples; those that cannot be read,
or of which a task reads no label, come last, each by its text. Source: the advertiser paper's sampled decoding (table
2); how it makes a ranking of samples it does not say, so ours.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from megatron_ads.evaluation.answer_records import AnswerBeam
from megatron_ads.metrics.ranking import same_name
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.answer_format import ReadFailure
from megatron_ads.tasks.registry import read_answer, task_named


def ranked_samples(row: ChatRow, texts: Sequence[str], log_probabilities: Sequence[float]) -> tuple[AnswerBeam, ...]:
    """Return what the samples of a row say, what most say first; a text is that of the first sample that says it.

    Args:
        row: What was asked.
        texts: Of the samples.
        log_probabilities: Of each sample, in nats.
    """
    alike: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        alike[_said(row, text)].append(number)
    found = [
        (unread, AnswerBeam(texts[of[0]], mean, len(of) / len(texts), len(of)))
        for (unread, _), of in alike.items()
        for mean in [fmean(log_probabilities[number] for number in of)]
    ]
    found.sort(key=lambda one: (one[0], -(one[1].samples or 0), -one[1].log_probability))
    return tuple(beam for _, beam in found)


def _said(row: ChatRow, text: str) -> tuple[bool, str]:
    """Return whether no label can be read, and what makes two samples alike."""
    label_of, read = task_named(row.task).label_of, read_answer(row, text)
    if label_of is None or isinstance(read, ReadFailure):
        return True, text
    return False, same_name(label_of(read))
