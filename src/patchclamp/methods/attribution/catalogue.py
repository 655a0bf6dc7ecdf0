"""All attribution methods by name, and one call for each of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import StrEnum

from patchclamp.core.errors import OptionError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.net import Net


class Kind(StrEnum):
    """How a method comes by its map."""

    GRADIENT = "gradient"
    RELEVANCE = "relevance"
    ACTIVATION_MAP = "activation map"
    PERTURBATION = "perturbation"
    ATTENTION = "attention"


@dataclass(frozen=True)
class Entry:
    """Where a method is, and what kind it is of."""

    module: str
    cls: str
    kind: Kind


METHODS: dict[str, Entry] = {
    "gradient": Entry("gradients.plain", "Gradient", Kind.GRADIENT),
    "gradient_times_value": Entry("gradients.plain", "GradientTimesValue", Kind.GRADIENT),
    "integrated_gradients": Entry("gradients.integrated", "IntegratedGradients", Kind.GRADIENT),
    "smoothgrad": Entry("gradients.smooth", "SmoothGrad", Kind.GRADIENT),
    "smoothgrad_squared": Entry("gradients.smooth", "SmoothGradSquared", Kind.GRADIENT),
    "vargrad": Entry("gradients.smooth", "VarGrad", Kind.GRADIENT),
    "deep_lift": Entry("relevance.deep_lift", "DeepLift", Kind.RELEVANCE),
    "lrp": Entry("relevance.lrp", "LRP", Kind.RELEVANCE),
    "guided_backprop": Entry("relevance.guided", "GuidedBackprop", Kind.RELEVANCE),
    "deconvnet": Entry("relevance.guided", "DeconvNet", Kind.RELEVANCE),
    "grad_cam": Entry("cam.grad_cam", "GradCAM", Kind.ACTIVATION_MAP),
    "grad_cam_plus_plus": Entry("cam.grad_cam", "GradCAMPlusPlus", Kind.ACTIVATION_MAP),
    "smooth_grad_cam_plus_plus": Entry(
        "cam.grad_cam", "SmoothGradCAMPlusPlus", Kind.ACTIVATION_MAP
    ),
    "score_cam": Entry("cam.score_cam", "ScoreCAM", Kind.ACTIVATION_MAP),
    "cf_cam": Entry("cam.cf_cam", "CFCAM", Kind.ACTIVATION_MAP),
    "occlusion": Entry("perturbation.occlusion", "Occlusion", Kind.PERTURBATION),
    "lime": Entry("perturbation.lime", "Lime", Kind.PERTURBATION),
    "kernel_shap": Entry("perturbation.kernel_shap", "KernelShap", Kind.PERTURBATION),
    "attention_rollout": Entry("relevance.attention", "AttentionRollout", Kind.ATTENTION),
    "attention_relevance": Entry("relevance.attention", "AttentionRelevance", Kind.ATTENTION),
}


def method(name: str) -> type[Explainer]:
    """The class of a method, whose fields are its options.

    Raises:
        OptionError: no such method.
    """
    if name not in METHODS:
        raise OptionError(
            f"no attribution method '{name}'",
            expected=f"one of {', '.join(METHODS)}",
            nearest=nearest(name, METHODS),
        )
    entry = METHODS[name]
    module = importlib.import_module(f"patchclamp.methods.attribution.{entry.module}")
    found: type[Explainer] = getattr(module, entry.cls)
    return found


def attribute(
    net: Net,
    inputs: object,
    target: Metric | Target,
    how: str | Explainer = "integrated_gradients",
    *,
    at: str | None = None,
    progress: Progress = SILENT,
) -> Attribution:
    """What the target's score is laid to, by one method.

    Args:
        inputs: as for `Net.run`.
        target: a class (one, or one for each example), or a function of the principal output
            that gives one scalar per row.
        how: a method with its options, or a name of `METHODS`, with the default ones.
        at: "input" or a site; by default what suits the method.

    Raises:
        OptionError, InputError, SiteError, TargetError: before anything is measured.
    """
    chosen = method(how)() if isinstance(how, str) else how
    return chosen.run(net, inputs, target, at=at, progress=progress)
