"""Streaming to a store: the values are those of net.record, and a kill leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp
from patchclamp.core.errors import (
    DataError,
    InputError,
    OptionError,
    OutputError,
    SiteError,
    StoreError,
)
from patchclamp.core.progress import Silent
from patchclamp.data import Dataset, Kind
from patchclamp.model.preprocessing import prepared
from patchclamp.model.sources import Layout, Preprocessing
from patchclamp.net import Net
from patchclamp.recording import MASK
from patchclamp.store import open_store

DRIVER = Path(__file__).with_name("recording_kill_driver.py")
TEXTS = ["call me Ishmael", "some years", "never mind how long precisely", "whale"]


@pytest.fixture(scope="module")
def cnn() -> Net:
    return patchclamp.open("digits-cnn")


@pytest.fixture(scope="module")
def lm() -> Net:
    return patchclamp.open("tiny-lm")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_values_are_those_of_record(cnn: Net, tmp_path: Path) -> None:
    data = patchclamp.load_data("digits").subset(50)
    store = cnn.record_to(
        tmp_path / "s", data, ["blocks.1", "logits"], batch_size=8, shard_examples=20
    )
    acts = cnn.record(data.inputs, ["blocks.1", "logits"])
    for name in ("blocks.1", "logits"):
        np.testing.assert_allclose(store[name].values, acts[name].values, rtol=1e-5, atol=1e-5)
        assert store[name].dims == ("example", *acts[name].dims[1:])
    manifest = store.manifest
    assert [shard.count for shard in store.shards] == [20, 20, 10]
    assert (manifest.model_hash, manifest.data_hash) == (cnn.hash, data.hash)
    assert (manifest.model_name, manifest.data_name) == ("digits-cnn", "digits")
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.extra["addresses"] == {"blocks.1": "blocks.1", "logits": ":output"}
    store.verify()


def test_half_precision_is_stored_rounded(cnn: Net, tmp_path: Path) -> None:
    x = patchclamp.load_data("digits").inputs[:5]
    store = cnn.record_to(tmp_path / "s", x, "logits", dtype="float16")
    exact = cnn.record(x, "logits")["logits"].values
    assert store["logits"].dtype == np.float16
    np.testing.assert_array_equal(store["logits"].values, exact.astype(np.float16))


def test_sites_of_the_graph_engine(lm: Net, tmp_path: Path) -> None:
    ids = patchclamp.load_data("induction").inputs[:5, :16]
    store = lm.record_to(tmp_path / "s", ids, "attn.1.pattern", batch_size=2, shard_examples=3)
    assert store["attn.1.pattern"].dims == ("example", "head", "query", "key")
    np.testing.assert_allclose(store["attn.1.pattern"].sum("key").values, 1.0, atol=1e-5)
    expected = lm.record(ids, "attn.1.pattern")["attn.1.pattern"].values
    np.testing.assert_allclose(store["attn.1.pattern"].values, expected, atol=1e-5)


def test_texts_of_different_length_bring_their_mask(lm: Net, tmp_path: Path) -> None:
    store = lm.record_to(tmp_path / "s", TEXTS, "resid_post.1", batch_size=3)
    mask = store[MASK].values
    assert mask.dtype == np.bool_
    assert mask.sum(1).tolist() == [len(text) for text in TEXTS]
    for row, text in enumerate(TEXTS):
        alone = lm.record([text], "resid_post.1")["resid_post.1"].values[0]
        real = store["resid_post.1"].values[row][mask[row]]
        np.testing.assert_allclose(real, alone, rtol=1e-4, atol=1e-4)


def test_texts_of_one_length_have_no_mask(lm: Net, tmp_path: Path) -> None:
    store = lm.record_to(tmp_path / "s", TEXTS, "resid_post.1", max_length=5)
    assert MASK not in store
    assert store["resid_post.1"].sizes["position"] == 5


class TwoWay(nn.Module):
    """Every position sees every other, and there is no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        mixed: torch.Tensor = self.mix(x + x.mean(1, keepdim=True))
        return mixed


def test_padding_that_would_change_values_is_refused(lm: Net, tmp_path: Path) -> None:
    net = patchclamp.open(TwoWay().eval(), torch.randint(256, (2, 6)))
    net.loaded = replace(net.loaded, tokenizer=lm.tokenizer)
    with pytest.raises(InputError, match=r"padding would change 'mix'.*max_length"):
        net.record_to(tmp_path / "s", TEXTS, "mix")
    assert not (tmp_path / "s").exists()
    store = net.record_to(tmp_path / "s", TEXTS, "embed")  # each position on its own
    assert MASK in store


def test_images_are_brought_into_the_form_of_the_network(tmp_path: Path) -> None:
    form = Preprocessing(
        layout=Layout.CHANNELS_LAST,
        channels=1,
        height=4,
        width=4,
        crop=0.5,
        scale=255.0,
        mean=(127.0,),
        std=(128.0,),
    )
    net = patchclamp.open(nn.Flatten(), torch.zeros(2, 4, 4, 1))
    net.loaded = replace(net.loaded, preprocessing=form)
    images = patchclamp.load_data("digits").subset(6)
    store = net.record_to(tmp_path / "s", images, ":output", batch_size=4)
    centre = (images.inputs[:, 0, 2:6, 2:6] * 255 - 127) / 128
    np.testing.assert_allclose(store[":output"].values, centre.flatten(1).numpy(), rtol=1e-6)


def test_a_plain_image_keeps_its_value_through_resizing() -> None:
    form = Preprocessing(channels=3, height=7, width=7, crop=0.875, mean=(0.5,) * 3, std=(0.5,) * 3)
    made = prepared(torch.full((2, 3, 5, 9), 0.75), form)
    assert made.shape == (2, 3, 7, 7)
    torch.testing.assert_close(made, torch.full_like(made, 0.5))


def test_images_with_other_channels_are_refused(cnn: Net, tmp_path: Path) -> None:
    colour = Dataset(
        name="colour",
        inputs=torch.rand(2, 3, 8, 8),
        split="test",
        licence="none",
        description="",
        kind=Kind.IMAGES,
    )
    with pytest.raises(DataError, match=r"do not fit digits-cnn; got 3 channels; expected 1"):
        cnn.record_to(tmp_path / "s", colour, "logits")


def test_a_finished_store_is_not_recorded_again(cnn: Net, tmp_path: Path) -> None:
    x = patchclamp.load_data("digits").inputs[:9]
    cnn.record_to(tmp_path / "s", x, "logits", batch_size=3)
    before = files(tmp_path / "s")
    rows = []

    class Watch(Silent):
        def advance(self, amount: int = 1) -> None:
            rows.append(amount)

    cnn.record_to(tmp_path / "s", x, "logits", batch_size=3, progress=Watch())
    assert rows == []
    assert files(tmp_path / "s") == before
    with pytest.raises(StoreError, match="another job"):
        cnn.record_to(tmp_path / "s", x[:8], "logits", batch_size=3)


def test_batches_are_cut_at_shards_also_after_a_stop(cnn: Net, tmp_path: Path) -> None:
    x = patchclamp.load_data("digits").inputs[:40]
    sizes: list[int] = []
    handle = cnn.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    class Stop(Silent):
        left = 4

        def advance(self, amount: int = 1) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    options = {"batch_size": 7, "shard_examples": 16}
    try:
        with pytest.raises(KeyboardInterrupt):
            cnn.record_to(tmp_path / "s", x, "logits", progress=Stop(), **options)
        cnn.record_to(tmp_path / "s", x, "logits", **options)
    finally:
        handle.remove()
    probe, first = 2, [7, 7, 2, 7]  # stopped in the second shard, which is run again from its start
    assert sizes == [probe, *first, probe, 7, 7, 2, 7, 1]


@pytest.mark.parametrize("after", [1, 2, 4, 6])
def test_an_interrupted_recording_goes_on_to_the_same_bytes(
    cnn: Net, tmp_path: Path, after: int
) -> None:
    x = patchclamp.load_data("digits").inputs[:40]
    options = {"batch_size": 7, "shard_examples": 16}
    cnn.record_to(tmp_path / "whole", x, "blocks.*.conv", **options)

    class Stop(Silent):
        left = after

        def advance(self, amount: int = 1) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cnn.record_to(tmp_path / "s", x, "blocks.*.conv", progress=Stop(), **options)
    cnn.record_to(tmp_path / "s", x, "blocks.*.conv", **options)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_ten_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), "10", "0"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    whole = files(tmp_path / "whole")
    shards = {f"shard-{index:05d}.safetensors" for index in range(18)}
    assert set(whole) == {"manifest.json", *shards}
    assert result["kills"] == 10
    assert any(0 < num < 18 for num in result["recorded"]), "no kill fell into the middle"
    for number in range(1, result["runs"] + 1):
        assert files(tmp_path / f"run{number}") == whole


def test_a_flipped_byte_is_reported_by_shard(cnn: Net, tmp_path: Path) -> None:
    x = patchclamp.load_data("digits").inputs[:9]
    cnn.record_to(tmp_path / "s", x, "logits", shard_examples=3)
    shard = tmp_path / "s" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged: 'shard-00001\.safetensors' has"):
        open_store(tmp_path / "s").verify()


def test_what_cannot_be_recorded_leaves_no_folder(cnn: Net, lm: Net, tmp_path: Path) -> None:
    x = patchclamp.load_data("digits").inputs[:4]
    place = tmp_path / "s"
    with pytest.raises(SiteError, match=r"nearest 'blocks\.1'"):
        cnn.record_to(place, x, "blcks.1")
    with pytest.raises(SiteError, match="'position' has no batch axis"):
        lm.record_to(place, TEXTS, "position")
    with pytest.raises(SiteError, match="no sites"):
        cnn.record_to(place, x, [])
    with pytest.raises(OptionError, match=r"'float61'.*nearest 'float16'"):
        cnn.record_to(place, x, "logits", dtype="float61")
    with pytest.raises(OptionError, match="batch_size must be"):
        cnn.record_to(place, x, "logits", batch_size=0)
    with pytest.raises(OptionError, match="shard_examples must be"):
        cnn.record_to(place, x, "logits", shard_examples=-1)
    with pytest.raises(DataError, match="empty"):
        cnn.record_to(place, [], "logits")
    with pytest.raises(InputError, match="no tokenizer"):
        cnn.record_to(place, TEXTS, "logits")
    with pytest.raises(InputError, match="NaN or infinity"):
        cnn.record_to(place, torch.full_like(x, float("nan")), "logits")
    with pytest.raises(InputError, match="wrong shape"):
        cnn.record_to(place, x[:, :, :7], "logits")
    with pytest.raises(DataError, match="list of texts"):
        lm.record_to(place, "one text", "logits")
    with pytest.raises(InputError, match=r"more tokens than tiny-lm takes.*--max-length"):
        lm.record_to(place, ["a" * 2000, "b"], "logits")
    assert not place.exists()


def test_a_place_that_cannot_be_written_is_an_output_error(cnn: Net, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    x = patchclamp.load_data("digits").inputs[:4]
    with pytest.raises((OutputError, StoreError)):
        cnn.record_to(tmp_path / "file" / "s", x, "logits")
    with pytest.raises(StoreError, match="is a file"):
        cnn.record_to(tmp_path / "file", x, "logits")
    assert (tmp_path / "file").read_text() == "taken"
