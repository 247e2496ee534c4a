"""Compile public JSON schemas and write docs/measurements/schema-corpus.md.

    python -m benchmarks.schema_corpus
    python -m benchmarks.schema_corpus --ignored FILE    what is accepted although it is invalid

It needs pip, npm and a registry of each, and takes some minutes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from pathlib import Path

from benchmarks.schema_corpus.compiling import compiled
from benchmarks.schema_corpus.packages import corpus, suite
from benchmarks.schema_corpus.page import page
from benchmarks.schema_corpus.suite import compare

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "schema-corpus.md"


def _head(beside: str) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return (
        f"Measured on {datetime.date.today()} on {where}, {memory / 2**30:.0f} GiB, with {beside} "
        "beside it."
    )


def main(arguments: list[str]) -> int:
    """Fetch, compile and write; 1 if a schema crashed the compiler."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schema_corpus")
    parser.add_argument("--docs", type=Path, default=PAGE, help="%(default)s")
    parser.add_argument("--ignored", type=Path, help="write invalid instances that are accepted")
    parser.add_argument("--beside", default="nothing else", help="other load on the machine")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="k2-schemas-") as temporary:
        compared = compare(suite(Path(temporary)))
        schemas = corpus(Path(temporary))
    if options.ignored is not None:
        lines = [f"{case.place}\n  {case.schema}\n  {case.instance}" for case in compared.wider]
        options.ignored.write_text("\n".join(lines) + "\n")
    outcomes = []
    for number, schema in enumerate(schemas, start=1):
        outcomes.append((schema, compiled(schema.document)))
        if number % 100 == 0:
            sys.stderr.write(f"{number} of {len(schemas)}\n")
    options.docs.write_text(page(outcomes, compared, _head(options.beside)))
    return int(any(found.failure is not None for _, found in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
