"""Soft labels for reviews, from teachers that know more than the labels say.

    python -m gemini.model.training.teacher CACHE OUTPUT.jsonl

English: a logistic regression over the states of a sentence encoder (`gemini.model.training.states`).
Chinese: the mean of three models over characters and runs of them. All are fitted to the training split
alone; a review itself is labelled by a model that did not see it, a text made from reviews by one that saw
them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemini.model.checkpoint import load_checkpoint
from gemini.model.data import load_sentiment
from gemini.model.training.state import write_atomically
from gemini.model.training.states import ENCODER, ensure_states, features, load_arrays, variants

SURE = 0.35  # how far from 1/2 the label of what is no review must be to be worth learning
FOLDS = 5  # shuffled: reviews of one kind of shop stand together, and a teacher must have seen each kind

Row = dict[str, Any]  # {"text", "language", "positive"}
Predict = Callable[[Sequence[str]], NDArray[np.floating]]  # texts -> probabilities of being positive


def english_labels(cache: Path, *, show: bool = False) -> tuple[list[Row], Predict]:
    """Labels of the reviews, of texts made from them, and of others as far as it is sure; and the teacher."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    texts, arrays = load_arrays(ensure_states(cache, show=show))
    states, count = arrays["states"].astype(np.float32), int(arrays["reviews"])
    known = {review.text: review.label for review in load_sentiment(cache, "train", "en")}
    labels = [known[text] for text in texts[:count]]
    teacher = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    held_out = cross_val_predict(
        teacher,
        states[:count],
        labels,
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0),
        method="predict_proba",
    )[:, 1]
    positive = teacher.fit(states[:count], labels).predict_proba(states)[:, 1]
    positive[:count] = held_out
    rows = [
        _row(text, "en", share)
        for number, (text, share) in enumerate(zip(texts, positive, strict=True))
        if number < arrays["made"] or abs(share - 0.5) > SURE
    ]

    def predict(texts: Sequence[str]) -> NDArray[np.floating]:
        raw = features(load_checkpoint(ENCODER), texts)
        return teacher.predict_proba((raw - arrays["mean"]) / arrays["deviation"])[:, 1]

    return rows, predict


def chinese_labels(cache: Path) -> tuple[list[Row], Predict]:
    """Labels of the reviews and of texts made from them, and the teacher."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    reviews = load_sentiment(cache, "train", "zh")
    texts, labels = [review.text for review in reviews], [review.label for review in reviews]
    teacher = character_teacher()
    held_out = cross_val_predict(
        teacher,
        texts,
        labels,
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0),
        method="predict_proba",
    )[:, 1]
    own = set(texts)
    made = [text for text in dict.fromkeys(variants(texts, 4)) if text not in own]
    teacher.fit(texts, labels)

    def predict(texts: Sequence[str]) -> NDArray[np.floating]:
        return teacher.predict_proba(texts)[:, 1]

    labelled = zip([*texts, *made], [*held_out, *predict(made)], strict=True)
    return [_row(text, "zh", share) for text, share in labelled], predict


def character_teacher() -> Any:
    """The mean of three linear models, which err on different reviews.

    Of 12,026 reviews each right on those it did not see: log-count ratios 84.7 %, TF-IDF 85.3 %, naive Bayes
    (Rennie et al., "Tackling the Poor Assumptions of Naive Bayes Text Classifiers", ICML 2003) 83.2 %; the
    three together 85.6 %.
    """
    from sklearn.ensemble import VotingClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB
    from sklearn.pipeline import make_pipeline

    def weighed(longest: int, **options: Any) -> Any:
        return TfidfVectorizer(analyzer="char", ngram_range=(1, longest), sublinear_tf=True, **options)

    return VotingClassifier(
        [
            ("log-count ratios", log_count_teacher()),
            ("tf-idf", make_pipeline(weighed(4, min_df=2), LogisticRegression(C=4, max_iter=1000))),
            ("naive bayes", make_pipeline(weighed(3), ComplementNB(alpha=0.3))),
        ],
        voting="soft",
    )


def log_count_teacher() -> Any:
    """Logistic regression over runs of 1 to 4 characters, scaled by their part in telling labels apart.

    Wang and Manning, "Baselines and Bigrams: Simple, Good Sentiment and Topic Classification", ACL 2012.
    """
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    class LogCountRatio(TransformerMixin, BaseEstimator):
        def fit(self, counts: Any, labels: Sequence[int]) -> Any:
            good = np.asarray(labels) == 1
            present = [1 + np.asarray(counts[chosen].sum(0)).ravel() for chosen in (good, ~good)]
            self.ratio_ = np.log(present[0] / present[0].sum()) - np.log(present[1] / present[1].sum())
            return self

        def transform(self, counts: Any) -> Any:
            return counts.multiply(self.ratio_).tocsr()

    return make_pipeline(
        CountVectorizer(analyzer="char", ngram_range=(1, 4), binary=True, min_df=2),
        LogCountRatio(),
        LogisticRegression(C=0.1, max_iter=1000),
    )


def _row(text: str, language: str, share: float) -> Row:
    return {"text": text, "language": language, "positive": round(float(share), 4)}


def ensure_labels(cache: Path, *, show: bool = False) -> Path:
    """The file of soft labels beside the data; made when there is none, which takes minutes."""
    path = cache / "soft-labels.jsonl"
    if not path.exists():
        write_labels(path, cache, show=show)
    return path


def write_labels(path: Path, cache: Path, *, show: bool = False) -> dict[str, float]:
    """Make the file of soft labels; how many texts it has, and each teacher's percent right on valid."""
    taught = {"en": english_labels(cache, show=show), "zh": chinese_labels(cache)}
    rows = [row for own, _ in taught.values() for row in own]
    figures: dict[str, float] = {"texts": len(rows)}
    for language, (_, predict) in taught.items():
        valid = load_sentiment(cache, "valid", language)
        right = (predict([review.text for review in valid]) > 0.5) == [review.label for review in valid]
        figures[f"valid_{language}"] = 100 * float(np.mean(right))
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return figures


if __name__ == "__main__":
    from gemini.model.offline import import_transformers

    import_transformers()
    print(json.dumps(write_labels(Path(sys.argv[2]), Path(sys.argv[1]), show=True)))
