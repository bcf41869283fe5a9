"""The reward of the sentiment task: how positive a response sounds to VADER (Hutto and Gilbert 2014)."""

from __future__ import annotations

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # type: ignore[import-untyped]


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    """Built once: reading VADER's lexicon of 7,500 words takes longer than scoring a batch."""
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
    """VADER's compound score of each response, in [-1, 1], in the order given; an empty response scores 0.0.

    `responses` are decoded without special tokens. Prompts and the data's other columns are not looked at.
    """
    return [float(_analyzer().polarity_scores(response)["compound"]) for response in responses]
