"""Addresses, views, aliases, globs and the printed tree."""

from __future__ import annotations

import pytest
import torch

from patchclamp.core.errors import SiteError
from patchclamp.core.sites import WHOLE, Alias, Site, SiteTable, View, matches


def site(address: str, *, module: str = "", operation: str = "output", order: int = 0) -> Site:
    return Site(
        address=address,
        module=module or address,
        operation=operation,
        axes=("batch", "position", "unit"),
        shape=("batch", "length", 12),
        dtype="float32",
        parameters=156 if operation == "output" else 0,
        engines=frozenset({"hooks"}),
        order=order,
    )


TABLE = SiteTable(
    "toy",
    {
        "layers.0": site("layers.0"),
        "layers.0.mlp": site("layers.0.mlp", order=1),
        "layers.0.mlp:input": site("layers.0.mlp:input", module="layers.0.mlp", operation="input"),
        "layers.0.mlp:gelu": site("layers.0.mlp:gelu", module="layers.0.mlp", operation="gelu"),
        "layers.2": site("layers.2", order=4),
        "layers.10": site("layers.10", order=3),
    },
    {
        "resid_post.0": Alias(
            name="resid_post.0", address="layers.0", axes=("batch", "position", "unit")
        ),
        "attn.0.q": Alias(
            name="attn.0.q",
            address="layers.0.mlp",
            axes=("batch", "position", "head", "unit"),
            view=View(narrow=(2, 4, 8), split=(2, 2, 4)),
        ),
    },
    {"attn.0.pattern": "it needs the graph engine"},
)


def test_an_alias_resolves_to_its_raw_site_seen_through_its_view() -> None:
    tap = TABLE["attn.0.q"]
    assert tap.site.address == "layers.0.mlp"
    assert tap.axes == ("batch", "position", "head", "unit")
    assert tap.shape == ("batch", "length", 2, 4)
    assert tap.unit_axis == "unit"
    assert TABLE["layers.0"].view == WHOLE


def test_an_unknown_site_names_the_nearest_and_a_way_out() -> None:
    with pytest.raises(SiteError) as caught:
        TABLE["layers.0.mpl"]
    assert caught.value.nearest == "layers.0.mlp"
    assert "no site 'layers.0.mpl' in toy (6 sites, 2 aliases)" in str(caught.value)
    assert "hint: patchclamp sites MODEL" in str(caught.value)


def test_a_missing_site_says_why_it_is_missing() -> None:
    with pytest.raises(SiteError, match="not available: it needs the graph engine"):
        TABLE["attn.0.pattern"]


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SiteError, match=r"no site matches 'resid_past\.\*'") as caught:
        TABLE.find("resid_past.*")
    assert caught.value.nearest == "resid_post.0"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.*", "layers.0.mlp", True),
        ("layers.*", "layers.0.mlp:gelu", False),
        ("layers.*:*", "layers.0.mlp:gelu", True),
        ("layers.?", "layers.10", False),
        ("lstm[1]", "lstm[1]", True),
        ("lstm[1]", "lstm1", False),
        ("*", "a.b", True),
        ("l.b", "lxb", False),
    ],
)
def test_globs(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_aliases_win_where_they_match_and_each_tap_comes_once() -> None:
    assert [t.label for t in TABLE.find("*.0")] == ["resid_post.0"]
    assert [t.label for t in TABLE.find("layers.?")] == ["layers.0", "layers.2"]
    both = TABLE.resolve(["layers.0", "layers.*", "layers.0"])
    assert [t.label for t in both] == ["layers.0", "layers.0.mlp", "layers.2", "layers.10"]
    assert TABLE.aliases_of("layers.0") == ["resid_post.0"]
    assert "resid_post.0" in TABLE
    assert "layers.0" in TABLE
    assert "attn.0.pattern" not in TABLE
    assert len(TABLE) == 6


def test_the_tree_sorts_numbers_as_numbers_and_puts_inputs_before_outputs() -> None:
    lines = str(TABLE).splitlines()
    addresses = [line.split()[0] for line in lines[1:]]
    assert addresses == [
        "layers.0",
        "layers.0.mlp:input",
        "layers.0.mlp",
        "layers.0.mlp:gelu",
        "layers.2",
        "layers.10",
    ]
    assert lines[0] == "toy: 6 sites, 2 aliases"
    assert "(batch, position=length, unit=12) float32  156 parameters  = resid_post.0" in lines[1]


def test_a_view_reads_a_part_and_writes_only_that_part() -> None:
    raw = torch.arange(24.0).reshape(2, 12)
    view = View(narrow=(1, 4, 6), split=(1, 3, 2))
    part = view.read(raw)
    assert part.shape == (2, 3, 2)
    assert part[1, 2, 1] == raw[1, 9]
    made = view.write(raw, torch.zeros_like(part))
    assert made[:, 4:10].eq(0).all()
    assert torch.equal(made[:, :4], raw[:, :4])
    assert torch.equal(made[:, 10:], raw[:, 10:])
    assert raw[1, 9] == 21, "the argument is left as it was"


def test_gradients_flow_to_the_value_and_to_the_written_part() -> None:
    raw = torch.ones(2, 6, requires_grad=True)
    part = torch.ones(2, 2, requires_grad=True)
    View(narrow=(1, 2, 2)).write(raw, part).sum().backward()
    assert raw.grad is not None
    assert part.grad is not None
    assert raw.grad[0].tolist() == [1, 1, 0, 0, 1, 1]
    assert part.grad.eq(1).all()


@pytest.mark.parametrize(
    ("view", "shape", "expected"),
    [
        (View(split=(2, 4, -1)), ("batch", "length", 12), ("batch", "length", 4, 3)),
        (View(split=(2, -1, 3)), ("batch", "length", 12), ("batch", "length", 4, 3)),
        (View(split=(0, -1, 4)), ("4*batch", 3, 3), ("batch", 4, 3, 3)),
        (View(split=(0, -1, 4)), ("8*batch", 3, 3), ("2*batch", 4, 3, 3)),
        (View(narrow=(1, 0, 5)), ("batch", 12), ("batch", 5)),
    ],
)
def test_symbolic_shapes_of_views(
    view: View, shape: tuple[int | str, ...], expected: tuple[int | str, ...]
) -> None:
    assert view.shape(shape) == expected
