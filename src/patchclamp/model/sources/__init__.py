"""Opening a network from anywhere: a module, a folder, a file or a name.

One file for each kind of source; `dispatch` chooses. Files are data: nothing in
a file of weights is run unless it was asked for by name. Importing this package
loads no torch.
"""

from patchclamp.model.sources.catalogue import CatalogueEntry, catalogue
from patchclamp.model.sources.dispatch import load
from patchclamp.model.sources.loaded import Layout, Loaded, Preprocessing, Task

__all__ = ["CatalogueEntry", "Layout", "Loaded", "Preprocessing", "Task", "catalogue", "load"]
