"""Labels by a linear classifier on the words of the prompt: the baseline that a language model has to beat.

TF-IDF of words and pairs of words, logistic regression with balanced classes.
"""

from collections.abc import Sequence

from megatron_ads.data.rows import ChatRow


def text_predictions(training: Sequence[ChatRow], rows: Sequence[ChatRow]) -> list[str] | None:
    """Return a label for each of ``rows``, learned from the labels of ``training``; None if they have fewer than two.

    Rows without a label are not learned from.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labelled = [row for row in training if row.label is not None]
    if len({row.label for row in labelled}) < 2:
        return None
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    classifier.fit([_words(row) for row in labelled], [row.label for row in labelled])
    return [str(label) for label in classifier.predict([_words(row) for row in rows])]


def _words(row: ChatRow) -> str:
    return "\n".join(message.content for message in row.prompt)
