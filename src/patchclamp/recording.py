"""Streaming what a network does on a whole dataset into a store on disk.

The network runs batch by batch and every shard is on disk before the next one
begins, so memory holds one batch and one shard whatever the size of the dataset.
Batches are cut at the borders of shards and counted from the first example of
each: a recording that was killed and goes on runs the very same batches as one
that was not, and so ends in the same bytes (on the same machine, with the same
number of threads).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patchclamp.core.errors import DataError, InputError, OptionError, SiteError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.core.sites import Tap
from patchclamp.data.catalogue import Kind
from patchclamp.data.dataset import Dataset
from patchclamp.model.identity import data_hash
from patchclamp.model.inputs import BATCH, LENGTH, Call, as_call
from patchclamp.model.preprocessing import prepared
from patchclamp.model.sources import Preprocessing
from patchclamp.store import Manifest, SiteSpec, Store, StoreWriter, open_store

if TYPE_CHECKING:
    from patchclamp.net import Net

MASK = "attention_mask"
"""Under this name a store says which positions of padded texts are real."""

PROBE_ROWS = 2
"""Examples that are run once to learn the shapes; nothing of them is kept."""

PADDING_TOLERANCE = 1e-5
"""How far real positions may move when the padding behind them is replaced."""


class StoredType(StrEnum):
    """How activations are stored. Whole numbers and booleans keep their own type."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@dataclass(frozen=True, kw_only=True)
class _Feed:
    """A dataset as the network takes it.

    Attributes:
        call: all examples; where `prepare` is given, before it.
        mask: (example, length), which positions are real; None without padding.
        prepare: what is done to a batch just before it runs, so that a dataset of
            small images need not fit into memory at the size the network takes.
    """

    name: str
    hash: str
    call: Call
    num_examples: int
    mask: torch.Tensor | None = None
    prepare: Callable[[Call], Call] | None = None

    def ready(self, batch: Call, device: torch.device) -> Call:
        """A batch of `call` as it is run."""
        ready = batch if self.prepare is None else self.prepare(batch)
        return ready.mapped([x.to(device) for x in ready.tensors()])


def record_to(
    net: Net,
    path: str | os.PathLike[str],
    dataset: object,
    sites: str | Iterable[str],
    *,
    dtype: StoredType | str = StoredType.FLOAT32,
    batch_size: int = 32,
    shard_examples: int = 256,
    engine: str = "auto",
    max_length: int | None = None,
    progress: Progress = SILENT,
) -> Store:
    """Record sites on every example of a dataset into a store; goes on after a kill.

    Args:
        path: a new or empty folder, or the unfinished store of the same call.
        dataset: a `Dataset`, a tensor or array of inputs, or a list of texts. Images
            of a dataset are brought into the form that the network states. Texts of
            different length are padded on the right, and the store gets an array
            `attention_mask` (example, position), true on real tokens.
        sites: addresses, aliases and globs; each value needs a batch axis.
        dtype: the type that floats are stored in. A value too large for it is refused.
        batch_size: examples in one run, at most.
        shard_examples: examples in one file.
        max_length: cut texts to this many tokens; None cuts nothing.

    Returns:
        The finished store. Of a store that is finished already nothing is run again.

    Raises:
        DataError, InputError: the data does not fit the network. SiteError: an unknown
        site, or one without a batch axis. StoreError: the folder holds something else.
        OutputError: it cannot be written; what is whole stays and can be resumed.
    """
    stored = _stored_type(dtype)
    for name, value in (("batch_size", batch_size), ("shard_examples", shard_examples)):
        _at_least_one(name, value)
    device = net.example.tensors()[0].device
    feed = _feed(net, dataset, max_length)
    taps = net.taps(sites)
    if not taps:
        raise SiteError("no sites to record", hint='net.record_to(path, data, "resid_post.*")')
    manifest = Manifest(
        sites=_probed(net, feed, taps, engine, stored),
        num_examples=feed.num_examples,
        shard_examples=shard_examples,
        dtype=stored.value,
        model_name=net.name,
        model_hash=net.hash,
        data_name=feed.name,
        data_hash=feed.hash,
        versions=_versions(),
        extra={
            "addresses": {tap.label: tap.site.address for tap in taps},
            "batch_size": batch_size,
            "engine": str(engine),
            "max_length": max_length,
        },
    )
    if feed.mask is not None and MASK not in dict(feed.call.kwargs):
        _check_padding(net, feed, taps, engine)
    with StoreWriter(Path(path), manifest, progress) as writer:
        if not writer.finished:
            for batch, mask in _batches(net, feed, writer.next_example, batch_size, shard_examples):
                arrays = _values(net, feed.ready(batch, device), taps, engine)
                if mask is not None:
                    arrays[MASK] = mask
                writer.append(arrays)
            writer.finish()
    return open_store(Path(path))


def _batches(
    net: Net, feed: _Feed, first: int, batch_size: int, shard_examples: int
) -> Iterator[tuple[Call, torch.Tensor | None]]:
    """Batches from example `first` on, which begins a shard; none crosses into the next."""
    shards = net.batches(feed.call, shard_examples)
    at = first
    for shard in islice(shards, math.ceil(first / shard_examples), None):
        size = min(shard_examples, feed.num_examples - at)
        for n, batch in enumerate(net.batches(shard, batch_size)):
            start = at + n * batch_size
            stop = min(start + batch_size, at + size)
            yield batch, None if feed.mask is None else feed.mask[start:stop]
        at += size


def _values(net: Net, batch: Call, taps: Sequence[Tap], engine: str) -> dict[str, torch.Tensor]:
    """Values of one batch by label, each with its batch axis in front."""
    acts = net.record(batch, [tap.label for tap in taps], engine=engine)
    return {tap.label: acts.tensor(tap.label).movedim(tap.axes.index(BATCH), 0) for tap in taps}


def _probed(
    net: Net, feed: _Feed, taps: Sequence[Tap], engine: str, stored: StoredType
) -> tuple[SiteSpec, ...]:
    """What each site holds for one example, seen on the first few."""
    for tap in taps:
        if BATCH not in tap.axes:
            raise SiteError(
                f"site '{tap.label}' has no batch axis and cannot be stored by example",
                got=f"axes {', '.join(tap.axes)}",
                hint="leave it out; net.record returns it",
            )
    probe = next(net.batches(feed.call, min(PROBE_ROWS, feed.num_examples)))
    values = _values(net, feed.ready(probe, net.example.tensors()[0].device), taps, engine)
    specs = []
    for tap in taps:
        value = values[tap.label]
        if value.shape[0] != min(PROBE_ROWS, feed.num_examples):
            raise SiteError(
                f"site '{tap.label}' has no one row for each example",
                got=f"{value.shape[0]} rows for {min(PROBE_ROWS, feed.num_examples)} examples",
            )
        kind = str(value.dtype).removeprefix("torch.")
        specs.append(
            SiteSpec(
                name=tap.label,
                axes=tuple(a for a in tap.axes if a != BATCH),
                shape=tuple(value.shape[1:]),
                dtype=stored.value if value.is_floating_point() else kind,
            )
        )
    if feed.mask is not None:
        shape = tuple(feed.mask.shape[1:])
        specs.append(SiteSpec(name=MASK, axes=("position",), shape=shape, dtype="bool"))
    return tuple(specs)


# ---- what is fed --------------------------------------------------------------


def _feed(net: Net, dataset: object, max_length: int | None) -> _Feed:
    """The dataset as calls of this network.

    Raises: DataError, InputError if it is empty or does not fit.
    """
    if max_length is not None:
        _at_least_one("max_length", max_length)
    if isinstance(dataset, Dataset):
        if dataset.texts and (net.tokenizer is not None or dataset.kind is Kind.TEXT):
            return _texts_feed(net, dataset.texts, max_length, dataset.name, dataset.hash)
        if dataset.kind is Kind.IMAGES and net.loaded.preprocessing is not None:
            return _images_feed(net, dataset, net.loaded.preprocessing)
        return _arrays_feed(net, dataset.inputs, dataset.name, dataset.hash)
    if isinstance(dataset, str):
        raise DataError(
            "a dataset is rows of inputs or a list of texts",
            got=f"the text {dataset[:40]!r}",
            hint=f"patchclamp.load_data({dataset[:40]!r}), or put the text in a list",
        )
    if isinstance(dataset, Sequence) and len(dataset) == 0:
        raise DataError("the dataset is empty", expected="at least one example")
    if isinstance(dataset, Sequence) and all(isinstance(text, str) for text in dataset):
        return _texts_feed(net, [str(text) for text in dataset], max_length, "texts", None)
    return _arrays_feed(net, dataset, "arrays", None)


def _arrays_feed(net: Net, inputs: object, name: str, known: str | None) -> _Feed:
    dims = net.input_dims[0]
    if BATCH not in dims:
        raise InputError(
            f"the batch of {net.name} is fixed, so a dataset cannot be run through it",
            got=f"inputs of shape {dims}",
            hint="open it with example inputs of two or more rows, if it takes them",
        )
    call = net.call(inputs)
    tensors = call.tensors()
    _check_context(net, tensors[0])
    return _Feed(
        name=name,
        hash=known if known is not None else data_hash(tensors),
        call=call,
        num_examples=tensors[0].shape[dims.index(BATCH)],
    )


def _texts_feed(
    net: Net, texts: Sequence[str], max_length: int | None, name: str, known: str | None
) -> _Feed:
    if net.tokenizer is None:
        raise InputError(
            f"{net.name} has no tokenizer and cannot take texts", hint="give token ids"
        )
    encoded = net.tokenizer.encode(list(texts), max_length=max_length)
    ids, mask = encoded["input_ids"], encoded[MASK].bool()
    _check_context(net, ids)
    padded = not bool(mask.all())
    takes_mask = MASK in inspect.signature(net.module.forward).parameters
    call = net.call({"input_ids": ids, MASK: encoded[MASK]} if padded and takes_mask else ids)
    return _Feed(
        name=name,
        hash=known if known is not None else data_hash({"input_ids": ids, MASK: mask}),
        call=call,
        num_examples=len(texts),
        mask=mask if padded else None,
    )


def _images_feed(net: Net, dataset: Dataset, form: Preprocessing) -> _Feed:
    if dataset.inputs.shape[1] != form.channels:
        raise DataError(
            f"images of '{dataset.name}' do not fit {net.name}",
            got=f"{dataset.inputs.shape[1]} channels",
            expected=str(form.channels),
        )
    call = as_call(dataset.inputs, net.loaded.call_options)
    return _Feed(
        name=dataset.name,
        hash=dataset.hash,
        call=call,
        num_examples=len(dataset),
        prepare=lambda batch: batch.mapped([prepared(batch.tensors()[0], form)]),
    )


# ---- checks -------------------------------------------------------------------


def _check_context(net: Net, ids: torch.Tensor) -> None:
    context = net.loaded.context
    if context is None or ids.is_floating_point() or ids.ndim != 2:
        return
    if ids.shape[1] > context:
        raise InputError(
            f"the longest example has more tokens than {net.name} takes",
            got=str(ids.shape[1]),
            expected=f"at most {context}",
            hint=f"cut texts with max_length={context} (--max-length {context})",
        )


def _check_padding(net: Net, feed: _Feed, taps: Sequence[Tap], engine: str) -> None:
    """Refuse padding of a network without a mask unless it moves no real position.

    A causal network passes and most others fail, and this is seen, not assumed: the
    rows with the most padding run twice, with two different tokens behind the text.
    """
    assert feed.mask is not None
    order = feed.mask.sum(1).argsort(stable=True)[:PROBE_ROWS]
    mask = feed.mask[order]
    (ids,) = (x[order] for x in feed.call.tensors())
    fill = (ids + 1) % (net.tokenizer.vocab_size if net.tokenizer is not None else 2)
    first = _values(net, feed.call.mapped([ids]), taps, engine)
    second = _values(net, feed.call.mapped([torch.where(mask, ids, fill)]), taps, engine)
    for tap in taps:
        real = _real(mask, tap, first[tap.label].ndim)
        same = torch.isclose(
            first[tap.label],
            second[tap.label],
            rtol=PADDING_TOLERANCE,
            atol=PADDING_TOLERANCE,
            equal_nan=True,
        )
        if not bool((same | ~real).all()):
            raise InputError(
                f"{net.name} takes no attention mask, and padding would change '{tap.label}'",
                got=f"texts of {int(feed.mask.sum(1).min())} to {feed.mask.shape[1]} tokens",
                expected="texts of one length",
                hint="cut the texts to the same number of tokens with max_length (--max-length)",
            )


def _real(mask: torch.Tensor, tap: Tap, ndim: int) -> torch.Tensor:
    """Where a value (batch first) belongs to real positions, along all its length axes."""
    shape = [s for a, s in zip(tap.axes, tap.shape, strict=True) if a != BATCH]
    real = torch.ones((mask.shape[0],) + (1,) * (ndim - 1), dtype=torch.bool)
    for axis, size in enumerate(shape, start=1):
        if size == LENGTH:
            view = [mask.shape[0]] + [1] * (ndim - 1)
            view[axis] = mask.shape[1]
            real = real & mask.reshape(view)
    return real


def _stored_type(dtype: StoredType | str) -> StoredType:
    if dtype not in set(StoredType):
        raise OptionError(
            f"activations cannot be stored as '{dtype}'",
            expected=f"one of {', '.join(StoredType)}",
            nearest=nearest(str(dtype), StoredType),
        )
    return StoredType(dtype)


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a whole number of at least 1", got=repr(value))


def _versions() -> dict[str, str]:
    """Packages that the values depend on, as far as they are installed."""
    found = {}
    for name in ("patchclamp", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
