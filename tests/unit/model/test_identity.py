"""One hash for one network and one data set, another for any other."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from patchclamp.core.errors import InputError, SourceError
from patchclamp.model.identity import data_hash, model_hash


def make(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def test_equal_networks_have_one_hash_whatever_their_mode_and_memory_order() -> None:
    a, b = make().eval(), make().train()
    b[0].weight.data = b[0].weight.data.t().contiguous().t()
    b[0].weight.requires_grad_(False)
    assert not b[0].weight.is_contiguous()
    assert model_hash(a) == model_hash(b)
    assert len(model_hash(a)) == 64


@pytest.mark.parametrize("change", ["bit", "buffer", "name", "class", "dtype", "shape"])
def test_any_difference_changes_the_hash(change: str) -> None:
    a, b = make(), make()
    if change == "bit":
        b[2].weight.data[1, 3] = torch.nextafter(b[2].weight.data[1, 3], torch.tensor(9.0))
    elif change == "buffer":
        b[1].running_var[0] += 1e-6
    elif change == "name":
        b = nn.Sequential(*(make()[i] for i in range(3)), nn.Identity())
    elif change == "class":
        a.append(nn.ReLU())
        b.append(nn.Tanh())
    elif change == "dtype":
        a[0].weight.data = a[0].weight.data.half()
        b[0].weight.data = a[0].weight.data.view(torch.bfloat16)
    else:
        b[0].weight.data = b[0].weight.data.reshape(3, 4)
    assert model_hash(a) != model_hash(b)


def test_transposed_square_weights_differ() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.load_state_dict({"weight": a.weight.detach().t(), "bias": a.bias.detach()})
    assert model_hash(a) != model_hash(b)


def test_tied_weights_hash_like_equal_untied_ones() -> None:
    tied, untied = make(), make()
    tied.append(nn.Linear(4, 2, bias=False))
    tied[3].weight = tied[2].weight
    untied.append(nn.Linear(4, 2, bias=False))
    untied[3].weight.data = untied[2].weight.data.clone()
    assert model_hash(tied) == model_hash(untied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.bool])
def test_every_dtype_and_zero_sizes_can_be_hashed(dtype: torch.dtype) -> None:
    net = nn.Module()
    net.register_buffer("x", torch.tensor([0, 1, 1]).to(dtype))
    net.register_buffer("none", torch.empty(0, 3, dtype=dtype))
    net.register_buffer("scalar", torch.tensor(1).to(dtype))
    first = model_hash(net)
    net.x[0] = 1
    assert model_hash(net) != first


def test_conjugate_views_are_hashed_by_value() -> None:
    x = torch.tensor([[1 + 2j, 3 - 1j]])
    assert data_hash([x.conj()]) == data_hash([x.conj().resolve_conj()])
    assert data_hash([x.conj()]) != data_hash([x])


def test_large_tensors_in_another_memory_order_go_by_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.arange(60.0).reshape(5, 12)
    monkeypatch.setattr("patchclamp.model.identity.CHUNK_BYTES", 40)
    assert data_hash([x.t()]) == data_hash([x.t().contiguous()])


def test_hashing_leaves_the_network_as_it_was() -> None:
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    model_hash(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_weights_without_data_are_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"entry 'bias'.*meta device.*hint:"):
        model_hash(nn.Linear(2, 2, device="meta"))


def test_sparse_entries_are_refused() -> None:
    net = nn.Module()
    net.register_buffer("x", torch.eye(2).to_sparse())
    with pytest.raises(SourceError, match=r"'x'.*cannot be hashed"):
        model_hash(net)


def test_the_code_of_a_graph_module_counts() -> None:
    def plus(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def minus(x: torch.Tensor) -> torch.Tensor:
        return x - 1

    assert model_hash(fx.symbolic_trace(plus)) != model_hash(fx.symbolic_trace(minus))


class Counting(nn.Module):
    """A module with state beside its tensors."""

    def __init__(self, state: object) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_extra_state_counts_or_is_refused() -> None:
    assert model_hash(Counting({"a": 1})) != model_hash(Counting({"a": 2}))
    assert model_hash(Counting(b"a")) != model_hash(Counting(b"b"))
    with pytest.raises(SourceError, match="cannot be hashed"):
        model_hash(Counting(object()))


def test_data_hash_sees_order_names_shapes_and_values() -> None:
    a, b = torch.arange(4), torch.arange(4.0)
    hashes = [
        data_hash([a, b]),
        data_hash([b, a]),
        data_hash({"x": a, "y": b}),
        data_hash({"x": b, "y": a}),
        data_hash([a.reshape(2, 2), b]),
        data_hash([a]),
        data_hash([]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert data_hash({"x": a, "y": b}) == data_hash({"y": b, "x": a})
    assert data_hash(a) == data_hash([a])


def test_data_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="'0' is not a tensor"):
        data_hash(["text"])  # type: ignore[list-item]
