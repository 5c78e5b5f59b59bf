"""The toybox's CLIPTokenizer: a byte-level BPE whose merges make one token of every word in the world's vocabulary."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer
from world import vocabulary

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    rank: dict[tuple[str, str], int] = {}
    for word in vocabulary():
        # A word not yet whole gets merges that join what today's merges leave of it, from the left. Newer merges rank below
        # all older ones, so words that were whole stay whole.
        parts = _apply([*word[:-1], word[-1] + "</w>"], rank)
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            rank.setdefault(pair, len(merges))
            if rank[pair] == len(merges):
                merges.append(pair)
                pieces.append(pair[0] + pair[1])
            parts = _apply([*word[:-1], word[-1] + "</w>"], rank)
    vocab = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), BOS, EOS])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    broken = [word for word in vocabulary() if len(tokenizer(word).input_ids) != 3]
    if broken:
        raise RuntimeError(f"words of more than one token: {broken}")
    return tokenizer


def _apply(parts: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), 1 << 30))
        pair = (parts[best], parts[best + 1])
        if pair not in rank:
            break
        joined, index = [], 0
        while index < len(parts):
            if index + 1 < len(parts) and (parts[index], parts[index + 1]) == pair:
                joined.append(parts[index] + parts[index + 1])
                index += 2
            else:
                joined.append(parts[index])
                index += 1
        parts = joined
    return parts
