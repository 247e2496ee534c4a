"""Import of single files of mlx-lm without its ``__init__``.

``import mlx_lm`` runs its ``__init__``, which imports transformers (1.5 to 4 s) and lowers the
process's limit on open files. The model definitions need neither. Therefore this module registers
an empty package of the same name that only knows the folder; ``mlx_lm.models.*`` then import as
usual (0.1 s). No other module of k2 imports mlx_lm.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.pip_command import pip_install


@functools.cache
def mlx_lm_folder() -> Path:
    """Register the empty package and return the folder of the installed mlx-lm.

    Raises:
        K2Error: if mlx-lm is not installed.
    """
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise K2Error("mlx-lm is not installed", pip_install("mlx-lm"))
    if "mlx_lm" not in sys.modules:
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["mlx_lm"] = package
    return Path(spec.submodule_search_locations[0])


def mlx_lm_module(name: str) -> types.ModuleType:
    """Import a file of mlx-lm by its name below the package, for instance ``models.cache``."""
    mlx_lm_folder()
    return importlib.import_module(f"mlx_lm.{name}")
