"""Wavefront sweeps: many edits of one network in one pass, each computed exactly.

A sweep asks what the output becomes when one value is replaced, for hundreds of values.
One forward pass each wastes what lies before the edit. Here the network runs once, layer
after layer, with a batch that grows: at every edited site its variants are appended, and
wherever an operator meets a value that does not hold a variant yet, the baseline's value
fills in. So every operator computes only variants whose edit lies before it, and only
operators before the wanted output run at all.

Positions are saved in the same way where the network allows it, which is tried and never
taken for granted (engine/wave_rows.py): rows before the edited position keep the
baseline's values in a causal network, and of the last operators only the row that is
asked for is computed.

The naive loop, one forward pass per edit, is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch.utils import _pytree as pytree

from patchclamp.core.errors import EngineError, nearest
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Node
from patchclamp.engine.wave_baseline import Baseline, Known
from patchclamp.engine.wave_packing import Packing, join_packed
from patchclamp.engine.wave_plan import (
    Plan,
    Scope,
    Step,
    compile_plan,
    find_rows,
    find_scope,
    mixing,
)
from patchclamp.engine.wave_rows import (
    Axes,
    Layout,
    Rows,
    is_fused,
    narrow_rows,
    repeated,
    touched_rows,
)
from patchclamp.engine.wave_rules import signature, stays_causal
from patchclamp.engine.wave_values import State, Take
from patchclamp.model.inputs import Call, principal

Variants: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""From a site's baseline value to its variants, one after the other along the batch axis."""

_MAX_KNOWN = 8
"""Sizes of calls whose plans are kept."""


@dataclass
class Wavefront:
    """The baseline of one call, and edits of it; see the module docstring.

    It holds for the weights and the call as they were when its first run was made.

    Attributes:
        engine: the captured network.
        call: the baseline's inputs.
    """

    engine: GraphEngine
    call: Call
    _expanded: frozenset[str] = frozenset()
    _graph: Graph = field(init=False, repr=False)
    _nodes: dict[str, Node] = field(init=False, repr=False)
    _known: Known = field(init=False, repr=False)
    _layout: Layout = field(init=False, repr=False)
    _baseline: Baseline = field(init=False, repr=False)
    _causal: dict[tuple[object, int], bool] = field(init=False, repr=False)
    _plans: dict[object, Plan] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_call(self.call)
        self._load(self._expanded)

    def _check_call(self, call: Call) -> None:
        problem = self.engine.serves(call)
        if problem is not None:
            raise EngineError(
                f"the graph engine cannot run this call: {problem}", hint="use engine='hooks'"
            )

    def _load(self, expanded: frozenset[str]) -> None:
        """Take the graph with these attentions written out; nothing is known of it yet."""
        self._expanded = expanded
        self._graph, self._nodes = self.engine._expanded(expanded)
        symbols = {
            name: size
            for x, dims in zip(self.call.tensors(), self.engine.capture.dims, strict=True)
            for name, size in zip(dims, x.shape, strict=True)
            if isinstance(name, str)
        }
        key = ("wavefront", expanded, *sorted(symbols.items()))
        known = self.engine.planned.get(key)
        if not isinstance(known, Known):
            while len(self.engine.planned) >= _MAX_KNOWN:
                self.engine.planned.pop(next(iter(self.engine.planned)))
            known = Known(Layout(self._graph, symbols))
            self.engine.planned[key] = known
        self._known, self._layout = known, known.layout
        self._baseline = Baseline(self.engine, self._graph, known, self.call)
        self._causal, self._plans = {}, {}

    @property
    def num_examples(self) -> int:
        """Examples of the baseline's batch."""
        return self._layout.num_examples

    @property
    def length(self) -> int:
        """Positions of the baseline; 0 where the network has no axis of varying length."""
        return self._layout.length

    # ---- names ----------------------------------------------------------------

    def _find(self, addresses: Sequence[str]) -> list[Node]:
        hidden = frozenset(self.engine._hidden[a] for a in addresses if a in self.engine._hidden)
        if not hidden <= self._expanded:
            self._load(self._expanded | hidden)
        for address in addresses:
            if address not in self._nodes:
                raise EngineError(
                    f"the graph engine has no value '{address}'",
                    nearest=nearest(address, self._nodes),
                    hint="net.coverage() lists what each engine offers",
                )
        return [self._nodes[a] for a in addresses]

    def order(self, addresses: Sequence[str]) -> list[str]:
        """Addresses in the order of the forward pass, in which `run` stacks their variants."""
        wanted = set(self._find(addresses))
        return [n.address for n in self._graph.nodes if n in wanted]

    def _output(self, address: str | None) -> Node:
        if address is not None:
            return self._find([address])[0]
        leaves = self._graph.outputs
        marks = [torch.empty(0) if isinstance(x, Node) else x for x in leaves]
        chosen = principal(pytree.tree_unflatten(marks, self._graph.out_spec))
        node = next(x for x, mark in zip(leaves, marks, strict=True) if mark is chosen)
        assert isinstance(node, Node)
        return node

    # ---- the baseline -----------------------------------------------------------

    def prepare(
        self,
        addresses: Sequence[str],
        *,
        output: str | None = None,
        position: int | None = None,
        other: Call | None = None,
    ) -> dict[str, torch.Tensor]:
        """Make ready for `run` on these sites; the baseline runs once for all of it.

        Args:
            other: a call of the same sizes that runs beside the baseline, which is cheaper
                than by itself.

        Returns:
            The raw values of the sites and the output for `other`; empty without it.
        """
        listed = self.order(addresses)
        wanted = self._output(output)  # may write out more attention: sites are looked up after
        sites = self._find(listed)
        if other is not None:
            self._check_call(other)
            self._baseline.beside(other, [*sites, wanted])
        with torch.no_grad():
            self._scope(sites, wanted, one=self._row(wanted, position) is not None)
            found = self._baseline.found()
        return {node.address: value for node, value in found.items()}

    def name(self, output: str | None) -> str:
        """Address of an output (None: the principal one)."""
        return self._output(output).address

    def base_output(self, output: str | None = None) -> torch.Tensor:
        """The baseline's value of an output (None: the principal one)."""
        return self.base(self._output(output).address)

    def at_position(self, raw: torch.Tensor, address: str | None, position: int) -> torch.Tensor:
        """One position of an output's raw value, as `run` gives it."""
        node = self._output(address)
        row, axes = self._row(node, position), self._layout.parts(node)[None]
        assert row is not None
        assert axes.row is not None
        one = narrow_rows(raw, axes, self._layout.all, Rows(row, row + 1))
        return one if axes.merged else one.select(axes.row, 0)

    def has_rows(self, address: str | None) -> bool:
        """Whether a value (None: the principal output) has positions that can be told apart."""
        node = self._output(address)
        return node.shape is not None and self._layout.has_rows(node)

    def batch_axis(self, address: str) -> int:
        """The axis along which a raw value holds its examples and variants."""
        (node,) = self._find([address])
        axis = self._layout.parts(node)[None].batch
        if axis is None:
            raise EngineError(f"'{address}' has no batch axis, so it can have no variants")
        return axis

    def bytes_per_variant(
        self,
        addresses: Sequence[str],
        *,
        output: str | None = None,
        first_row: int = 0,
        position: int | None = None,
    ) -> int:
        """Memory that each variant of a run takes at most (the baseline comes on top)."""
        listed = self.order(addresses)
        wanted = self._output(output)  # may write out more attention: sites are looked up after
        sites = self._find(listed)
        one = self._row(wanted, position)
        with torch.no_grad():
            plan = self._plan(sites, wanted, {first_row}, one=one is not None)
        return plan.bytes_per_variant(self._layout, self._rows(first_row, one))

    def _rows(self, first_row: int, one: int | None) -> tuple[Rows, ...]:
        every = self._layout.all
        single = every if one is None else Rows(one, one + 1)
        later = Rows(first_row, every.stop)
        return every, later, single, later

    def base(self, address: str) -> torch.Tensor:
        """The baseline's raw value at an address."""
        (node,) = self._find([address])
        with torch.no_grad():
            return self._baseline.value(node)

    @property
    def _device(self) -> torch.device:
        return self._baseline.device

    # ---- plans -------------------------------------------------------------------

    def _scope(self, sites: list[Node], output: Node, *, one: bool) -> Scope:
        key = (tuple(sites), output, one)
        scopes = self._known.scopes
        if key not in scopes:
            scopes[key] = find_scope(self._graph, self._layout, sites, output, one=one)
        self._baseline.prepare(key, scopes[key])
        return scopes[key]

    def _plan(
        self, sites: list[Node], output: Node, first_rows: Collection[int], *, one: bool
    ) -> Plan:
        """The plan for edits from these rows on; several rows make a packed one."""
        key = (tuple(sites), output, one)
        cuts = frozenset(first_rows)
        if (key, cuts) in self._plans:
            return self._plans[key, cuts]
        scope = self._scope(sites, output, one=one)
        known = self._known
        blocked = frozenset(
            node
            for node, edited in mixing(scope, self._layout, known.rules)
            if not all(self._stays_causal(node, edited, cut) for cut in cuts)
        )
        packed = len(cuts) > 1
        same = (key, blocked, packed)
        if same not in known.plans:
            rows = find_rows(scope, self._layout, known.rules, blocked, packed=packed)
            known.plans[same] = compile_plan(scope, self._layout, known.rules, rows)
        self._plans[key, cuts] = known.plans[same]
        return known.plans[same]

    def _stays_causal(self, node: Node, edited: Sequence[Node], cut: int) -> bool:
        """Whether rows before a cut keep their values; tried once for each mask."""
        if cut == 0:
            return True  # there is no row before it
        inputs = self._layout.inputs(node)
        name: object = node
        if is_fused(node):  # what it lets through is its mask's choice alone
            held = tuple(None if x in edited else x for x in inputs)
            name = (signature(node, self._layout), held)
        if (name, cut) not in self._causal:
            values = self._baseline.values
            read = {x: values[x] for x in inputs if x in values}
            self._causal[name, cut] = stays_causal(
                node, read, self._layout, edited, cut, self._device
            )
        return self._causal[name, cut]

    # ---- running --------------------------------------------------------------------

    def run(
        self,
        variants: Mapping[str, Variants],
        *,
        output: str | None = None,
        first_row: int | Mapping[str, Sequence[int]] = 0,
        position: int | None = None,
    ) -> torch.Tensor:
        """The output for every variant of every site.

        Args:
            variants: for each address, a function from the baseline's raw value, with B
                examples along its batch axis, to K variants of it: K*B along that axis,
                example b of variant k at k*B + b. K may be 0.
            output: address of the wanted value; None for the network's principal output.
            first_row: variants differ from the baseline only from this position on, or for
                each address a position for every variant. Rows before it are then not
                computed where the network keeps them.
            position: compute only this position of the output (negative from the end).

        Returns:
            The wanted value with the variants of all sites along its batch axis, sites in
            the order of the forward pass (`order`); without its row axis if `position` is set.

        Raises:
            EngineError: an address that the graph lacks, variants of another shape, or
                variants that differ before `first_row`.
        """
        with torch.no_grad():
            return self._run(variants, output, first_row, position)

    def _run(
        self,
        variants: Mapping[str, Variants],
        output: str | None,
        first_row: int | Mapping[str, Sequence[int]],
        position: int | None,
    ) -> torch.Tensor:
        addresses = self.order([*variants])
        wanted = self._output(output)
        sites = self._find(addresses)
        one = self._row(wanted, position)
        if isinstance(first_row, int):
            firsts, each = {first_row}, None
        else:
            each = [row for a in addresses for row in first_row[a]]
            firsts = set(each) or {0}
        for row in firsts:
            self._check_first(row)
        first = min(firsts)
        plan = self._plan(sites, wanted, firsts, one=one is not None)
        if one is not None and one < first and not plan.keeps_output:
            first, firsts = 0, {0}  # rows are mixed on the way, so that none can be left out
            plan = self._plan(sites, wanted, firsts, one=True)
        state = State(
            slots=[None] * plan.num_slots,
            rows=self._rows(first, one),
            layout=self._layout,
            values=self._baseline.filling,
            device=self._device,
        )
        if each is not None and len(firsts) > 1:
            held = each if one is None else [min(row, one) for row in each]
            state.packing = Packing(held, self.num_examples, self.length, self._device)
        early = one is not None and one < first  # the wanted row lies before every edit
        for step in plan.steps:
            value = None if early else step.compute(state)
            if step.site is not None:
                made = variants[addresses[step.site]](self._baseline.value(step.node))
                given = first if isinstance(first_row, int) else first_row[addresses[step.site]]
                value = self._appended(step, value, state, made, given)
            state.slots[step.slot] = value
            for slot in step.frees:
                state.slots[slot] = None
        source = replace(plan.output, slot=None) if early else plan.output
        made = source.get(state)
        axes = self._layout.parts(wanted)[None]
        if one is not None and not axes.merged:
            assert axes.row is not None
            return made.select(axes.row, 0)
        return made

    def _check_first(self, row: int) -> None:
        if row and not 0 <= row < max(1, self.length):
            raise EngineError(
                "the first edited position is outside the sequence",
                got=str(row),
                expected=f"0 to {self.length - 1}",
            )

    def _appended(
        self,
        step: Step,
        value: object,
        state: State,
        made: torch.Tensor,
        first_row: int | Sequence[int],
    ) -> object:
        """The batch with the variants of one site behind it; counts them."""
        assert step.site is not None
        node, layout = step.node, self._layout
        axes, base = layout.parts(node)[None], self._baseline.value(step.node)
        before = state.counts[step.site]
        num = _num_variants(made, base, axes, node.address)
        total = before + num
        state.counts.append(total)
        firsts = [first_row] * num if isinstance(first_row, int) else first_row
        if len(firsts) != num:
            raise EngineError(
                f"'{node.address}' has other variants than first positions",
                got=f"{num} variants",
                expected="one position for each",
            )
        if num and axes.row is not None:
            self._check_rows(node, made, base, firsts)
        rows, packed = state.rows[step.take], step.take is Take.PACKED and state.packing is not None
        made = narrow_rows(made, axes, layout.all, rows)
        if packed and num:
            assert state.packing is not None
            made = state.packing.packed_part(made, axes, rows, before, total)
        if before == 0:
            return made if num else None
        assert axes.batch is not None
        parts = [made] if num else []
        held = state.counts[step.reach]
        if held < before and packed:
            assert state.packing is not None
            parts.insert(0, state.packing.of_base(base, axes, held, before))
        elif held < before:
            part = narrow_rows(base, axes, layout.all, rows)
            parts.insert(0, repeated(part, axes, before - held, self.num_examples))
        if isinstance(value, torch.Tensor):
            parts.insert(0, value)
        if packed:
            return join_packed(parts, axes)
        return torch.cat(parts, axes.batch) if len(parts) > 1 else parts[0]

    def _check_rows(
        self, node: Node, made: torch.Tensor, base: torch.Tensor, firsts: Sequence[int]
    ) -> None:
        """Variants must be the baseline before their first edited row."""
        if not max(firsts):
            return
        axes, layout = self._layout.parts(node)[None], self._layout
        late = Rows(0, max(firsts))
        old = narrow_rows(base, axes, layout.all, late)
        moved = narrow_rows(made, axes, layout.all, late) != repeated(
            old, axes, len(firsts), self.num_examples
        )
        first = torch.tensor(firsts, device=moved.device).repeat_interleave(self.num_examples)
        wrong = touched_rows(moved, axes, late) & (
            torch.arange(late.stop, device=moved.device) < first[:, None]
        )
        if bool(wrong.any()):
            place = firsts[int(wrong.any(1).nonzero()[0]) // self.num_examples]
            raise EngineError(
                f"variants of '{node.address}' differ from the baseline before position "
                f"{place}, which was given as the first edited one"
            )

    def _row(self, output: Node, position: int | None) -> int | None:
        if position is None:
            return None
        if not self._layout.has_rows(output) or output.shape is None:
            raise EngineError(
                f"'{output.address}' has no positions, so none of them can be asked for",
                got=f"shape {output.shape}",
            )
        if not -self.length <= position < self.length:
            raise EngineError(
                "the wanted position is outside the sequence",
                got=str(position),
                expected=f"{-self.length} to {self.length - 1}",
            )
        return position % self.length


def _num_variants(made: torch.Tensor, base: torch.Tensor, axes: Axes, address: str) -> int:
    """How many variants there are, after checking their shape."""
    if axes.batch is None:
        raise EngineError(f"'{address}' has no batch axis, so it can have no variants")
    size = base.shape[axes.batch]
    got, expected = list(made.shape), list(base.shape)
    fits = len(got) == len(expected) and got[axes.batch] % size == 0
    if fits:
        expected[axes.batch] = got[axes.batch]
    if not fits or got != expected or made.dtype != base.dtype:
        raise EngineError(
            f"variants of '{address}' do not have the shape of its value",
            got=f"{tuple(made.shape)} {made.dtype}",
            expected=f"{tuple(base.shape)} {base.dtype}, any multiple along axis {axes.batch}",
        )
    return got[axes.batch] // size
