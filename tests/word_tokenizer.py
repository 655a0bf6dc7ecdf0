"""A tokenizer of whole words, for tests of what is drawn in words of one token."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch


class WordTokenizer:
    """Words with the space before them, digits in groups, every other character alone.

    `lacks` are words outside the vocabulary, `cut` words of two tokens.
    """

    vocab_size, pad_id, unknown = 4000, 0, 1

    def __init__(self, digits: int = 2, lacks: str = "", cut: str = "", suffix: bool = False):
        self.pattern = re.compile(rf" ?[A-Za-z']+|\d{{{digits}}}|\d| ?[^\sA-Za-z\d]|\s")
        self.known = {"<pad>": 0, "<unk>": 1, "<end>": 2}
        self.lacks, self.cut, self.suffix = lacks.split(), cut.split(), suffix

    def _row(self, text: str) -> list[int]:
        words: list[str] = []
        for word in self.pattern.findall(text):
            halves = [word[:3], word[3:]] if word.strip() in self.cut else [word]
            words += ["<unk>" if h.strip() in self.lacks else h for h in halves]
        words += ["<end>"] * self.suffix
        return [self.known.setdefault(w, len(self.known)) for w in words]

    def encode(
        self, texts: Sequence[str], *, max_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        rows = [self._row(text) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int] | torch.Tensor) -> list[str]:
        words = list(self.known)
        return [words[int(i)] if int(i) < len(words) else f"<{int(i)}>" for i in ids]
