"""Tokenizers: ids, masks, and tokens that can be drawn."""

from __future__ import annotations

import pytest
import torch

from patchclamp.core.errors import InputError
from patchclamp.model.tokens import ByteTokenizer, Tokenizer, TransformersTokenizer

TEXTS = ["Hi é", "", "line\n\x00\u202e"]


@pytest.fixture
def bpe() -> TransformersTokenizer:
    """Byte-level: every byte a token, one merge, a special token that adds nothing."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "Hi"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("H", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    wrapped.padding_side = "left"
    return TransformersTokenizer(wrapped)


def test_bytes_round_trip_and_pad_on_the_right() -> None:
    tokenizer = ByteTokenizer()
    batch = tokenizer.encode(TEXTS)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 9)
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], TEXTS, strict=True):
        length = len(text.encode())
        assert mask.tolist() == [1] * length + [0] * (9 - length)
        assert tokenizer.decode(row[:length]) == text
        assert row[length:].eq(tokenizer.pad_id).all()


def test_max_length_cuts_and_leaves_shorter_texts() -> None:
    batch = ByteTokenizer().encode(["abcdef", "xy"], max_length=3)
    assert batch["input_ids"].tolist() == [[97, 98, 99], [120, 121, 0]]
    with pytest.raises(InputError, match="max_length"):
        ByteTokenizer().encode(["a"], max_length=0)


def test_pieces_of_bytes_can_be_drawn() -> None:
    pieces = ByteTokenizer().pieces(list("a \n\x00é".encode()))
    assert pieces == ["a", " ", "\\n", "\\x00", "<C3>", "<A9>"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        ([""], "no token"),
        ("one", "one text"),
        ([1], "must be strings"),
        (["\ud800"], "surrogate"),
    ],
)
def test_what_cannot_be_encoded_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ByteTokenizer().encode(texts)


def test_unknown_ids_are_refused() -> None:
    with pytest.raises(InputError, match=r"got 256; expected 0 to 255"):
        ByteTokenizer().decode([256])
    with pytest.raises(InputError, match="got -1"):
        ByteTokenizer().pieces([-1])


def test_a_transformers_tokenizer_pads_right_with_its_end_token(bpe: TransformersTokenizer) -> None:
    tokenizer: Tokenizer = bpe
    batch = tokenizer.encode(["Hi!", "é a b"])
    assert tokenizer.vocab_size == 258
    assert tokenizer.pad_id == 257
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, 2:].eq(257).all()
    assert tokenizer.decode(batch["input_ids"][1]) == "é a b"
    assert bpe.wrapped.padding_side == "left"
    assert bpe.wrapped.pad_token is None


def test_a_transformers_tokenizer_cuts(bpe: TransformersTokenizer) -> None:
    long = bpe.encode(["abcdef"])["input_ids"]
    assert torch.equal(bpe.encode(["abcdef"], max_length=4)["input_ids"], long[:, :4])


def test_byte_level_pieces_show_text_and_loose_bytes(bpe: TransformersTokenizer) -> None:
    ids = bpe.encode(["Hi é\n"])["input_ids"][0]
    assert bpe.pieces(ids) == ["Hi", " ", "<C3>", "<A9>", "\\n"]
    assert bpe.pieces([257]) == ["<end>"]


def test_word_pieces_keep_their_marks() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    from tokenizers import Tokenizer, models

    vocab = {"[UNK]": 0, "run": 1, "##ning": 2, "\u2581on": 3}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]")),
        unk_token="[UNK]",
    )
    tokenizer = TransformersTokenizer(wrapped)
    assert tokenizer.pieces([1, 2, 3, 0]) == ["run", "##ning", " on", "[UNK]"]
    assert tokenizer.pad_id == 0
