"""Rows of a metric under edits: what low-rank compression and repair share.

Higher is better (the logit of the right answer over that of a wrong one), so a row above
0 is answered correctly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.edits import Edit
from patchclamp.engine.targets import Metric, measured
from patchclamp.net import Net


def metric_rows(
    net: Net, inputs: object, metric: Metric, edits: Sequence[Edit] = ()
) -> Float[Tensor, "row"]:
    """The metric of every row, all rows in one forward pass.

    Raises:
        TargetError: the metric does not give one finite number a row.
    """
    output = net.run(inputs, edits=list(edits)).output
    return measured(metric, output, torch.arange(output.shape[0])).detach()
