"""Prompt pairs: what they say is checked by solving each task in another way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from patchclamp.core.errors import DataError
from patchclamp.data.behaviours import (
    catalogue,
    colored_objects,
    docstring,
    gendered_pronoun,
    greater_than,
    indirect_objects,
    induction,
    multiple_choice,
    names,
    prompts,
    subject_verb,
    token_pairs,
)
from patchclamp.data.behaviours.pairs import (
    MetricKind,
    Pair,
    PromptSet,
    Split,
    TokenPairs,
    read_pairs,
    tokenised,
)
from patchclamp.model.tokens import ByteTokenizer
from tests.word_tokenizer import WordTokenizer

TEXT = tuple(entry.name for entry in catalogue() if entry.name != "induction")
EVERY = [(e.name, v) for e in catalogue() if e.name != "induction" for v in e.variants]
NUM = 48


# ---- solving each task in another way ---------------------------------------------------


def receiver(text: str) -> set[str]:
    """The one of two named people who is named once; both of three."""
    counts = Counter(w for w in re.findall(r"\w+", text) if w in names.MEN + names.WOMEN)
    last = [w for w in re.findall(r"\w+", text) if w in counts][-1]
    return {f" {name}" for name in counts if name != last}


def later(text: str) -> set[str]:
    found = re.search(r"year \d\d(\d)(\d)", text)
    assert found
    return {f"{n:02d}" for n in range(int(found[1] + found[2]) + 1, 100)}


def later_decade(text: str) -> set[str]:
    found = re.search(r"year \d\d(\d)\d", text)
    assert found
    return {str(n) for n in range(int(found[1]) + 1, 10)}


def color(text: str) -> set[str]:
    shown = {thing: color for color, thing in re.findall(r"a (\w+) (\w+)(?=,| and|\.)", text)}
    asked = re.findall(r"(?:My|Her|His|Our) (\w+) is$|the (\w+)\?\nA: The color is$", text)
    return {" " + shown["".join(asked[-1])]}


def parameter(text: str) -> set[str]:
    first = re.match(r"def \w+\((.*?)\)", text)
    assert first
    defined, described = first[1].split(", "), re.findall(r"[:@](?:param|arg) (\w+):", text)
    return {" " + defined[defined.index(described[-1]) + 1]}


def option(text: str) -> set[str]:
    right = next(o.split()[0] for q, o in multiple_choice.QUESTIONS if q in text)
    return {f" {x}" for x, word in re.findall(r"^([A-Z])\. (\w+)$", text, re.M) if word == right}


def pronoun(text: str) -> set[str]:
    return {" he" if any(w in names.MEN for w in re.findall(r"\w+", text)) else " she"}


def number(text: str) -> set[str]:
    subject = re.findall(r"[Tt]he (\w+)", text)[0]
    return set(subject_verb.PLURAL if subject[-1] == "s" or subject == "children" else SINGULAR)


SINGULAR = subject_verb.SINGULAR
SOLVE: dict[str, Callable[[str], set[str]]] = {
    "indirect objects": receiver,
    "greater than": later,
    "colored objects": color,
    "docstring": parameter,
    "multiple choice": option,
    "gendered pronoun": pronoun,
    "subject-verb agreement": number,
}
MODULES = {
    "indirect objects": indirect_objects,
    "greater than": greater_than,
    "colored objects": colored_objects,
    "docstring": docstring,
    "multiple choice": multiple_choice,
    "gendered pronoun": gendered_pronoun,
    "subject-verb agreement": subject_verb,
}


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_answers_are_right_on_clean_and_change_places_on_corrupt(
    name: str, variant: str, split: Split
) -> None:
    solve = later_decade if variant == "one digit" else SOLVE[name]
    for pair in prompts(name, NUM, split=split, variant=variant, seed=3).pairs:
        assert solve(pair.clean) == set(pair.correct), pair
        corrupt = solve(pair.corrupt)
        if name == "greater than":
            assert corrupt > set(pair.correct), "all years but the first few are late enough"
        elif variant == "third name":
            assert corrupt == {*pair.correct, *pair.wrong}, "both are equally good"
        else:
            assert corrupt
            assert corrupt <= set(pair.wrong), pair


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_clean_and_corrupt_have_the_same_length_and_answers_one_token(
    name: str, variant: str
) -> None:
    tokenizer = WordTokenizer(digits=1 if variant == "one digit" else 2)
    found = prompts(name, NUM, tokenizer=tokenizer, variant=variant)
    buckets = tokenised(found, tokenizer)
    assert sum(map(len, buckets)) == NUM
    assert sorted(i for b in buckets for i in b.index.tolist()) == list(range(NUM))
    for bucket in buckets:
        assert bucket.position == bucket.length - 1
        for row, i in enumerate(bucket.index.tolist()):
            pair = found.pairs[i]
            assert bucket.texts[row] == (pair.clean, pair.corrupt)
            assert tokenizer.decode(bucket.clean[row]) == pair.clean
            for given, ids in ((pair.correct, bucket.correct), (pair.wrong, bucket.wrong)):
                kept = ids[row][ids[row] >= 0]
                assert tuple(tokenizer.pieces(kept)) == given


NUM_CHANGED = {
    "indirect objects": 1,
    "greater than": 1,
    "colored objects": 1,
    "docstring": 2,
    "multiple choice": 2,
    "gendered pronoun": 1,
    "subject-verb agreement": 1,
}


@pytest.mark.parametrize(("name", "variant"), [e for e in EVERY if e[1] != "one digit"])
def test_nothing_changes_but_what_decides_the_answer(name: str, variant: str) -> None:
    for pair in prompts(name, NUM, variant=variant).pairs:
        words = [re.findall(r"\w+", text) for text in (pair.clean, pair.corrupt)]
        changed = sum(a != b for a, b in zip(*words, strict=True))
        assert changed == NUM_CHANGED[name], pair


def test_the_decade_of_the_first_year_is_neither_late_nor_early() -> None:
    for pair in prompts("greater than", NUM, variant="one digit").pairs:
        found = re.search(r"year \d\d(\d)\d", pair.clean)
        assert found
        assert {*pair.correct, *pair.wrong} == set("0123456789") - {found[1]}
    for pair in prompts("greater than", NUM).pairs:
        assert {*pair.correct, *pair.wrong} == {f"{n:02d}" for n in range(100)}


@pytest.mark.parametrize("name", TEXT)
def test_answers_are_balanced(name: str) -> None:
    found = prompts(name, NUM)
    counts = Counter(pair.correct for pair in found.pairs)
    # a pair that was drawn before is left out, so a few may be missing
    assert max(counts.values()) - min(counts.values()) <= 2, counts
    assert len(counts) >= 2


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_sets_are_a_function_of_seed_and_split(name: str, variant: str) -> None:
    sets = [
        prompts(name, 16, seed=seed, split=split, variant=variant)
        for split in Split
        for seed in (0, 1)
    ]
    again = prompts(name, 16, seed=0, split="train", variant=variant)
    assert again.hash == sets[0].hash
    assert len({found.hash for found in sets}) == 4


@pytest.mark.parametrize("name", TEXT)
def test_splits_share_no_template_and_no_word_of_the_lists(name: str) -> None:
    """Words that are answers in every prompt (he, are, red, A) are shared and documented."""
    module = MODULES[name]
    lists = {
        key: value
        for key, value in vars(module).items()
        if key.isupper() and isinstance(value, tuple) and key not in ("VARIANTS", "COLORS")
    }
    listed = {
        form
        for key, value in lists.items()
        if key not in ("TEMPLATES", "QUESTIONS", "CENTURIES", "SINGULAR", "PLURAL")
        for word in value
        for form in (word.split(":") if ":" in word else (word, word + "s"))
    }
    used, frames = [], []
    for split in Split:
        texts = [
            p.clean for seed in range(6) for p in prompts(name, 40, split=split, seed=seed).pairs
        ]
        found = {w for text in texts for w in re.findall(r"\w+", text)} & listed
        used.append(found | {q for q, _ in lists.get("QUESTIONS", ()) if q in "".join(texts)})
        frames.append({frame(text, listed) for text in texts})
    assert used[0]
    assert used[1]
    assert not used[0] & used[1]
    assert not frames[0] & frames[1]


def frame(text: str, listed: set[str]) -> str:
    """What is left of a prompt without words of the lists, numbers and questions."""
    for question, _ in multiple_choice.QUESTIONS:
        text = text.replace(question, "?")
    text = re.sub(r"(?m)^[A-Z]\. \w+$", "-", re.sub(r"\d+", "#", text))
    words = listed | set(colored_objects.COLORS)
    return re.sub(r"[a-zA-Z]+", lambda m: "_" if m[0] in words else m[0], text)


def test_the_catalogue_says_what_the_modules_do() -> None:
    assert len(catalogue()) == 8
    for entry in catalogue():
        module = MODULES.get(entry.name, induction)
        assert entry.variants == module.VARIANTS
        assert entry.name == module.NAME
        if entry.name != "induction":
            assert prompts(entry.name, 2).source == entry.source


def test_the_catalogue_loads_no_torch() -> None:
    code = (
        "import sys; from patchclamp.data.behaviours import catalogue; catalogue();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- words, tokenizers and what they refuse ---------------------------------------------


def test_words_of_several_tokens_are_left_out() -> None:
    plain = {p.correct[0] for p in prompts("indirect objects", 200).pairs}
    tokenizer = WordTokenizer(cut="John Mary Robert")
    kept = prompts("indirect objects", 200, tokenizer=tokenizer)
    assert {" John", " Mary", " Robert"} <= plain
    words = {word for pair in kept.pairs for word in re.findall(r"\w+", pair.clean + pair.corrupt)}
    assert not words & {"John", "Mary", "Robert"}


def test_years_that_would_make_lengths_differ_are_drawn_again_and_counted() -> None:
    class Whole(WordTokenizer):
        """Reads 1750 to 1799 as one token, as some tokenizers do with frequent years."""

        def __init__(self) -> None:
            super().__init__()
            self.pattern = re.compile(r"\d\d[5-9]\d|" + self.pattern.pattern)

    assert prompts("greater than", 40, tokenizer=WordTokenizer()).num_redrawn == 0
    found = prompts("greater than", 40, tokenizer=Whole())
    assert found.num_redrawn > 5
    assert not any(re.search(r"\d\d[5-9]\d", pair.clean) for pair in found.pairs)


def test_the_form_of_numbers_follows_the_tokenizer() -> None:
    two, one = (prompts("greater than", 8, tokenizer=WordTokenizer(digits=d)) for d in (2, 1))
    assert all(len(a) == 2 for pair in two.pairs for a in pair.correct)
    assert all(len(a) == 1 for pair in one.pairs for a in pair.correct)
    assert two.metric is MetricKind.PROBABILITY_DIFFERENCE


@pytest.mark.parametrize("name", [n for n in TEXT if n != "greater than"])
def test_a_tokenizer_without_words_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="too few"):
        prompts(name, 4, tokenizer=ByteTokenizer())


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(DataError, match="nearest 'greater than'"):
        prompts("greater then", 4)
    with pytest.raises(DataError, match="nearest 'held out'"):
        prompts("docstring", 4, split="held-out")
    with pytest.raises(DataError, match="no variant 'abc'"):
        prompts("docstring", 4, variant="abc")
    with pytest.raises(DataError, match="1 or more"):
        prompts("docstring", 0)
    with pytest.raises(DataError, match="not so many different pairs"):
        prompts("multiple choice", 2_000)
    with pytest.raises(DataError, match="token ids"):
        prompts("induction", 4)
    with pytest.raises(DataError, match="needs a tokenizer"):
        token_pairs("docstring", 4)
    with pytest.raises(DataError, match="needs a tokenizer"):
        token_pairs("induction", 4)
    with pytest.raises(DataError, match="not drawn from a vocabulary"):
        token_pairs("docstring", 4, tokenizer=WordTokenizer(), vocabulary=range(9))


def one(clean: str, corrupt: str, correct: str = " Mary", wrong: str = " John") -> PromptSet:
    pair = Pair(clean, corrupt, (correct,), (wrong,))
    return PromptSet(name="mine", description="", pairs=(pair,), source="me")


def test_the_users_pairs_must_fit_the_tokenizer() -> None:
    fine = one("Mary met John. John saw", "Mary met John. Mary saw")
    assert len(tokenised(fine, WordTokenizer())[0]) == 1
    longer = one("Mary met John. John saw", "Mary met John. Poor Mary saw")
    with pytest.raises(DataError, match="pair 1 of 'mine' differ in length; got 6 and 7 tokens"):
        tokenised(longer, WordTokenizer())
    both = PromptSet(name="mine", description="", pairs=fine.pairs + longer.pairs, source="me")
    kept = tokenised(both, WordTokenizer(), drop_unequal=True)
    assert [b.index.tolist() for b in kept] == [[0]]
    with pytest.raises(DataError, match="no pair of 'mine'"):
        tokenised(longer, WordTokenizer(), drop_unequal=True)


def test_answers_must_be_one_token_of_the_vocabulary() -> None:
    fine = one("Mary met John. John saw", "Mary met John. Mary saw")
    cut = WordTokenizer(cut="Mary")
    fixed = one("He met her. He saw", "He met her. She saw")
    with pytest.raises(DataError, match=r"' Mary' of pair 1 of 'mine' is not one token; got 2"):
        tokenised(fixed, cut)
    first = tokenised(fixed, cut, first_token=True)[0]
    assert cut.decode(first.correct[0]) == " Ma"
    with pytest.raises(DataError, match="both correct and wrong"):
        tokenised(
            one("He met her. He saw", "He met her. She saw", " Mary", " Margaret"),
            WordTokenizer(cut="Mary Margaret"),
            first_token=True,
        )
    with pytest.raises(DataError, match="not in the vocabulary; got it is read as '<unk>'"):
        tokenised(fixed, WordTokenizer(lacks="Mary"))
    with pytest.raises(DataError, match="outside the vocabulary of the network"):
        tokenised(fine, WordTokenizer(), vocab_size=4)
    with pytest.raises(DataError, match="changes how its prompt is read"):
        tokenised(one("He saw Ma", "He met Ma", "ry", " John"), WordTokenizer())
    with pytest.raises(DataError, match="changes how its prompt is read"):
        tokenised(fixed, WordTokenizer(suffix=True))


# ---- the user's own file ------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_pairs_survive_the_way_through_a_file(name: str, tmp_path: Path) -> None:
    found = prompts(name, 12)
    file = tmp_path / "pairs.jsonl"
    file.write_text(found.to_jsonl() + "\n", "utf-8")
    read = read_pairs(file, metric=found.metric)
    assert read.pairs == found.pairs
    assert read.hash == found.hash
    assert read.name == "pairs"


GOOD = {"clean": "a b\u2028", "corrupt": "a c", "correct": " x", "wrong": [" y", " z"]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        (json.dumps({**GOOD, "wrnog": " y"}), "unknown key 'wrnog'.*nearest 'wrong'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "wrong"}), "has no 'wrong'"),
        (json.dumps({**GOOD, "clean": 3}), "'clean' in line 3 .* is not a string"),
        (json.dumps({**GOOD, "correct": 3}), "'correct' in line 3 .* is not an answer"),
        (json.dumps({**GOOD, "correct": []}), "needs correct answers"),
        (json.dumps({**GOOD, "correct": ["", "x"]}), "needs correct answers"),
        (json.dumps({**GOOD, "wrong": [" y", " y"]}), "given twice"),
        (json.dumps({**GOOD, "wrong": " x"}), "both correct and wrong"),
        (json.dumps({**GOOD, "corrupt": GOOD["clean"]}), "two prompts that differ"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(GOOD, ensure_ascii=False) + "\n\n" + line + "\n", "utf-8")
    with pytest.raises(DataError, match="line 3") as caught:
        read_pairs(file)
    assert re.search(says, str(caught.value))


def test_files_that_hold_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="not UTF-8"):
        read_pairs(tmp_path / "bytes.jsonl")


# ---- pairs of token ids --------------------------------------------------------------------


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("variant", induction.VARIANTS)
def test_induction_has_one_earlier_occurrence_that_tells_the_answer(
    variant: str, split: Split
) -> None:
    found = induction.generate(NUM, range(32, 127), split=split, variant=variant)
    again = induction.generate(NUM, range(32, 127), split=split, variant=variant)
    assert found.hash == again.hash
    assert found.length == 64
    for rows, answers in ((found.clean, found.correct), (found.corrupt, found.wrong)):
        for row, answer in zip(rows.tolist(), answers.tolist(), strict=True):
            places = [i for i, token in enumerate(row[:-1]) if token == row[-1]]
            assert len(places) == 1
            assert [row[places[0] + 1]] == answer
            assert 32 <= min(row) <= max(row) <= 126
    changed = (found.clean != found.corrupt).sum(1)
    assert bool((changed == 1).all()) == (variant == "continuation replaced")
    assert bool((found.clean[:, -3:] == found.corrupt[:, -3:]).all())


def test_induction_on_other_vocabularies() -> None:
    rows = induction.generate(5, range(100, 300), first=0, length=40)
    assert rows.clean[:, 0].eq(0).all()
    assert rows.corrupt[:, 0].eq(0).all()
    assert rows.length == 40
    assert int(rows.clean[:, 1:].min()) >= 100
    assert induction.vocabulary_of(ByteTokenizer()) == tuple(range(32, 127))
    bytes_only = token_pairs("induction", 4, tokenizer=ByteTokenizer(), vocab_size=120)[0]
    assert int(bytes_only.clean.max()) < 120
    with pytest.raises(DataError, match="different ids"):
        induction.generate(5, range(20))
    with pytest.raises(DataError, match="hold no repeat"):
        induction.generate(5, range(200), length=6)
    with pytest.raises(DataError, match="too few words and letters"):
        induction.vocabulary_of(WordTokenizer())


def ids(**changed: object) -> TokenPairs:
    plain: dict[str, object] = {
        "clean": torch.tensor([[1, 2], [3, 4]]),
        "corrupt": torch.tensor([[1, 5], [3, 5]]),
        "correct": torch.tensor([[7], [8]]),
        "wrong": torch.tensor([[8, 9], [7, -1]]),
        "index": torch.arange(2),
        "position": 1,
    }
    return TokenPairs(name="mine", **{**plain, **changed})  # type: ignore[arg-type]


def test_token_pairs_have_a_hash_of_their_content_and_can_be_cut() -> None:
    pairs = ids()
    assert pairs.hash == ids(source="elsewhere").hash
    assert pairs.hash != ids(position=0).hash
    assert pairs.hash != ids(metric=MetricKind.PROBABILITY_DIFFERENCE).hash
    assert pairs.hash != ids(wrong=torch.tensor([[8, 9], [7, 2]])).hash
    second = pairs.rows([1])
    assert second.clean.tolist() == [[3, 4]]
    assert second.index.tolist() == [1]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"clean": torch.tensor([[1, 2]])}, "different shapes"),
        ({"clean": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, "'clean' of 'mine'"),
        ({"clean": torch.tensor([[1, 2], [3, -4]])}, "negative"),
        ({"corrupt": torch.tensor([[1, 5], [3, 4]])}, "same tokens .* index 1"),
        ({"correct": torch.tensor([[7], [-1]])}, "no correct answer"),
        ({"wrong": torch.tensor([[8, 9], [-2, 7]])}, "no wrong answer"),
        ({"wrong": torch.tensor([[8, 9], [7, 8]])}, "both correct and wrong"),
        ({"correct": torch.tensor([[7]])}, "other rows"),
        ({"position": 2}, "outside the prompts"),
        ({"texts": (("a", "b"),)}, "texts for other rows"),
    ],
)
def test_token_pairs_that_do_not_fit_are_refused(changed: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        ids(**changed)
