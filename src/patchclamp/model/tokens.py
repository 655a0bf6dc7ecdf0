"""Tokenizers: from text to the ids that a network takes, and back.

One protocol for the bundled byte-level network and for whatever a folder holds.
Batches are padded on the right, so that position p of a row is token p of its
text, and a causal network needs no mask for the positions that are real.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from patchclamp.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NUM_BYTES = 256
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Tokenizer(Protocol):
    """What the rest of patchclamp asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are: 0 to vocab_size - 1."""
        ...

    @property
    def pad_id(self) -> int:
        """The id that fills a row to the length of the longest."""
        ...

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        """Ids and mask of texts.

        Shapes: input_ids and attention_mask (batch, length), int64; the mask is 1
        on real tokens. `max_length` cuts longer texts; None cuts nothing.
        Raises: InputError for no texts, or texts without a single token.
        """
        ...

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids (length,), special tokens included."""
        ...

    def pieces(self, ids: Sequence[int] | Tensor) -> list[str]:
        """One printable string a token, for drawing: control characters are spelled out."""
        ...


class ByteTokenizer:
    """Ids are the bytes of the UTF-8 text, 0 to 255. Nothing is added; 0 pads."""

    vocab_size = NUM_BYTES
    pad_id = 0

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        """See `Tokenizer.encode`. Cutting may split a character."""
        rows = [list(_utf8(text)) for text in _texts(texts)]
        return _padded([row[: _limit(max_length)] for row in rows], self.pad_id)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """See `Tokenizer.decode`. Bytes that are no UTF-8 become U+FFFD."""
        return bytes(_ids(ids, self.vocab_size)).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int] | Tensor) -> list[str]:
        """See `Tokenizer.pieces`. Bytes beyond ASCII are shown as `<E4>`."""
        return [_printable_bytes(bytes([i])) for i in _ids(ids, self.vocab_size)]


class TransformersTokenizer:
    """A tokenizer of the transformers library, used as it is and never changed.

    Padding is done here, on the right whatever the tokenizer's own side is; one
    without a padding token pads with its end-of-text token.
    """

    def __init__(self, wrapped: PreTrainedTokenizerBase) -> None:
        self.wrapped = wrapped
        self._byte_of = _byte_alphabet() if _is_byte_level(wrapped) else {}

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, added tokens included (a network may have a few more rows)."""
        return len(self.wrapped)

    @property
    def pad_id(self) -> int:
        """The padding id, else the end-of-text id, else 0; masked in any case."""
        for name in ("pad_token_id", "eos_token_id"):
            token = getattr(self.wrapped, name)
            if isinstance(token, int):
                return token
        return 0

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        """See `Tokenizer.encode`. Special tokens are added as the tokenizer does by default."""
        limit = _limit(max_length)
        # verbose=False: the warning about a length that the network cannot take is not its to give
        coded = self.wrapped(
            _texts(texts), truncation=limit is not None, max_length=limit, verbose=False
        )
        return _padded([list(row) for row in coded["input_ids"]], self.pad_id)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """See `Tokenizer.decode`."""
        plain = _ids(ids, self.vocab_size)
        text = self.wrapped.decode(plain, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def pieces(self, ids: Sequence[int] | Tensor) -> list[str]:
        """See `Tokenizer.pieces`. Part of a character is shown as its bytes, `<E4><BD>`."""
        plain = _ids(ids, self.vocab_size)
        tokens = self.wrapped.convert_ids_to_tokens(plain)
        special = set(self.wrapped.all_special_ids)
        return [
            _printable(token) if number in special else self._piece(token)
            for number, token in zip(plain, tokens, strict=True)
        ]

    def _piece(self, token: str) -> str:
        if self._byte_of and all(c in self._byte_of for c in token):
            return _printable_bytes(bytes(self._byte_of[c] for c in token))
        return _printable(token.replace("\u2581", " "))


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InputError("one text was given where several are taken", hint="pass [text]")
    found = list(texts)
    wrong = next((t for t in found if not isinstance(t, str)), None)
    if wrong is not None:
        raise InputError("texts must be strings", got=type(wrong).__name__)
    if not found:
        raise InputError("there are no texts to encode")
    return found


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"a text holds half a surrogate pair at index {e.start}, which has no UTF-8 form",
            hint="text.encode('utf-8', 'replace').decode('utf-8')",
        ) from e


def _limit(max_length: int | None) -> int | None:
    if max_length is not None and max_length < 1:
        raise InputError("max_length leaves no token", got=str(max_length), expected="1 or more")
    return max_length


def _padded(rows: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    import torch

    length = max(len(row) for row in rows)
    if length == 0:
        raise InputError("the texts hold no token", got="empty texts only")
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _ids(ids: Sequence[int] | Tensor | Iterable[int], vocab_size: int) -> list[int]:
    plain = [int(i) for i in ids]
    wrong = next((i for i in plain if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InputError("a token id is unknown", got=str(wrong), expected=f"0 to {vocab_size - 1}")
    return plain


def _printable(text: str) -> str:
    """Spaces stay; every other character without a glyph is spelled out."""
    return "".join(
        c
        if c == " " or c.isprintable()
        else ESCAPES.get(c) or c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def _printable_bytes(raw: bytes) -> str:
    try:
        return _printable(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "".join(_printable(chr(b)) if b < 0x80 else f"<{b:02X}>" for b in raw)


def _is_byte_level(wrapped: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are written in the byte alphabet of GPT-2."""
    backend = getattr(wrapped, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


def _byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level tokenizers write the 256 bytes (Radford et al. 2019).

    Bytes that Latin-1 shows as a visible character stand for themselves; the
    others, in order, are the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(b): b for b in visible}
    hidden = (b for b in range(NUM_BYTES) if b not in visible)
    alphabet.update({chr(NUM_BYTES + rank): b for rank, b in enumerate(hidden)})
    return alphabet
