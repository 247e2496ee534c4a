"""mlx-lm's model classes, found and imported without the rest of mlx-lm.

``import mlx_lm`` runs its ``__init__``, which imports transformers (1.5 to 4 s) and lowers the
process's limit on open files. The model definitions need neither. So a bare package of the same
name is registered that only knows the folder; ``mlx_lm.models.*`` then import as usual (0.1 s).
The table of renamed model types lives in mlx-lm's ``utils.py``; it is read as a literal from the
source, so that it is never a copy that can grow old.

This is the only module of k2 that names mlx_lm.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error, UsageError

MODEL_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a model's own code raises when a config, a back end or a cut is not what it expects."""

_CLASSES = ("Model", "ModelArgs")
"""What every file of an architecture has; loading takes them by these names."""


@functools.cache
def _package_folder() -> Path:
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise K2Error("mlx-lm is not installed", "pip install k2cli")
    if "mlx_lm" not in sys.modules:
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["mlx_lm"] = package
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _literals(name: str) -> dict[Any, Any]:
    """A module-level dict literal of mlx-lm's ``utils.py``, without running that module.

    Only the assignment is parsed, from its name at the start of a line to its closing brace at the
    start of a line: the whole file takes 40 ms in every process of a run.
    """
    source = (_package_folder() / "utils.py").read_text(encoding="utf-8")
    found = re.search(rf"^{name}\b[^=\n]*= (\{{.*?^\}})", source, re.MULTILINE | re.DOTALL)
    value = ast.literal_eval(found[1] if found else _assigned(source, name))
    assert isinstance(value, dict)
    return value


def _assigned(source: str, name: str) -> ast.expr:
    """What a module assigns to a name, however it is written; an empty dict if nothing."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            return node.value
    return ast.Dict([], [])


def models_module(name: str) -> types.ModuleType:
    """``mlx_lm.models.<name>``, for instance ``cache`` or ``base``."""
    _package_folder()
    return importlib.import_module(f"mlx_lm.models.{name}")


def module_name(config: Mapping[str, Any]) -> str:
    """The file in mlx-lm's ``models`` folder that a config's model type belongs to.

    Raises:
        UsageError: if the config names no model type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UsageError(f"config.json has model_type {model_type!r}, expected a name")
    architectures = config.get("architectures") or ()
    if isinstance(architectures, str):
        architectures = (architectures,)
    if not isinstance(architectures, list | tuple) or not all(
        isinstance(each, str) for each in architectures
    ):
        raise UsageError("config.json: architectures must be a list of names")
    by_architecture = _literals("MODEL_ARCHITECTURE_REMAPPING")
    for architecture in architectures:
        if (model_type, architecture) in by_architecture:
            return str(by_architecture[(model_type, architecture)])
    return str(_literals("MODEL_REMAPPING").get(model_type, model_type))


def supported_model_types() -> list[str]:
    """Every model type that mlx-lm has a class for, sorted. Nothing is imported."""
    folder = _package_folder() / "models"
    defining = {path.stem for path in folder.glob("*.py") if _defines_model(path)}
    renamed = {old for old, new in _literals("MODEL_REMAPPING").items() if new in defining}
    return sorted(defining | renamed)


def _defines_model(path: Path) -> bool:
    """Whether a file of the folder is a model's: helpers lie beside them."""
    source = path.read_text(encoding="utf-8")
    return all(f"class {name}" in source or f" {name}\n" in source for name in _CLASSES)


def model_classes(config: Mapping[str, Any]) -> tuple[type[Any], type[Any]]:
    """The ``Model`` and ``ModelArgs`` classes for a config.

    Raises:
        UsageError: if mlx-lm has no such model type.
    """
    name = module_name(config)
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UsageError(f"config.json has model_type '{config['model_type']}', which is no name")
    path = _package_folder() / "models" / f"{name}.py"
    if path.is_file():
        module = _imported(name)
        if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
            return module.Model, module.ModelArgs
    raise UsageError(
        f"model_type '{config['model_type']}' is not one that the installed mlx-lm can run",
        "pip install -U mlx-lm, or choose a model of a supported architecture",
    )


def _imported(name: str) -> types.ModuleType:
    """The module of an architecture, or why it cannot be had.

    Some need a package that mlx-lm does not install; olmo's even prints so and exits.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            return models_module(name)
    except (ImportError, SystemExit) as error:
        reason = told.getvalue().strip() or str(error)
        raise UsageError(
            f"mlx-lm's {name} model needs a package that is not installed here; "
            f'mlx-lm says "{reason}"'
        ) from error
