"""Compiled programs compute what they say, and their circuits are what they are said to be."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

import pytest
import torch

import patchclamp
from patchclamp.core.circuit import Edge, Node
from patchclamp.truth.planted_circuit import Family, PlantedCircuit
from patchclamp.truth.rasp import PROGRAMS, Program, Variant, compiled, hard_variant, hard_variants
from patchclamp.truth.rasp.edges import (
    EMBED,
    POSITION,
    Pass,
    edge_effects,
    possible_edges,
    structural_edges,
)
from patchclamp.truth.rasp.hard import HARD_PROGRAMS
from patchclamp.truth.rasp.language import Value, evaluate
from patchclamp.truth.rasp.planting import draw_any
from patchclamp.truth.rasp.transformer import PlantedTransformer

Place = Callable[[Sequence, int], Value]
"""What a program should give at place `i` of the inputs `s`, in plain Python."""


def latest(s: Sequence, i: int, token: Value) -> int | None:
    return max((j for j in range(i) if s[j] == token), default=None)


def opener(s: Sequence, i: int) -> int | None:
    depth = 0
    for j in range(i, -1, -1):
        depth += 1 if s[j] == ")" else -1
        if depth == 0:
            return j if s[i] == ")" else None
    return None


def following(s: Sequence, i: int, size: int) -> Value:
    """What followed the last earlier occurrence of the `size` tokens that end at `i`."""
    for j in range(i, size - 1, -1):
        if list(s[j - size : j]) == list(s[i - size + 1 : i + 1]) and i >= size - 1:
            return s[j]
    return None


def balanced(s: Sequence) -> bool:
    levels = list(itertools.accumulate(1 if x == "(" else -1 for x in s))
    return min(levels) >= 0 and levels[-1] == 0


def most_frequent(s: Sequence) -> Value:
    return max(s, key=lambda x: (s.count(x), -s.index(x)))


MEANING: dict[str, Place] = {
    "how_often": lambda s, i: s.count(s[i]),
    "how_often_as_a_number": lambda s, i: s.count(s[i]),
    "how_often_so_far": lambda s, i: s[: i + 1].count(s[i]),
    "seen_before": lambda s, i: s[i] in s[:i],
    "only_once": lambda s, i: s.count(s[i]) == 1,
    "any_twice": lambda s, i: len(set(s)) < len(s),
    "number_of_a": lambda s, i: s.count("a"),
    "share_of_a_so_far": lambda s, i: Fraction(s[: i + 1].count("a"), i + 1),
    "share_of_same": lambda s, i: Fraction(s.count("a"), max(1, s.count("a") + s.count("b"))),
    "a_less_b": lambda s, i: Fraction(
        2 * s[: i + 1].count("a") - s[: i + 1].count("b"), 2 * (i + 1)
    ),
    "more_a_than_b": lambda s, i: s.count("a") > s.count("b"),
    "parity": lambda s, i: sum(s[: i + 1]) % 2,
    "majority": lambda s, i: 2 * sum(s) > len(s),
    "sum_modulo_3": lambda s, i: sum(s[: i + 1]) % 3,
    "pairs_ending_here": lambda s, i: s[:i].count("a") if s[i] == "b" else None,
    "most_frequent": lambda s, i: most_frequent(s),
    "how_many_kinds": lambda s, i: len(set(s[: i + 1])),
    "copy": lambda s, i: s[i],
    "next_letter": lambda s, i: {"a": "b", "b": "c", "c": "d", "d": "a"}[s[i]],
    "reverse": lambda s, i: s[::-1][i],
    "previous_token": lambda s, i: s[i - 1] if i else "-",
    "two_before": lambda s, i: s[i - 2] if i > 1 else None,
    "next_token": lambda s, i: [*s[1:], "-"][i],
    "rotate_left": lambda s, i: [*s[1:], s[0]][i],
    "swap_neighbours": lambda s, i: s[i ^ 1] if i ^ 1 < len(s) else None,
    "first_token": lambda s, i: s[0],
    "last_token": lambda s, i: s[-1],
    "middle_token": lambda s, i: s[len(s) // 2],
    "every_other": lambda s, i: "-" if i % 2 else s[i],
    "add_place": lambda s, i: (s[i] + i) % 3,
    "mirror_agrees": lambda s, i: s[i] == s[::-1][i],
    "palindrome": lambda s, i: s == s[::-1],
    "ends_agree": lambda s, i: s[0] == s[-1],
    "induction": lambda s, i: following(s, i, 1),
    "bigram_induction": lambda s, i: following(s, i, 2),
    "bigram_seen": lambda s, i: any(
        i and s[j - 1 : j + 1] == s[i - 1 : i + 1] for j in range(1, i)
    ),
    "last_occurrence": lambda s, i: latest(s, i, s[i]),
    "first_occurrence": lambda s, i: s.index(s[i]),
    "is_first_occurrence": lambda s, i: s.index(s[i]) == i,
    "distance_to_last": lambda s, i: None if s[i] not in s[:i] else i - latest(s, i, s[i]),
    "same_as_before": lambda s, i: s[i] == s[i - 1] if i else None,
    "exclusive_or": lambda s, i: s[i] ^ s[i - 1] if i else None,
    "skip_bigram": lambda s, i: s[:i].count({"a": "b", "b": "c", "c": "a"}[s[i]]),
    "after_last_a": lambda s, i: None if "a" not in s[:i] else s[latest(s, i, "a") + 1],
    "stutter": lambda s, i: "!" if i and s[i] == s[i - 1] else s[i],
    "bracket_balance": lambda s, i: Fraction(2 * s[: i + 1].count("(") - i - 1, i + 1),
    "bracket_depth": lambda s, i: d if (d := 2 * s[: i + 1].count("(") - i - 1) >= 0 else None,
    "brackets_match": lambda s, i: balanced(s[: i + 1]),
    "opening_bracket": lambda s, i: opener(s, i),
    "rank": lambda s, i: sum(x < s[i] for x in s),
    "sort": lambda s, i: sorted(s)[i],
    "sort_distinct": lambda s, i: sorted(s)[i],
    "median": lambda s, i: sorted(s)[len(s) // 2],
    "smallest": lambda s, i: min(s),
    "largest_so_far": lambda s, i: max(s[: i + 1]),
    "new_record": lambda s, i: s[i] > max(s[:i], default=-1),
    "ascending": lambda s, i: list(s[: i + 1]) == sorted(s[: i + 1]),
    "peak": lambda s, i: s[i - 1] < s[i] > s[i + 1] if 0 < i < len(s) - 1 else None,
    "smaller_to_the_right": lambda s, i: sum(x < s[i] for x in s[i + 1 :]),
}


def sequences(program: Program, most: int = 81) -> list[list[list[Value]]]:
    """Inputs of every length; all of them where there are few."""
    source, found = random.Random(0), []
    for length in range(1, program.length + 1):
        if program.draw is draw_any and len(program.vocab) ** length <= most:
            found.append([list(x) for x in itertools.product(program.vocab, repeat=length)])
        else:
            draws = (program.draw(source, program.vocab, length) for _ in range(most))
            found.append(list(draws))
    return found


@cache
def planted(name: str) -> PlantedCircuit:
    """A circuit that several tests look at and none changes."""
    return compiled(name, num_pairs=12)


def transformer(circuit: PlantedCircuit) -> PlantedTransformer:
    assert isinstance(circuit.module, PlantedTransformer)
    return circuit.module


def effects(circuit: PlantedCircuit) -> dict[Edge, float]:
    """Exact effects of all edges that the anatomy allows."""
    module = transformer(circuit)
    edges = possible_edges(module)
    return edge_effects(module, circuit.clean, circuit.corrupt, circuit.metric, edges)


# ---- programs compute what they say -----------------------------------------


def test_there_are_at_least_forty_programs_and_each_has_a_meaning_in_plain_python() -> None:
    assert len(PROGRAMS) >= 40
    assert MEANING.keys() == PROGRAMS.keys()
    assert len({p.description for p in PROGRAMS.values()}) == len(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_network_and_interpreter_give_what_the_program_means(name: str) -> None:
    program, meaning = PROGRAMS[name], MEANING[name]
    made = program.compile()
    for batch in sequences(program):
        with torch.no_grad():
            logits = made.module(made.encode(batch))
        for inputs, got, row in zip(batch, made.decode(logits), logits[:, 1:], strict=True):
            meant = [meaning(inputs, i) for i in range(len(inputs))]
            assert evaluate(made.program, inputs, causal=program.causal) == meant
            if made.classes:
                assert got == meant
                ideal = torch.tensor([[float(c == m) for c in made.classes] for m in meant])
                assert float((row - ideal).abs().max()) < 1e-3
            else:
                assert got == pytest.approx([float(m) for m in meant], abs=1e-4)


def test_no_two_programs_are_the_same() -> None:
    """On inputs of the same vocabulary and length they differ somewhere."""
    answers: Counter[str] = Counter()
    for program in PROGRAMS.values():
        made, batch = program.compile(), sequences(program)[-1][:60]
        outputs = [evaluate(made.program, x, causal=program.causal) for x in batch]
        answers[f"{program.vocab} {program.causal} {program.last} {made.classes} {outputs}"] += 1
    assert answers.most_common(1)[0][1] == 1


# ---- circuits are what they are said to be --------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_structural_edges_matter_and_active_ones_stand_clear(name: str) -> None:
    circuit = planted(name)
    assert circuit.family is Family.TRANSFORMER
    found = effects(circuit)
    assert circuit.structural <= found.keys()
    for edge, effect in found.items():
        if edge in circuit.active:
            assert effect > 100 * circuit.tolerance, str(edge)
        elif edge in circuit.structural:
            assert effect < circuit.tolerance / 100, str(edge)
        else:
            assert effect < 1e-12, str(edge)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_part_that_depends_on_the_tokens_is_active(name: str) -> None:
    """What is structural only comes from places alone, which no pair changes."""
    circuit = planted(name)
    reached = {EMBED}
    for edge in possible_edges(transformer(circuit)):
        if edge in circuit.structural and edge.writer in reached:
            reached.add(edge.reader)
    left = circuit.nodes("structural") - circuit.nodes("active") - {POSITION}
    assert not left & reached
    assert EMBED in circuit.nodes("active")
    assert Node("logits") in circuit.nodes("active")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_metric_tells_clean_from_corrupt_and_has_a_slope(name: str) -> None:
    circuit = planted(name)
    module, position = transformer(circuit), circuit.metric.position

    def measured(ids: torch.Tensor) -> torch.Tensor:
        output = module(ids)
        rows = torch.arange(len(ids))
        return circuit.metric(output if position is None else output[:, position], rows)

    clean, corrupt = measured(circuit.clean), measured(circuit.corrupt)
    assert bool((clean - corrupt > circuit.tolerance).all())
    slope = torch.autograd.grad(clean.sum(), module.unembed.weight)[0]
    assert float(slope.abs().max()) > 0.1


def test_patching_by_hooks_on_the_live_module_agrees() -> None:
    """One edge of each kind, patched through the inputs of the live module's own layers."""
    circuit = compiled("induction")
    module, clean = transformer(circuit), circuit.clean
    before, other = Pass(), Pass()
    with torch.no_grad():
        assert torch.allclose(before.run(module, clean), module(clean), atol=1e-12)
        other.run(module, circuit.corrupt)
        head, layer = Node("attn.2.z", 0), module.layer(2)
        cases = [
            (Edge(EMBED, head, "q"), layer.attn.q_proj),
            (Edge(Node("attn.1.z", 0), head, "k"), layer.attn.k_proj),
            (Edge(EMBED, head, "v"), layer.attn.v_proj),
            (Edge(EMBED, Node("mlp.0.out")), module.layer(0).mlp),
            (Edge(head, Node("logits")), module.unembed),
        ]
        assert module.config.num_heads == 1
        for edge, place in cases:
            shift = other.written[edge.writer] - before.written[edge.writer]
            hook = place.register_forward_pre_hook(lambda _, args, by=shift: (args[0] + by,))
            expected = module(clean)
            hook.remove()
            got = before.patched(module, edge, other)
            assert torch.allclose(got, expected, atol=1e-12), str(edge)


def test_the_induction_circuit_is_the_one_that_it_is_known_to_be() -> None:
    circuit = compiled("induction")
    previous, induction = Node("attn.1.z", 0), Node("attn.2.z", 0)
    assert circuit.active == {
        Edge(EMBED, previous, "v"),
        Edge(previous, induction, "k"),
        Edge(EMBED, induction, "q"),
        Edge(EMBED, induction, "v"),
        Edge(induction, Node("logits")),
    }
    assert circuit.structural - circuit.active == {
        Edge(POSITION, Node("mlp.0.out")),
        Edge(Node("mlp.0.out"), previous, "q"),
        Edge(POSITION, previous, "k"),
        Edge(POSITION, induction, "k"),
    }


def test_a_circuit_is_the_same_under_its_seed_and_draws_other_pairs_under_another() -> None:
    one, same, other = (compiled("sort", seed) for seed in (3, 3, 4))
    assert torch.equal(one.clean, same.clean)
    assert torch.equal(one.corrupt, same.corrupt)
    assert (one.structural, one.active) == (same.structural, same.active)
    assert not torch.equal(one.clean, other.clean)


@pytest.mark.parametrize("name", ["ends_agree", "next_letter"])
def test_networks_open_are_captured_and_have_the_standard_names(name: str) -> None:
    circuit = planted(name)
    net = patchclamp.open(circuit.module, circuit.clean[:4])
    assert net.anatomy_family == "compiled"
    assert net.graph is not None
    parts = ("q", "k", "v", "scores", "pattern", "z", "out")
    names = [f"attn.0.{part}" for part in parts]
    names += [f"mlp.0.{part}" for part in ("pre", "post", "out")]
    names += [f"resid_{part}.0" for part in ("pre", "mid", "post")]
    _, values = net.run(circuit.clean, record=[*names, "embed", "position", "logits"])
    assert len(values) == len(names) + 3
    assert values["attn.0.z"].dims == ("batch", "position", "head", "unit")


# ---- hard variants ----------------------------------------------------------------


def test_there_are_over_forty_hard_networks_with_truths_of_their_own() -> None:
    found = hard_variants(0)
    assert len(found) == len({c.name for c in found}) == len(HARD_PROGRAMS) * len(Variant) >= 40
    plains = {name: compiled(name, num_pairs=12) for name in HARD_PROGRAMS}
    for circuit in found:
        plain = plains[circuit.name.split("/")[0]]
        assert torch.equal(circuit.clean, plain.clean)
        for ids in (circuit.clean, circuit.corrupt):
            with torch.no_grad():
                shift = (circuit.module(ids) - plain.module(ids)).abs().max()
            noisy = circuit.name.endswith(("noise", "buried"))
            assert float(shift) < (0.45 if noisy else 1e-9), circuit.name
        same = (len(circuit.structural), len(circuit.active))
        want = (len(plain.structural), len(plain.active))
        if circuit.name.endswith("twins"):
            assert same > want
        else:
            assert same == want, circuit.name


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("name", ["how_many_kinds", "brackets_match"])
def test_in_hard_variants_nothing_but_the_truth_matters(name: str, variant: Variant) -> None:
    circuit = hard_variant(name, variant, seed=1)
    for edge, effect in effects(circuit).items():
        if edge in circuit.active:
            assert effect > 2 * circuit.tolerance, str(edge)
        else:
            assert effect < circuit.tolerance, str(edge)


@pytest.mark.parametrize("variant", [Variant.ROTATED, Variant.SCALED, Variant.NOISE])
def test_a_change_of_basis_leaves_the_edges_where_they_were(variant: Variant) -> None:
    plain, hard = compiled("peak", 2, 12), hard_variant("peak", variant, seed=2)
    assert (hard.structural, hard.active) == (plain.structural, plain.active)
    before, after = transformer(plain), transformer(hard)
    share = (
        (before.unembed.weight != 0).double().mean(),
        (after.unembed.weight != 0).double().mean(),
    )
    assert share[0] < 0.1 < 0.9 < share[1], "no direction stands for a class any more"


def test_noise_alone_would_make_every_edge_structural() -> None:
    """So the truth cannot be read off noisy weights: it is of the weights before the noise."""
    hard = hard_variant("ends_agree", Variant.NOISE)
    everything = set(possible_edges(transformer(hard)))
    assert structural_edges(transformer(hard)) == everything
    assert len(hard.structural) < len(everything) / 2


def test_decoys_are_busy_and_in_no_circuit() -> None:
    circuit = hard_variant("peak", Variant.DECOYS)
    module, run, other = transformer(circuit), Pass(), Pass()
    with torch.no_grad():
        run.run(module, circuit.clean)
        other.run(module, circuit.corrupt)
    moved = {
        node: float((run.written[node] - other.written[node]).abs().max()) for node in run.written
    }
    idle = circuit.nodes("structural")
    busy = [node for node, by in moved.items() if node not in idle and by > 1e-3]
    assert len(busy) > 3
    assert Node("mlp.1.out") in busy
