"""Compiled programs made hard to read, with their circuits still known.

Every variant computes what its program computes. What changes is how it lies in the
weights:

- **rotated**: an orthogonal change of basis of the residual stream, and one inside every
  head, so that no direction stands for anything;
- **scaled**: before the rotation every direction of the stream is stretched by its own
  factor, so that the size of a writer, or of a reader's weights, says nothing;
- **decoys**: heads with random weights in every block and a whole block between the
  others, all of which write into directions that nobody reads, or whose output
  projection does not let through what their values hold; the heads of a block are
  shuffled. Decoys are in no circuit;
- **twins**: in one block two heads with the same random attention and opposite outputs
  into the stream. Together they do nothing, but patching an edge of one of them does, so
  their edges are in the circuit, by both truths;
- **noise**: rotated, with Gaussian noise on every weight, which makes every edge carry
  something. It is no part of the truth: that is of the weights before the noise. The
  tolerance is raised above what the noise can do;
- **buried**: decoys, stretching, rotation and noise, all at once.

Active edges are found anew by brute force in the variant itself.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn

from patchclamp.core.circuit import Edge
from patchclamp.core.errors import OptionError
from patchclamp.truth.planted_circuit import PlantedCircuit
from patchclamp.truth.rasp.edges import edge_effects, structural_edges
from patchclamp.truth.rasp.programs import compiled
from patchclamp.truth.rasp.transformer import PlantedBlock, PlantedTransformer

NOISE = 2e-5
"""Standard deviation of the noise on every weight."""

NOISY_TOLERANCE = 0.05
"""Noise moves a metric by less than this, and a part that matters by more."""

_UNREAD = 4  # directions of the stream that only decoys write
_SPREAD = 0.7  # standard deviation of the logarithm of a stretching factor


class Variant(StrEnum):
    """How a program is made hard; see the module docstring."""

    ROTATED = "rotated"
    SCALED = "scaled"
    DECOYS = "decoys"
    TWINS = "twins"
    NOISE = "noise"
    BURIED = "buried"


HARD_PROGRAMS = (
    "induction",
    "sort_distinct",
    "brackets_match",
    "how_many_kinds",
    "largest_so_far",
    "ends_agree",
    "more_a_than_b",
    "peak",
)
"""Programs that are made hard: two to four blocks, and most of their parts active."""


def hard_variants(seed: int, num_pairs: int = 12) -> list[PlantedCircuit]:
    """Every variant of every program of `HARD_PROGRAMS`: 48 networks.

    Randomness: weights and pairs by `seed`. Cost: a few seconds.
    """
    return [
        hard_variant(name, variant, seed=seed, num_pairs=num_pairs)
        for name in HARD_PROGRAMS
        for variant in Variant
    ]


def hard_variant(
    name: str, variant: Variant | str, *, seed: int = 0, num_pairs: int = 12
) -> PlantedCircuit:
    """One registered program made hard.

    Raises:
        OptionError: there is no such program or variant.
    """
    if variant not in set(Variant):
        raise OptionError(f"no variant '{variant}'", expected=f"one of {', '.join(Variant)}")
    plain = compiled(name, seed, num_pairs)
    if not isinstance(plain.module, PlantedTransformer):
        raise OptionError(f"'{name}' is no transformer", got=type(plain.module).__name__)
    order = list(Variant).index(Variant(variant))
    source = torch.Generator().manual_seed(1000 * seed + order)
    with torch.no_grad():
        module, structural, noisy = _made(plain.module, Variant(variant), source)
    tolerance = NOISY_TOLERANCE if noisy else plain.tolerance
    effects = edge_effects(module, plain.clean, plain.corrupt, plain.metric, structural)
    return dataclasses.replace(
        plain,
        name=f"{name}/{variant}",
        module=module,
        structural=structural,
        active=frozenset(edge for edge, effect in effects.items() if effect > tolerance),
        tolerance=tolerance,
    )


def _made(
    plain: PlantedTransformer, variant: Variant, source: torch.Generator
) -> tuple[PlantedTransformer, frozenset[Edge], bool]:
    """The network, its structural edges, and whether there is noise on it."""
    module = copy.deepcopy(plain)
    if variant is Variant.DECOYS or variant is Variant.BURIED:
        module = _with_decoys(module, source)
    if variant is Variant.TWINS:
        module = _with_twins(module, source)
    if variant is Variant.SCALED or variant is Variant.BURIED:
        width = module.config.width
        factors = torch.exp(_SPREAD * _normal(source, width))
        _change_basis(module, torch.diag(factors), torch.diag(1 / factors))
    _rotate(module, source)
    structural = structural_edges(module)
    noisy = variant is Variant.NOISE or variant is Variant.BURIED
    if noisy:
        for parameter in module.parameters():
            parameter.add_(NOISE * _normal(source, *parameter.shape))
    return module.eval(), structural, noisy


def _normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


# ---- changes of basis -------------------------------------------------------------


def _rotate(module: PlantedTransformer, source: torch.Generator) -> None:
    """Turn the stream, and the queries with the keys and the values of every head."""
    turn = _orthogonal(source, module.config.width)
    _change_basis(module, turn, turn.T)
    size = module.config.head_dim
    for n in range(module.config.num_layers):
        attn = module.layer(n).attn
        for h in range(module.config.num_heads):
            rows = slice(h * size, (h + 1) * size)
            meet, carry = _orthogonal(source, size), _orthogonal(source, size)
            for project, by in ((attn.q_proj, meet), (attn.k_proj, meet), (attn.v_proj, carry)):
                project.weight[rows] = by @ project.weight[rows]
                project.bias[rows] = by @ project.bias[rows]
            attn.o_proj.weight[:, rows] = attn.o_proj.weight[:, rows] @ carry.T


def _orthogonal(source: torch.Generator, size: int) -> Tensor:
    turn: Tensor = torch.linalg.qr(_normal(source, size, size))[0]
    return turn


def _change_basis(module: PlantedTransformer, there: Tensor, back: Tensor) -> None:
    """Writers put `there @ x` into the stream instead of x, readers undo it with `back`."""
    for table in (module.embed, module.position):
        table.weight.copy_(table.weight @ there.T)
    for n in range(module.config.num_layers):
        attn, mlp = module.layer(n).attn, module.layer(n).mlp
        for reader in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.up):
            reader.weight.copy_(reader.weight @ back)
        for writer in (attn.o_proj, mlp.down):
            writer.weight.copy_(there @ writer.weight)
            writer.bias.copy_(there @ writer.bias)
    module.unembed.weight.copy_(module.unembed.weight @ back)


# ---- additions --------------------------------------------------------------------


def _grown(
    plain: PlantedTransformer,
    blocks: Sequence[int],
    places: Sequence[Sequence[int]],
    *,
    more_blocks: int = 0,
    unread: int = 0,
) -> PlantedTransformer:
    """A larger network that computes the same; what is new is zero.

    Args:
        blocks: where the blocks go in it.
        places: for every block, where its heads go; there is room for two more.
        more_blocks, unread: how many blocks and directions of the stream it gains.
    """
    old = plain.config
    module = PlantedTransformer(
        dataclasses.replace(
            old,
            width=old.width + unread,
            num_layers=old.num_layers + more_blocks,
            num_heads=old.num_heads + 2,
        )
    )
    width, size = old.width, old.head_dim
    module.embed.weight[:, :width] = plain.embed.weight
    module.position.weight[:, :width] = plain.position.weight
    module.unembed.weight[:, :width] = plain.unembed.weight
    for n, block in enumerate(blocks):
        was, now = plain.layer(n), module.layer(block)
        for h, place in enumerate(places[n]):
            rows = slice(h * size, (h + 1) * size)
            into = slice(place * size, (place + 1) * size)
            for there, here in zip(_projections(now), _projections(was), strict=True):
                there.weight[into, :width] = here.weight[rows]
                there.bias[into] = here.bias[rows]
            now.attn.o_proj.weight[:width, into] = was.attn.o_proj.weight[:, rows]
        now.mlp.up.weight[:, :width] = was.mlp.up.weight
        now.mlp.up.bias.copy_(was.mlp.up.bias)
        now.mlp.down.weight[:width] = was.mlp.down.weight
        now.mlp.down.bias[:width] = was.mlp.down.bias
    return module


def _projections(block: PlantedBlock) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return block.attn.q_proj, block.attn.k_proj, block.attn.v_proj


def _shuffled(source: torch.Generator, module: PlantedTransformer) -> list[list[int]]:
    """Places for the heads of every block among two more."""
    config = module.config
    return [
        torch.randperm(config.num_heads + 2, generator=source)[: config.num_heads].tolist()
        for _ in range(config.num_layers)
    ]


def _with_decoys(plain: PlantedTransformer, source: torch.Generator) -> PlantedTransformer:
    """Two decoy heads in every block, and a second block of nothing else."""
    old = plain.config
    blocks = [0, *range(2, old.num_layers + 1)]
    places = _shuffled(source, plain)
    module = _grown(plain, blocks, places, more_blocks=1, unread=_UNREAD)
    size, width = old.head_dim, old.width
    taken = dict(zip(blocks, places, strict=True))
    for n in range(module.config.num_layers):
        attn, mlp = module.layer(n).attn, module.layer(n).mlp
        free = [h for h in range(module.config.num_heads) if h not in taken.get(n, [])]
        for number, h in enumerate(free):
            rows = slice(h * size, (h + 1) * size)
            for project in _projections(module.layer(n)):
                project.weight[rows] = _mixing(source, size, width + _UNREAD)
            if number % 2 and size > 1:  # values that the output projection does not let through
                attn.v_proj.weight[h * size] = 0.0
                attn.o_proj.weight[:, h * size] = _normal(source, width + _UNREAD)
            else:
                attn.o_proj.weight[width:, rows] = _mixing(source, _UNREAD, size)
        if n not in taken:
            mlp.up.weight.copy_(_mixing(source, *mlp.up.weight.shape))
            mlp.down.weight[width:] = _mixing(source, _UNREAD, module.config.mlp_width)
    return module


def _with_twins(plain: PlantedTransformer, source: torch.Generator) -> PlantedTransformer:
    """Two heads in one block, drawn at random, that cancel each other."""
    places = _shuffled(source, plain)
    module = _grown(plain, range(plain.config.num_layers), places)
    size, width = plain.config.head_dim, plain.config.width
    n = int(torch.randint(plain.config.num_layers, (), generator=source))
    first, second = (
        slice(h * size, (h + 1) * size)
        for h in range(module.config.num_heads)
        if h not in places[n]
    )
    for project in _projections(module.layer(n)):
        project.weight[first] = _normal(source, size, width)
        project.weight[second] = project.weight[first]
    write = module.layer(n).attn.o_proj.weight
    write[:, first] = _mixing(source, width, size)
    write[:, second] = -write[:, first]
    return module


def _mixing(source: torch.Generator, rows: int, columns: int) -> Tensor:
    """Random weights that keep the size of what they mix."""
    scale: float = columns**-0.5
    return _normal(source, rows, columns) * scale
