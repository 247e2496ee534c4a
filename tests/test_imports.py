"""The architecture as a test: who may import whom, and what must not be imported early.

The table is that of docs/design/architecture.md. Imports inside functions count for the direction
of imports; for the cost of start-up only those at a module's top do.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "k2cli"

# Part of k2cli -> other parts that it may import. A part is a folder or a top-level module; an
# entry with a dot is one module or folder inside a part. Everything may import itself and a leaf.
LEAVES = {
    "errors", "units", "settings", "files", "choices", "gpu_name", "mlx_lm_package", "proxies",
    "bounded_cache", "child_process", "scratch", "pauses", "event_loop", "stderr", "pip_command",
    "fair_queue", "prefix_folder", "rdma_launches", "system",
    "__init__",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    **{leaf: set[str]() for leaf in LEAVES},
    "__main__": {"cli"},
    "cli": {"commands", "ui"},
    "protocol": set(),
    "access": {"protocol"},
    "grammars": {"models.text", "models.json_files", "protocol.wire"},
    "sharding": {
        "models.config_form", "models.rope_form", "models.config_consistency",
        "models.class_defaults",
    },
    "models": set(),
    "client": set(),
    "connect": set(),
    "ui": set(),  # but the types of values that it shows, for typing only
    "chat": {"client", "tools"},
    "tools": {"protocol.wire"},
    "planning": {"models", "sharding"},
    "quantization": {"models", "sharding"},
    "bench": {"planning", "client", "cluster", "nodes", "agent", "runs"},
    "agent": {"access.tls_files", "models", "planning.hardware"},
    "nodes": {"agent", "planning.hardware"},
    "cluster": {"nodes", "agent", "planning.hardware"},
    "runs": {"cluster", "nodes", "agent", "protocol"},
    "doctor": {"runs", "cluster", "nodes", "agent", "planning.plan", "planning.hardware"},
    "transfer": {"cluster", "nodes", "agent", "runs", "models", "sharding", "planning.plan"},
    "launch": {
        "access", "transfer", "doctor", "runs", "cluster", "nodes", "agent", "planning", "models",
        "protocol", "sharding",
    },
    "supervisor": {"access", "launch", "runs", "cluster", "nodes", "agent", "protocol"},
    "server": {"access", "protocol", "grammars.text", "grammars.check", "grammars.gbnf"},
    "guard": {
        "access", "server", "protocol", "models.text", "models.json_files", "agent.locks",
    },
    "rank": {"protocol", "sharding", "models", "grammars"},
    "commands": {
        "ui", "client", "chat", "planning", "quantization", "bench", "nodes", "cluster", "runs",
        "doctor", "transfer", "launch", "access", "supervisor", "models", "sharding", "protocol",
        "connect", "tools",
    },
}  # fmt: skip

# Part -> what else it may import under TYPE_CHECKING: ui names the types of the values it shows.
DOMAINS = {"planning", "quantization", "cluster", "nodes", "agent", "runs", "doctor", "launch",
           "supervisor", "transfer", "bench", "chat", "client", "connect", "protocol", "sharding",
           "models.inventory"}  # fmt: skip
ALLOWED_FOR_TYPING = {"ui": DOMAINS}

# Third-party module -> where alone it may be imported; an entry ending in a slash is a folder.
ONLY_IN = {
    "huggingface_hub": {
        "models/sources/hub.py",
        "models/sources/hub_errors.py",
        "models/sources/cache_layout.py",
    },
    "mlx_lm": {"mlx_lm_package.py"},
    "modelscope_hub": {"models/modelscope.py"},
    "transformers": set[str](),
    "torch": set[str](),
    "typer": {"cli.py", "commands/"},
    "rich": {"ui/", "commands/"},
    "prompt_toolkit": {"ui/"},
    "textual": {"ui/top/app.py"},
    "starlette": {"server/"},
    "uvicorn": {"server/", "guard/"},
    "llguidance": {"grammars/"},
    "mcp": {"tools/connection.py", "tools/program.py"},
    "mcp_types": {"tools/connection.py", "tools/program.py"},
    "prometheus_client": {"server/metrics/exposition.py"},
    "tomlkit": {"connect/formats/toml.py"},
    "ruamel": {"connect/formats/yaml.py"},
}

HEAVY = {
    "httpx", "httpx2", "huggingface_hub", "jinja2", "jsonschema", "llguidance", "mlx", "mlx_lm",
    "mcp", "mcp_types", "modelscope_hub", "numpy", "prometheus_client", "prompt_toolkit", "ruamel",
    "starlette", "textual", "tokenizers", "tomlkit", "torch",
    "transformers", "uvicorn",
}  # fmt: skip

# Started with ``python -m``, and imported by nothing.
ENTRY_POINTS = {"rank.main", "guard.main", "guard.mpi_slot_process", "guard.reader_process",
                "grammars.mask_process", "tools.host_process"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: ``top`` if run when the file is imported, ``typing`` if never run."""

    path: Path
    line: int
    module: str
    top: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE)}:{self.line} imports {self.module}"


def _module_name(path: Path) -> str:
    """``planning/plan.py`` -> ``planning.plan``; a folder's ``__init__`` is the folder."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def _part(module: str) -> str:
    return module.split(".")[0]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _walk(node: ast.AST, top: bool, typing: bool = False) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top and not typing, typing
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, False, typing)
        else:
            yield from _walk(child, top, typing or _is_type_checking(child))


def _names(node: ast.stmt, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    assert node.level == 0, f"{path}:{node.lineno} is a relative import"
    assert node.module is not None
    # ``from k2cli import protocol`` imports the module k2cli.protocol.
    if node.module == "k2cli" or (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module]


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    tree = ast.parse(path.read_text())
    return tuple(
        Import(path, node.lineno, name, top, typing)
        for node, top, typing in _walk(tree, True)
        for name in _names(node, path)
    )


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _all_imports() -> list[Import]:
    return [item for path in _sources() for item in imports_of(path)]


def _inside(path: Path, places: set[str]) -> bool:
    name = path.relative_to(PACKAGE).as_posix()
    return any(name == place or (place[-1] == "/" and name.startswith(place)) for place in places)


def test_every_part_is_in_the_table() -> None:
    assert {_part(_module_name(path)) for path in _sources()} <= set(ALLOWED)


def _imports_between_files() -> dict[Path, set[Path]]:
    """Every file of k2cli -> the files that it imports when run, inside functions or not."""
    return {
        path: {
            found
            for item in imports_of(path)
            if not item.typing and (found := _path_of(item.module)) not in (None, path)
        }
        for path in _sources()
    }


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(_imports_between_files()).prepare()
    except CycleError as error:
        circle = " -> ".join(path.relative_to(PACKAGE).as_posix() for path in error.args[1])
        pytest.fail(f"imports in a circle: {circle}")


def test_no_folder_is_crowded() -> None:
    modules = Counter(path.parent for path in _sources() if path.name != "__init__.py")
    crowded = {folder.name: count for folder, count in modules.items() if count > 20}
    assert not crowded


def test_import_direction() -> None:
    wrong = []
    for item in _all_imports():
        if not item.module.startswith("k2cli."):
            continue
        target = item.module.removeprefix("k2cli.")
        source_part, target_part = _part(_module_name(item.path)), _part(target)
        if target_part in {source_part, "__version__"} | LEAVES:
            continue
        allowed = ALLOWED[source_part]
        if item.typing:
            allowed = allowed | ALLOWED_FOR_TYPING.get(source_part, set())
        one_module = any(target == entry or target.startswith(f"{entry}.") for entry in allowed)
        if target_part not in allowed and not one_module:
            wrong.append(str(item))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", sorted(ONLY_IN))
def test_third_party_module_is_imported_in_its_place_only(module: str) -> None:
    wrong = [
        str(item)
        for item in _all_imports()
        if _part(item.module) == module and not _inside(item.path, ONLY_IN[module])
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_entry_points() -> None:
    wrong = [str(i) for i in _all_imports() if i.module.removeprefix("k2cli.") in ENTRY_POINTS]
    assert not wrong, "\n".join(wrong)


def test_only_ui_prints() -> None:
    """Guards and ranks talk over their standard streams; everybody else leaves output to ui."""
    wrong = []
    for path in _sources():
        if _inside(path, {"ui/", "guard/", "rank/", "agent/"}):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            prints = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            writes = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stdout.write"
            if prints or writes:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


# They clean what they write of everything that could control a terminal.
CLEANERS = {"ui/output.py", "ui/chat/stream.py", "stderr.py"}


def test_only_what_cleans_text_writes_to_a_terminal() -> None:
    wrong = []
    for path in _sources():
        if _inside(path, CLEANERS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                stream = re.fullmatch(
                    r"sys\.std(out|err)\.(write|writelines)", ast.unparse(node.func)
                )
                console = node.func.attr == "print"
                if stream or console or ast.unparse(node)[:11] == "os.write(2,":
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def _path_of(module: str) -> Path | None:
    """File of a ``k2cli`` module, or None; a name inside a module leads to that module."""
    parts = module.split(".")[1:]
    while parts:
        base = PACKAGE.joinpath(*parts)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        parts.pop()
    return PACKAGE / "__init__.py" if module.startswith("k2cli") else None


def test_start_up_imports_nothing_heavy() -> None:
    """Whatever the commands import at their top, followed to the end, is light."""
    waiting = [PACKAGE / "cli.py", *(PACKAGE / "commands").rglob("*.py")]
    seen: set[Path] = set()
    wrong = []
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for item in imports_of(path):
            if item.top and _part(item.module) in HEAVY:
                wrong.append(str(item))
            elif item.top and _part(item.module) == "k2cli" and (found := _path_of(item.module)):
                waiting.append(found)
    assert not wrong, "\n".join(wrong)


_RUN_AND_REPORT = """
import sys
sys.argv = ["k2", *sys.argv[1:]]
from k2cli.cli import main
try:
    main()
except SystemExit as exit:
    code = exit.code
loaded = sorted({name.split(".")[0] for name in sys.modules})
sys.stderr.write(f"\\n{code or 0} {' '.join(loaded)}")
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["launch", "--help"], 0),
        (["launch"], 2),
        (["plan-memory", "--nonsense"], 2),
        (["nonsense"], 2),
    ],
)
def test_help_and_usage_errors_load_nothing_heavy(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN_AND_REPORT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    status, *loaded = done.stderr.splitlines()[-1].split()
    assert int(status) == code
    assert "typer" in loaded
    assert not HEAVY & set(loaded)
