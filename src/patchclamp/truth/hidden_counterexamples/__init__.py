"""Networks with hidden counterexamples: what a sound verifier may never call `unsat`.

`HiddenCounterexamples(...).run()` trains one; `write_network` and `write_property` make files of
its instances. See training.py for how and why.
"""

from patchclamp.truth.hidden_counterexamples.anatomy import Activation, Anatomy, Kind
from patchclamp.truth.hidden_counterexamples.faulty import Fault, FaultyVerifier
from patchclamp.truth.hidden_counterexamples.files import write_network, write_property
from patchclamp.truth.hidden_counterexamples.training import (
    Hidden,
    HiddenCounterexamples,
    Instance,
    Probe,
)

__all__ = [
    "Activation",
    "Anatomy",
    "Fault",
    "FaultyVerifier",
    "Hidden",
    "HiddenCounterexamples",
    "Instance",
    "Kind",
    "Probe",
    "write_network",
    "write_property",
]
