"""Prompt pairs: a clean prompt, a corrupt one and the answers that tell them apart.

A behaviour is shown by prompts on which a network gives one answer, each beside a
*corrupt* prompt that is the same but for what decides the answer. What differs
inside the network between the two is then what the behaviour is made of (Vig et al.
2020; Wang et al. 2022). A `Pair` is text, as a person writes it; `TokenPairs` is what
a network takes: rows of equal length, with the answers as token ids.

Clean and corrupt must have the same number of tokens, because a value at a position
of one run is put at the same position of the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from patchclamp.core.errors import DataError, nearest
from patchclamp.model.identity import data_hash
from patchclamp.model.tokens import Tokenizer

KEYS = ("clean", "corrupt", "correct", "wrong")
"""The keys of a line of a file of pairs."""
LINE = '{"clean": "...", "corrupt": "...", "correct": " ...", "wrong": " ..."}'
PADDING = -1
"""Fills up the answers of a row that has fewer than others."""


class Split(StrEnum):
    """Two parts of every behaviour that share no template, name or noun."""

    TRAIN = "train"
    HELD_OUT = "held out"


class MetricKind(StrEnum):
    """What is measured of the output at the position of the answer."""

    LOGIT_DIFFERENCE = "logit difference"
    """Mean logit of the correct answers less that of the wrong ones."""
    PROBABILITY_DIFFERENCE = "probability difference"
    """Probability of all correct answers less that of all wrong ones."""


@dataclass(frozen=True)
class Pair:
    """One clean and one corrupt prompt.

    Attributes:
        clean, corrupt: the prompts, each ending where the answer begins.
        correct: continuations that are right after `clean`, with their leading space.
        wrong: continuations that are wrong after `clean`.
    """

    clean: str
    corrupt: str
    correct: tuple[str, ...]
    wrong: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.clean or not self.corrupt or self.clean == self.corrupt:
            raise DataError(
                "a pair needs two prompts that differ",
                got=f"{self.clean!r} and {self.corrupt!r}",
            )
        for name, answers in (("correct", self.correct), ("wrong", self.wrong)):
            if not answers or not all(answers) or len(set(answers)) < len(answers):
                raise DataError(
                    f"a pair needs {name} answers, none empty or given twice",
                    got=str(list(answers)),
                    hint=f"the prompt is {self.clean[:60]!r}",
                )
        both = set(self.correct) & set(self.wrong)
        if both:
            raise DataError(
                "an answer is given as both correct and wrong",
                got=repr(min(both)),
                hint=f"the prompt is {self.clean[:60]!r}",
            )


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Pairs of one behaviour.

    Attributes:
        metric: how the answers are measured.
        source: the paper that the behaviour is from, or the file.
        num_redrawn: how often the generator drew again because clean and corrupt
            had different numbers of tokens.
    """

    name: str
    description: str
    pairs: tuple[Pair, ...]
    metric: MetricKind = MetricKind.LOGIT_DIFFERENCE
    split: Split = Split.TRAIN
    source: str
    num_redrawn: int = 0

    def __post_init__(self) -> None:
        if not self.pairs:
            raise DataError(f"the prompt set '{self.name}' is empty")

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the pairs and the metric, not of the name."""
        content = [str(self.metric), self.to_jsonl()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_jsonl(self) -> str:
        """One object a line, which `read_pairs` reads back."""
        return "".join(
            json.dumps({key: getattr(pair, key) for key in KEYS}, ensure_ascii=False) + "\n"
            for pair in self.pairs
        )


def read_pairs(
    path: str | PathLike[str],
    *,
    metric: MetricKind = MetricKind.LOGIT_DIFFERENCE,
    split: Split = Split.HELD_OUT,
) -> PromptSet:
    """The user's own pairs: JSON lines with `clean`, `corrupt`, `correct` and `wrong`.

    An answer is a string with its leading space, or a list of such strings.

    Raises:
        DataError: no such file, not UTF-8, no lines; or a line is not JSON, lacks a key,
            has an unknown one, or its values are no pair. It names the line.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8-sig")
    except OSError as e:
        raise DataError(f"cannot read prompt pairs from '{path}'", got=str(e)) from e
    except UnicodeDecodeError as e:
        raise DataError(f"'{path}' is not UTF-8 text", got=str(e)) from e
    # Not splitlines: a JSON string may hold U+2028, at which that would cut.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"'{path}' is empty", expected=f"lines such as {LINE}")
    return PromptSet(
        name=file.stem,
        description=f"{len(lines)} pairs from {file.name}",
        pairs=tuple(_pair(line, f"line {number} of '{path}'") for number, line in lines),
        metric=metric,
        split=split,
        source=file.name,
    )


def _pair(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise DataError(f"{where} is not JSON", got=str(e), expected=LINE) from e
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object", got=line[:60], expected=LINE)
    unknown = next((key for key in row if key not in KEYS), None)
    if unknown is not None:
        raise DataError(
            f"{where} has an unknown key '{unknown}'",
            expected=", ".join(KEYS),
            nearest=nearest(unknown, KEYS),
        )
    lacking = next((key for key in KEYS if key not in row), None)
    if lacking is not None:
        raise DataError(f"{where} has no '{lacking}'", got=line[:60], expected=LINE)
    for key in ("clean", "corrupt"):
        if not isinstance(row[key], str):
            raise DataError(f"'{key}' in {where} is not a string", got=type(row[key]).__name__)
    correct, wrong = (_answers(row[key], key, where) for key in ("correct", "wrong"))
    try:
        return Pair(row["clean"], row["corrupt"], correct, wrong)
    except DataError as e:
        raise DataError(f"{where}: {e.what}", got=e.got, expected=e.expected) from e


def _answers(value: object, key: str, where: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise DataError(
            f"'{key}' in {where} is not an answer",
            got=repr(value)[:60],
            expected="a string with its leading space, or a list of such strings",
        )
    return tuple(listed)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPairs:
    """Pairs as token ids, all rows of one length.

    Attributes:
        clean, corrupt: int64 (row, length).
        correct, wrong: ids of the answers after `clean`, int64 (row, k), padded with -1.
        position: where the answer is predicted; counted from the start.
        index: which pair of its prompt set each row is, int64 (row,).
        texts: (clean, corrupt) of each row, or nothing where rows never were text.
    """

    name: str
    clean: Tensor
    corrupt: Tensor
    correct: Tensor
    wrong: Tensor
    position: int
    metric: MetricKind = MetricKind.LOGIT_DIFFERENCE
    split: Split = Split.TRAIN
    source: str = ""
    index: Tensor
    texts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self._check_shapes()
        num, length = self.clean.shape
        if not 0 <= self.position < length:
            raise DataError(
                f"the answer's position in '{self.name}' is outside the prompts",
                got=str(self.position),
                expected=f"0 to {length - 1}",
            )
        if self.texts and len(self.texts) != num:
            raise DataError(
                f"'{self.name}' has texts for other rows than its own",
                got=f"{len(self.texts)} texts",
                expected=str(num),
            )
        same = (self.clean == self.corrupt).all(1).nonzero().flatten().tolist()
        if same:
            raise DataError(
                f"clean and corrupt are the same tokens in '{self.name}'",
                got=f"{len(same)} such rows, the first at index {same[0]}",
            )
        check_answers(self.correct, self.wrong, self.name)

    def __len__(self) -> int:
        return self.clean.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a prompt."""
        return self.clean.shape[1]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of ids, answers, position and metric, not of the name."""
        tensors = {key: getattr(self, key) for key in KEYS}
        return data_hash({**tensors, str(self.metric): torch.tensor(self.position)})

    def rows(self, index: Tensor | Sequence[int]) -> TokenPairs:
        """Some of the rows."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return replace(
            self,
            clean=self.clean[chosen],
            corrupt=self.corrupt[chosen],
            correct=self.correct[chosen],
            wrong=self.wrong[chosen],
            index=self.index[chosen],
            texts=tuple(self.texts[i] for i in chosen.tolist()) if self.texts else (),
        )

    def _check_shapes(self) -> None:
        for name in ("clean", "corrupt", "correct", "wrong"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.numel() == 0:
                raise DataError(
                    f"'{name}' of '{self.name}' does not hold token ids",
                    got=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
                    expected="torch.int64 of shape (row, length), not empty",
                )
        if self.clean.shape != self.corrupt.shape:
            raise DataError(
                f"clean and corrupt of '{self.name}' have different shapes",
                got=f"{tuple(self.clean.shape)} and {tuple(self.corrupt.shape)}",
                hint="values of one are put at the same positions of the other",
            )
        if int(torch.stack([self.clean, self.corrupt]).min()) < 0:
            raise DataError(f"'{self.name}' has negative token ids")
        num = self.clean.shape[0]
        rows = {len(self.correct), len(self.wrong), len(self.index)}
        if rows != {num}:
            raise DataError(
                f"'{self.name}' has answers for other rows than its own",
                got=f"{sorted(rows)} rows",
                expected=str(num),
            )


def check_answers(correct: Tensor, wrong: Tensor, name: str) -> None:
    """Every row has answers of both kinds, and none of them is both.

    Shapes: correct (row, k) and wrong (row, m), int64, padded with -1.
    Raises: DataError, with the first row that does not.
    """
    for kind, ids in (("correct", correct), ("wrong", wrong)):
        bad = ((ids < PADDING).any(1) | (ids < 0).all(1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"a row of '{name}' has no {kind} answer",
                got=f"{ids[bad[0]].tolist()} at row {bad[0]}",
                expected="token ids, padded with -1",
            )
    both = ((correct[:, :, None] == wrong[:, None]) & (correct[:, :, None] >= 0)).flatten(1).any(1)
    if bool(both.any()):
        row = int(both.nonzero()[0])
        raise DataError(
            f"an answer of '{name}' is both correct and wrong",
            got=f"correct {correct[row].tolist()}, wrong {wrong[row].tolist()} at row {row}",
            hint="answers that begin with the same token cannot be told apart by it",
        )


def padded(answers: Iterable[Sequence[int]]) -> Tensor:
    """Answers of all rows as one tensor, int64 (row, k), padded with -1."""
    rows = [list(row) for row in answers]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])


def tokenised(
    prompt_set: PromptSet,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    first_token: bool = False,
    drop_unequal: bool = False,
) -> tuple[TokenPairs, ...]:
    """The pairs as token ids: one `TokenPairs` for each number of tokens, shortest first.

    An answer is read as it stands after its prompt, so that tokenizers that merge or
    mark leading spaces give the token that the network would really have to predict.

    Args:
        vocab_size: outputs of the network; the tokenizer's ids if not given.
        first_token: take the first token of answers that have several.
        drop_unequal: leave out pairs whose prompts differ in length; how many is
            `len(prompt_set)` less the rows of the result.

    Raises:
        DataError: prompts of unequal length, answers that are not one token or that the
            vocabulary lacks, or no pair left.
    """
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    pairs = prompt_set.pairs
    clean = _ids(tokenizer, [pair.clean for pair in pairs])
    corrupt = _ids(tokenizer, [pair.corrupt for pair in pairs])
    buckets: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        if len(clean[i]) == len(corrupt[i]):
            buckets.setdefault(len(clean[i]), []).append(i)
        elif not drop_unequal:
            raise DataError(
                f"clean and corrupt of pair {i + 1} of '{prompt_set.name}' differ in length",
                got=f"{len(clean[i])} and {len(corrupt[i])} tokens: "
                f"{pair.clean[:60]!r} and {pair.corrupt[:60]!r}",
                hint="replace words by words with the same number of tokens, or drop_unequal=True",
            )
    if not buckets:
        raise DataError(
            f"no pair of '{prompt_set.name}' has prompts of equal length in tokens",
            hint="replace words by words with the same number of tokens",
        )
    read = _answer_ids(prompt_set, tokenizer, clean, first_token=first_token, vocab_size=size)
    return tuple(
        TokenPairs(
            name=prompt_set.name,
            clean=torch.tensor([clean[i] for i in rows]),
            corrupt=torch.tensor([corrupt[i] for i in rows]),
            correct=padded([read[i, answer] for answer in pairs[i].correct] for i in rows),
            wrong=padded([read[i, answer] for answer in pairs[i].wrong] for i in rows),
            position=length - 1,
            metric=prompt_set.metric,
            split=prompt_set.split,
            source=prompt_set.source,
            index=torch.tensor(rows),
            texts=tuple((pairs[i].clean, pairs[i].corrupt) for i in rows),
        )
        for length, rows in sorted(buckets.items())
    )


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without padding."""
    coded = tokenizer.encode(texts)
    lengths = coded["attention_mask"].sum(1).tolist()
    rows = coded["input_ids"].tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def _answer_ids(
    prompt_set: PromptSet,
    tokenizer: Tokenizer,
    clean: list[list[int]],
    *,
    first_token: bool,
    vocab_size: int,
) -> dict[tuple[int, str], int]:
    """Token of each (pair, answer)."""
    wanted = [(i, a) for i, p in enumerate(prompt_set.pairs) for a in (*p.correct, *p.wrong)]
    whole = _ids(tokenizer, [prompt_set.pairs[i].clean + answer for i, answer in wanted])
    found: dict[tuple[int, str], int] = {}
    for (i, answer), ids in zip(wanted, whole, strict=True):
        where = f"the answer {answer!r} of pair {i + 1} of '{prompt_set.name}'"
        start = len(clean[i])
        added = ids[start:]
        if ids[:start] != clean[i] or not added:
            raise DataError(
                f"{where} changes how its prompt is read, so that no token stands for it",
                got=f"{tokenizer.pieces(clean[i])[-2:]} and then {tokenizer.pieces(ids)[-2:]}",
                hint="end the prompt before the space and begin the answer with it; tokenizers "
                "that end every text with a token of their own cannot be used",
            )
        if len(added) > 1 and not first_token:
            raise DataError(
                f"{where} is not one token",
                got=f"{len(added)}: {tokenizer.pieces(added)}",
                hint="choose another word, or take its first token with first_token=True",
            )
        if len(added) == 1 and not _says(tokenizer, added[0], answer):
            raise DataError(
                f"{where} is not in the vocabulary",
                got=f"it is read as {tokenizer.decode(added)!r}",
            )
        if added[0] >= vocab_size:
            raise DataError(
                f"{where} is outside the vocabulary of the network",
                got=f"token {added[0]}",
                expected=f"0 to {vocab_size - 1}",
            )
        found[i, answer] = added[0]
    return found


def _says(tokenizer: Tokenizer, token: int, answer: str) -> bool:
    """Whether a token is read back as the answer, but for case and spaces at its ends."""
    return tokenizer.decode([token]).strip().casefold() == answer.strip().casefold()
