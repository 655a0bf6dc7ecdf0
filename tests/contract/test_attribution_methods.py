"""What every attribution method keeps: its contract, its seed, its examples apart, the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import InputError, PatchclampError, TargetError
from patchclamp.methods import scoring
from patchclamp.methods.attribution import METHODS, Explainer, attribute, method
from patchclamp.methods.attribution.catalogue import Kind
from patchclamp.net import Net
from tests.networks import opened
from tests.snapshots import snapshot

QUICK: dict[str, dict[str, object]] = {
    "smoothgrad": {"num_samples": 4},
    "smoothgrad_squared": {"num_samples": 4},
    "vargrad": {"num_samples": 4},
    "smooth_grad_cam_plus_plus": {"num_samples": 3},
    "integrated_gradients": {"tolerance": 0.2, "baseline": 0.5},
    "lime": {"num_samples": 64},
    "kernel_shap": {"num_samples": 64},
}
"""Options that take less time, or suit inputs between 0 and 1."""

MAPS = frozenset(n for n, e in METHODS.items() if e.kind is Kind.ACTIVATION_MAP)
ATTENTION = frozenset(n for n, e in METHODS.items() if e.kind is Kind.ATTENTION)
RECTIFIED = frozenset({"guided_backprop", "deconvnet"})

NOT_FOR: dict[str, frozenset[str]] = {
    "digits_cnn": ATTENTION,
    "vit": MAPS | RECTIFIED,
    "tiny_lm": MAPS | RECTIFIED,
}
"""Methods that have nothing to look at in a network, and have to say so."""


def how(name: str) -> Explainer:
    return method(name)(**QUICK.get(name, {}))


def examples(network: str, num: int = 3) -> tuple[Net, Tensor]:
    net, x = opened(network)
    generator = torch.Generator().manual_seed(0)
    if x.is_floating_point():
        return net, torch.rand(num, *x.shape[1:], generator=generator)
    return net, torch.randint(3, 90, (num, 9), generator=generator)


def close(a: Tensor, b: Tensor) -> None:
    """But for the rounding of other numbers of rows at a time, which the time of day sets."""
    scale = float(a.abs().max())
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale)


CASES = [(n, m) for n in NOT_FOR for m in METHODS]
SUITED = [(n, m) for n, m in CASES if m not in NOT_FOR[n]]


@pytest.mark.parametrize(("network", "name"), CASES)
def test_the_same_again_and_nothing_left_behind(network: str, name: str) -> None:
    net, x = examples(network)
    before = snapshot(net.module)
    if name in NOT_FOR[network]:
        with pytest.raises(PatchclampError) as caught:
            attribute(net, x, 2, how(name))
        assert caught.value.hint
        assert snapshot(net.module) == before
        return
    first, second = (attribute(net, x, 2, how(name)) for _ in range(2))
    assert snapshot(net.module) == before
    assert len(first.values) == 3
    assert len(first.axes) == first.values.ndim
    assert bool(torch.isfinite(first.values).all())
    assert float(first.values.abs().max()) > 0
    assert not first.values.requires_grad
    assert first.method == name
    assert first.passes.forwards > 0
    close(first.values, second.values)
    json.dumps(first.options)


@pytest.mark.parametrize(("network", "name"), SUITED)
def test_an_example_does_not_depend_on_the_others(
    network: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = examples(network)
    together = attribute(net, x, 2, how(name))
    monkeypatch.setattr(scoring, "_MOST_ROWS", 1)  # every row by itself
    alone = attribute(net, x[1:2], 2, how(name))
    close(together.values[1:2], alone.values)


class Failing:
    """A target that breaks while a method is at work."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, output: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("broken on purpose")
        return (output[:, -1] if output.ndim == 3 else output)[:, 2]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("after", [0, 2])
def test_an_exception_leaves_nothing_behind(name: str, after: int) -> None:
    network = "vit" if METHODS[name].kind is Kind.ATTENTION else "digits_cnn"
    net, x = examples(network)
    before = snapshot(net.module)
    try:
        attribute(net, x, Failing(after), how(name))
    except (RuntimeError, PatchclampError):
        pass
    else:
        assert after  # a method may be done before that
    assert snapshot(net.module) == before
    assert torch.is_grad_enabled()


def nan(net: Net, x: Tensor) -> tuple[Tensor, object]:
    x = x.clone()
    x[0].view(-1)[3] = torch.nan
    return x, 2


def no_such_class(net: Net, x: Tensor) -> tuple[Tensor, object]:
    return x, 10_000


def not_one_number(net: Net, x: Tensor) -> tuple[Tensor, object]:
    return x, lambda output: output


def wrong_shape(net: Net, x: Tensor) -> tuple[Tensor, object]:
    return x[:, :, :-1], 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("broken", [nan, no_such_class, not_one_number, wrong_shape])
def test_bad_input_is_one_clear_error(
    name: str, broken: Callable[[Net, Tensor], tuple[Tensor, object]]
) -> None:
    network = "vit" if METHODS[name].kind is Kind.ATTENTION else "digits_cnn"
    net, x = examples(network)
    given, target = broken(net, x)
    with pytest.raises((InputError, TargetError)):
        attribute(net, given, target, how(name))  # type: ignore[arg-type]  # as users may


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_is_a_contract(name: str) -> None:
    cls = method(name)
    said = "".join(c.__doc__ or "" for c in cls.__mro__ if c is not Explainer)
    for part in ("shapes", "units", "randomness", "cost", "fails when", "source:"):
        assert part in said.lower(), part
    assert cls.name == name
    assert any(c.isdigit() for c in cls.source)


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(PatchclampError, match="grad_cam"):
        method("gradcam")


def test_training_mode_warns() -> None:
    net, x = examples("digits_cnn")
    net.module.train()
    try:
        with pytest.warns(UserWarning, match="training mode"):
            attribute(net, x, 2, "gradient")
    finally:
        net.module.eval()
