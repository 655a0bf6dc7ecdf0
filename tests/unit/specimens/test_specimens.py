"""Every specimen: shapes, names, gradients, determinism, and the traps it is there for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError, SourceError
from patchclamp.specimens import BUILDERS, build
from patchclamp.specimens.spiking import Spike, SpikingNet
from patchclamp.specimens.tiny_lm import TinyLM
from patchclamp.specimens.vit import SmallViT

READERS = ("lstm", "tiny_lm")


def example(name: str, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if name in READERS:
        return torch.randint(0, 256, (batch, 20), generator=generator)
    return torch.rand(batch, 1, 8, 8, generator=generator)


def seeded(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name).eval()


@pytest.mark.parametrize("name", BUILDERS)
def test_logits_have_the_documented_shape(name: str) -> None:
    logits = seeded(name)(example(name))
    assert logits.shape == ((3, 20, 256) if name in READERS else (3, 10))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_do_not_mix(name: str) -> None:
    network, inputs = seeded(name), example(name)
    with torch.no_grad():
        together = network(inputs)
        alone = torch.cat([network(row[None]) for row in inputs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = seeded(name)
    network(example(name)).square().sum().backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("name", BUILDERS)
def test_a_call_leaves_no_state_and_repeats_exactly(name: str) -> None:
    network, inputs = seeded(name), example(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        first, second = network(inputs), network(inputs)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_seed_builds_the_same_network(name: str) -> None:
    one, two = seeded(name).state_dict(), seeded(name).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_unknown_specimen_names_the_nearest() -> None:
    with pytest.raises(SourceError, match=r"no specimen 'digits_cn'.*nearest 'digits_cnn'"):
        build("digits_cn")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"no option 'chanels'.*nearest 'channels'"):
        build("digits_cnn", chanels=[4])


def test_options_reach_the_network() -> None:
    network = build("digits_mlp", hidden=[5], num_classes=3)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_importing_the_registry_loads_no_torch() -> None:
    code = "import sys, patchclamp.specimens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tiny_lm_has_the_names_that_adapters_rely_on() -> None:
    names = {name for name, _ in seeded("tiny_lm").named_modules()}
    parts = ["norm1", "norm2", "mlp.up", "mlp.act", "mlp.down"]
    parts += [f"attn.{x}_proj" for x in "qkvo"]
    wanted = {f"blocks.{n}.{part}" for n in (0, 1) for part in parts}
    assert wanted | {"embed", "position", "norm", "unembed"} <= names


def test_tiny_lm_is_causal() -> None:
    network, inputs = seeded("tiny_lm"), example("tiny_lm")
    changed = inputs.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    with torch.no_grad():
        before, after = network(inputs), network(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax((0, 2)).min() > 0


def test_grouped_query_attention_equals_full_heads_with_copied_weights() -> None:
    torch.manual_seed(0)
    grouped = TinyLM(width=32, num_heads=4, num_kv_heads=2).eval()
    full = TinyLM(width=32, num_heads=4).eval()
    weights = grouped.state_dict()
    for key, value in weights.items():
        if "k_proj" in key or "v_proj" in key:
            heads = value.unflatten(0, (2, 8))
            weights[key] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    inputs = example("tiny_lm")
    assert (grouped.config.num_heads, grouped.config.num_kv_heads) == (4, 2)
    torch.testing.assert_close(grouped(inputs), full(inputs))


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"num_heads": 4, "num_kv_heads": 3}])
def test_heads_that_do_not_divide_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="heads do not divide"):
        TinyLM(width=32, **options)


def test_spike_is_a_step_forward_and_a_bump_backward() -> None:
    excess = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0], requires_grad=True)
    spikes = Spike.apply(excess)
    spikes.sum().backward()
    assert spikes.tolist() == [0, 0, 0, 1, 1]
    expected = 1 / (1 + 10 * excess.detach().abs()) ** 2
    torch.testing.assert_close(excess.grad, expected)


def test_spiking_gradient_reaches_the_image_through_time() -> None:
    network, images = seeded("spiking"), example("spiking").requires_grad_()
    network(images)[:, 3].sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_spiking_modules_run_once_a_step() -> None:
    network, calls = seeded("spiking"), []
    assert isinstance(network, SpikingNet)
    network.linear1.register_forward_hook(lambda *_: calls.append("linear1"))
    network.lif2.register_forward_hook(lambda *_: calls.append("lif2"))
    network(example("spiking"))
    assert calls == ["linear1", "lif2"] * network.num_steps


def test_static_image_equals_a_constant_spike_train() -> None:
    network, images = seeded("spiking"), example("spiking")
    train = images.flatten(1)[:, None].expand(-1, 8, -1)
    torch.testing.assert_close(network(images), network(train))


def test_spiking_units_fire_and_stay_silent() -> None:
    network, rates = seeded("spiking"), []
    network.get_submodule("lif1").register_forward_hook(
        lambda module, args, output: rates.append(output[0])
    )
    network(example("spiking"))
    spikes = torch.stack(rates)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


def test_resnet_calls_one_inplace_relu_twice_in_a_block() -> None:
    network, calls = seeded("resnet"), []
    act = network.get_submodule("stages.0.0.act")
    assert isinstance(act, nn.ReLU)
    assert act.inplace
    act.register_forward_hook(lambda *_: calls.append(1))
    network(example("resnet"))
    assert len(calls) == 2


def test_vit_gives_the_same_logits_on_its_fused_path() -> None:
    network, inputs = seeded("vit"), example("vit")
    assert isinstance(network, SmallViT)
    slow = network(inputs).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), slow, atol=1e-5, rtol=1e-5)


def test_vit_reads_the_class_token_only() -> None:
    network, seen = seeded("vit"), []
    network.get_submodule("norm").register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    logits = network(example("vit"))
    assert seen[0].shape == (3, 17, 32)
    torch.testing.assert_close(network.get_submodule("head")(seen[0][:, 0]), logits)
