"""The residual stream between attention and MLP: an edit of it reaches the norm and the skip."""

from __future__ import annotations

import torch

import patchclamp
from patchclamp import edits


def test_zeroing_resid_mid_leaves_only_what_the_mlp_adds() -> None:
    net = patchclamp.open("tiny-lm")
    ids = torch.randint(97, 122, (2, 12), generator=torch.Generator().manual_seed(0))
    acts = net.run(
        ids, edits=edits.zero("resid_mid.0"), record=["resid_mid.0", "resid_post.0", "mlp.0.out"]
    ).acts
    assert float(acts.tensor("resid_mid.0").abs().max()) == 0
    assert torch.equal(acts.tensor("resid_post.0"), acts.tensor("mlp.0.out"))


def test_patching_resid_mid_makes_the_other_run() -> None:
    net = patchclamp.open("tiny-lm")
    generator = torch.Generator().manual_seed(1)
    clean, other = (torch.randint(97, 122, (1, 12), generator=generator) for _ in range(2))
    theirs = net.run(other, record="resid_mid.1")
    patched = net.run(clean, edits=edits.patch("resid_mid.1", theirs.acts["resid_mid.1"]))
    assert torch.equal(patched.output, theirs.output)
    assert not torch.allclose(patched.output, net.run(clean).output, atol=1e-2)
