"""The programs that are compiled into planted circuits, by theme.

Each is a function that makes the expression; the line that documents it says what the
network computes. `PROGRAMS` lists them all under their names.
"""

from patchclamp.core.errors import OptionError, nearest
from patchclamp.truth.planted_circuit import PlantedCircuit
from patchclamp.truth.rasp.planting import plant
from patchclamp.truth.rasp.programs import counting, matching, order, positions
from patchclamp.truth.rasp.programs.registry import PROGRAMS

__all__ = ["PROGRAMS", "compiled", "counting", "matching", "order", "positions"]


def compiled(name: str, seed: int = 0, num_pairs: int = 24) -> PlantedCircuit:
    """The planted circuit of the program `name`.

    Randomness: the pairs, by `seed`. Cost: under a tenth of a second.

    Raises:
        OptionError: there is no such program.
    """
    if name not in PROGRAMS:
        raise OptionError(
            f"no program '{name}' among {len(PROGRAMS)}", nearest=nearest(name, PROGRAMS)
        )
    return plant(PROGRAMS[name], seed=seed, num_pairs=num_pairs)
