"""What recipes with learned tokens share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraclr.train.student import word_ids

if TYPE_CHECKING:
    from loraclr.pipeline import Pipeline
    from loraclr.train.recipe import Words


def token_problems(pipeline: Pipeline, words: Words, *, starts_at_class: bool = True) -> list[str]:
    """Tokens that are known already, and a class word that is no single token although a learned one starts there."""
    problems = [
        f"the token {token!r} is a word the tokenizer already has; give another trigger"
        for token in words.tokens
        if len(word_ids(pipeline, token)) == 1
    ]
    if starts_at_class and words.class_word is not None and (count := len(word_ids(pipeline, words.class_word))) != 1:
        problems.append(
            f"the class word {words.class_word!r} is {count} tokens, and a learned token starts at one; give a single plain word"
        )
    return problems
