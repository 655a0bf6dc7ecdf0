"""A neural activation pattern: which ReLUs are on, which are off, which may be either.

A unit is active where the number that its ReLU reads is positive, and inactive elsewhere. An
input follows a pattern if every unit of the pattern is in the state that the pattern says. A
pattern is a specification of inputs that needs no reference input.

Source: Geng et al. 2023, arXiv 2210.16114.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from patchclamp.core.errors import DataError, SiteError
from patchclamp.core.findings import Json
from patchclamp.engine.ir import Kind, Node
from patchclamp.model.inputs import BATCH
from patchclamp.net import Net

ACTIVE, FREE, INACTIVE = 1, 0, -1
_RELUS = frozenset({torch.ops.aten.relu.default, torch.ops.aten.relu_.default})


@dataclass(frozen=True, eq=False)
class Pattern:
    """States of units.

    Attributes:
        states: for each site that a ReLU reads, int8 (unit): 1 active, 0 free, -1 inactive.
            Units are the elements of one example's value, in their order.
        label: the class that it was mined from, if any.
    """

    states: Mapping[str, Tensor]
    label: int | None = None

    def __post_init__(self) -> None:
        for site, states in self.states.items():
            if states.ndim != 1 or not bool(torch.isin(states, torch.tensor([-1, 0, 1])).all()):
                raise DataError(
                    f"states of '{site}' that are no pattern",
                    got=f"shape {tuple(states.shape)}, values {states.unique().tolist()[:5]}",
                    expected="(unit), each 1 for active, 0 for free or -1 for inactive",
                )

    @property
    def size(self) -> int:
        """How many units are in it."""
        return sum(int((states != FREE).sum()) for states in self.states.values())

    @property
    def num_units(self) -> int:
        """How many units its sites have."""
        return sum(len(states) for states in self.states.values())

    def held_by(self, active: Mapping[str, Tensor]) -> Tensor:
        """Which rows follow it: active, bool (row, unit) by site -> bool (row)."""
        rows = [
            ((states == FREE) | ((states == ACTIVE) == active[site])).all(1)
            for site, states in self.states.items()
        ]
        if not rows:
            raise DataError("a pattern without sites says nothing of any row")
        return reduce(torch.logical_and, rows)

    def followed(self, net: Net, inputs: object) -> Tensor:
        """Which inputs follow it in the network as it runs: bool (row)."""
        return self.held_by(active_units(net, inputs, list(self.states)))

    def clashes(self, other: Pattern) -> list[tuple[str, int]]:
        """Units that the two want in opposite states: no input follows both if there are any."""
        return [
            (site, unit)
            for site, states in self.states.items()
            if site in other.states
            for unit in (states * other.states[site] < 0).nonzero().flatten().tolist()
        ]

    def joined(self, other: Pattern) -> Pattern:
        """What an input that follows both follows. Raises DataError if they clash."""
        clash = self.clashes(other)
        if clash:
            raise DataError(
                f"patterns that clash at {len(clash)} units cannot be joined",
                got=f"unit {clash[0][1]} of '{clash[0][0]}', active in one and not in the other",
            )
        joined = dict(self.states)
        for site, states in other.states.items():
            mine = joined.get(site, torch.zeros_like(states))
            joined[site] = torch.where(states == FREE, mine, states)
        return Pattern(joined)

    # ---- as JSON ------------------------------------------------------------

    def as_json(self) -> Json:
        """A form that `from_json` reads."""
        return {
            "label": self.label,
            "sites": {
                site: {
                    "num_units": len(states),
                    "active": (states == ACTIVE).nonzero().flatten().tolist(),
                    "inactive": (states == INACTIVE).nonzero().flatten().tolist(),
                }
                for site, states in self.states.items()
            },
        }

    def to_text(self) -> str:
        """`as_json` as text."""
        return json.dumps(self.as_json())

    @classmethod
    def from_text(cls, text: str) -> Pattern:
        """What `to_text` wrote.

        Raises:
            DataError: text of another form; a unit that does not exist or is in both states.
        """
        try:
            read = json.loads(text)
            label = read["label"]
            parts = {
                str(site): (int(s["num_units"]), list(s["active"]), list(s["inactive"]))
                for site, s in read["sites"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(
                "text that is no activation pattern",
                got=f"{type(e).__name__}: {e}",
                expected='{"label": 3, "sites": {SITE: {"num_units": 8, "active": [0], '
                '"inactive": [5]}}}',
            ) from None
        return cls({site: _states(site, *part) for site, part in parts.items()}, label)


def _states(site: str, num: int, active: list[int], inactive: list[int]) -> Tensor:
    both = [*active, *inactive]
    good = all(type(unit) is int and 0 <= unit < num for unit in both)
    if not good or len(set(both)) < len(both):
        raise DataError(
            f"units of '{site}' that make no pattern",
            got=f"active {active[:5]}, inactive {inactive[:5]}",
            expected=f"whole numbers from 0 to {num - 1}, each once",
        )
    states = torch.zeros(num, dtype=torch.int8)
    states[active], states[inactive] = ACTIVE, INACTIVE
    return states


def relu_sites(net: Net) -> tuple[str, ...]:
    """Addresses of what the network's ReLUs read, in order.

    Raises:
        SiteError: the network has no ReLU. CaptureError: it cannot be captured.
    """
    nodes = net.graph.capture.graph.nodes
    read = [n.args[0] for n in nodes if n.target in _RELUS]
    found = dict.fromkeys(
        n.address for n in read if isinstance(n, Node) and n.kind is not Kind.CONST
    )
    if not found:
        raise SiteError(f"{net.name} has no ReLU, so it has no activation patterns")
    return tuple(found)


def active_units(
    net: Net, inputs: object, sites: Sequence[str], *, batch_size: int = 512
) -> dict[str, Tensor]:
    """Which units are active in the network as it runs: bool (row, unit) by site."""
    acts = net.record(inputs, list(sites), batch_size=batch_size)
    found = {}
    for site in sites:
        if acts.axes(site)[:1] != (BATCH,):
            raise SiteError(
                f"'{site}' has no batch axis in front, so its rows cannot be told apart",
                got=f"axes {acts.axes(site)}",
            )
        found[site] = acts.tensor(site).flatten(1) > 0
    return found
