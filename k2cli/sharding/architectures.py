"""Model classes of mlx-lm, found by a config's model type.

The table of renamed model types is read as a literal from the source of mlx-lm's ``utils.py``, so
that it is always that of the installed version.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import types
from collections.abc import Mapping
from typing import Any

from k2cli.errors import UsageError
from k2cli.mlx_lm_package import mlx_lm_folder, mlx_lm_module
from k2cli.pip_command import pip_install

MODEL_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""Errors that a model's own code raises for a config, a device or a cut that it cannot handle."""


@functools.cache
def _literals(name: str) -> dict[Any, Any]:
    """Read a module-level dict literal of mlx-lm's ``utils.py``, without running that module.

    Only the assignment is parsed, from its name at the start of a line to its closing brace at the
    start of a line: the whole file takes 40 ms in every process of a run.
    """
    source = (mlx_lm_folder() / "utils.py").read_text(encoding="utf-8")
    found = re.search(rf"^{name}\b[^=\n]*= (\{{.*?^\}})", source, re.MULTILINE | re.DOTALL)
    value = ast.literal_eval(found[1] if found else _assigned(source, name))
    assert isinstance(value, dict)
    return value


def _assigned(source: str, name: str) -> ast.expr:
    """Find the expression that a module assigns to a name; an empty dict if there is none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            return node.value
    return ast.Dict([], [])


def module_name(config: Mapping[str, Any]) -> str:
    """Return the name of the file in mlx-lm's ``models`` folder for a config's model type.

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


def model_classes(config: Mapping[str, Any]) -> tuple[type[Any], type[Any]]:
    """Return the ``Model`` and ``ModelArgs`` classes for a config.

    Raises:
        UsageError: if mlx-lm has no such model type.
    """
    name = module_name(config)
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UsageError(f"config.json has model_type '{config['model_type']}', which is no name")
    path = mlx_lm_folder() / "models" / f"{name}.py"
    if path.is_file():
        module = _imported(name)
        if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
            return module.Model, module.ModelArgs
    raise UsageError(
        f"model_type '{config['model_type']}' is not one that the installed mlx-lm can run",
        f"{pip_install('--upgrade', 'mlx-lm')}; or choose a model of a supported architecture",
    )


@functools.cache
def _source(name: str) -> str:
    return (mlx_lm_folder() / "models" / f"{name}.py").read_text(encoding="utf-8")


def class_source(config: Mapping[str, Any]) -> str:
    """Return the text of the file that defines a config's class, with those that it imports."""
    name = module_name(config)
    text = _source(name)
    imported = re.findall(r"^from \.(\w+) import|^from \. import (.+)$", text, re.MULTILINE)
    names = {each for pair in imported for part in pair for each in re.findall(r"\w+", part)}
    shared = {"base", "cache", "switch_layers", "activations", "pipeline", "rope_utils"}
    folder = mlx_lm_folder() / "models"
    return text + "".join(
        _source(each)
        for each in sorted(names - shared - {name})
        if (folder / f"{each}.py").is_file()
    )


def _imported(name: str) -> types.ModuleType:
    """Import the module of an architecture, or report the package that it lacks.

    Some need a package that mlx-lm does not install; olmo's prints a message and exits.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            return mlx_lm_module(f"models.{name}")
    except (ImportError, SystemExit) as error:
        reason = told.getvalue().strip() or str(error)
        raise UsageError(
            f"mlx-lm's {name} model needs a package that is not installed here; "
            f'mlx-lm says "{reason}"'
        ) from error
