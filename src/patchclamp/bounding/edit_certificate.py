"""Can an edit change the class, for any input in a set?

The margins of the predicted class over all others are bounded twice, with and without the edit.
Where all are positive both times, the network answers with this class on the whole set, edited
or not, so the edit cannot change it. This is enough and not necessary: near a class boundary
both may change together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp.bounding.targets import Perturbed
from patchclamp.bounding.ways import Method
from patchclamp.core.errors import BoundError

if TYPE_CHECKING:
    from patchclamp.net import Edits, Net


@dataclass(frozen=True, eq=False)
class EditCertificate:
    """Whether an edit is proved unable to change the class, for each example.

    Attributes:
        certified: bool (batch,). False says nothing: neither proved nor refuted.
        classes: what the network answers at the inputs, (batch,).
        plain, edited: the least margin of that class over the set, (batch,).
        holds: what the statement holds over.
    """

    certified: Tensor
    classes: Tensor
    plain: Tensor
    edited: Tensor
    holds: str


def edit_cannot_change(
    net: Net,
    inputs: object,
    perturbed: Perturbed,
    edits: Edits,
    *,
    method: Method | str = Method.CROWN,
    dtype: str = "float64",
) -> EditCertificate:
    """Certify edits: the class stays what it is at the inputs, on the whole set, with and without.

    Shapes: for networks with logits (batch, class).
    Raises: BoundError, EditError: as `Net.bound`.
    """
    logits = net.run(inputs).output
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise BoundError(
            "an edit is certified for a network with logits (batch, class)",
            got=str(tuple(logits.shape)),
        )
    classes = logits.argmax(1)
    num = logits.shape[1]
    rows = torch.eye(num)[classes][:, None] - torch.eye(num)[None]
    others = torch.arange(num)[None] != classes[:, None]
    rows = rows[others].reshape(len(classes), num - 1, num)
    least = []
    for changes in ((), edits):
        made = net.bound(inputs, perturbed, rows=rows, method=method, edits=changes, dtype=dtype)
        least.append(made.tensors.lower.amin(1))
    certified = (least[0] > 0) & (least[1] > 0)
    return EditCertificate(certified, classes, least[0], least[1], made.holds)
