"""The web page over HTTP: its files and their headers, without a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from k2cli.server.page.files import PAGE_FOLDER, page_files
from tests.server.requests import QUESTION, SERVED, post
from tests.server.scripted import ScriptedEngine, serving

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "k2cli" / "server" / "page"
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.fixture(params=[None, "s3cret"], ids=["without a key", "with a key"])
def url(request: pytest.FixtureRequest, engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, replace(SERVED, name="secret-model", api_key=request.param)) as url:
        yield url


def get(url: str, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{url}{path}", headers=headers, verify=False)


def test_a_program_gets_json_and_a_browser_the_page(url: str) -> None:
    for headers in ({}, {"accept": "application/json, text/plain, */*"}):
        answer = get(url, "/", **headers)
        assert (answer.status_code, answer.json()) == (200, {"server": "k2"})
        assert answer.headers["vary"] == "Accept"
    for headers in ({}, HTML):  # Claude Code asks with HEAD
        assert httpx.head(f"{url}/", headers=headers, verify=False).status_code == 200
    page = get(url, "/", **HTML)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (FOLDER / "index.html").read_bytes()


def test_every_file_is_served_without_a_key_and_shows_nothing_of_the_run(url: str) -> None:
    for name, file in page_files().items():
        path = "/" if name == "index.html" else f"{PAGE_FOLDER}{name}"
        answer = get(url, path, **HTML)
        assert answer.status_code == 200
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["content-type"].partition(";")[0] == file.kind.partition(";")[0]
        assert "secret-model" not in answer.text
        policy = answer.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert not re.search(r"unsafe|\*|http|data:|blob:", " ".join(policy))
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in answer.headers
        # A browser asks again each time, and gets nothing where it has the file.
        assert answer.headers["cache-control"] == "no-cache"
        same = get(url, path, **HTML, **{"if-none-match": answer.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")
        assert same.headers["etag"] == answer.headers["etag"]
        assert get(url, path, **HTML, **{"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["files.py", "index.html", "", "..%2fauth.py", "%2e%2e/auth.py", "MAIN.JS", "main.js%00"],
)
def test_nothing_else_is_served(url: str, name: str) -> None:
    assert get(url, f"{PAGE_FOLDER}{name}").status_code in (401, 404)


def test_the_page_can_be_opened_by_a_link_and_not_used_from_elsewhere() -> None:
    with serving(ScriptedEngine(), SERVED) as url:
        assert get(url, "/", **HTML, **LINK).status_code == 200
        for changes in ({"sec-fetch-dest": "iframe"}, {"sec-fetch-mode": "no-cors"}):
            assert get(url, "/", **HTML, **{**LINK, **changes}).status_code == 403
        for path in ("/v1/status", "/v1/models", f"{PAGE_FOLDER}main.js"):
            assert get(url, path, **LINK).status_code == 403
        assert post(url, {"messages": QUESTION}, **LINK).status_code == 403
        assert get(url, "/", **HTML, host="rebound.example").status_code == 403
        assert get(url, f"{PAGE_FOLDER}main.js", host="rebound.example").status_code == 403


def test_the_page_loads_its_own_files_and_has_no_way_to_make_html_of_text() -> None:
    assert set(page_files()) == {
        path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "") and path.is_file()
    }
    texts = {name: (FOLDER / name).read_text() for name in page_files()}
    loaded = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', texts["index.html"]))
    assert loaded == {"page/icon.svg", "page/page.css", "page/main.js"}
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", texts["index.html"])
    for name, text in texts.items():
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|@import|url\(", text), name
        imported = re.findall(r'from "\./([\w.]+)"', text)
        assert len(imported) == len(re.findall(r"^import |^} from", text, re.MULTILINE)) - (
            len(re.findall(r"^import \{$", text, re.MULTILINE))
        )
        assert set(imported) <= set(texts)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\("
            r"|localStorage|sessionStorage|indexedDB|document\.cookie|\.pushState|location\.hash",
            text,
        ), name


SERVE = """
import k2cli.server.page.files as files
from pathlib import Path
assert Path(files.__file__).is_relative_to({folder!r}), files.__file__
import asyncio
from starlette.applications import Starlette
from starlette.routing import Route
from k2cli.server.routes import page
app = Starlette(routes=[Route("/", page.root), Route("/page/{{name}}", page.page_file)])
sizes = []
async def ask(path):
    sent = []
    async def send(message): sent.append(message)
    async def receive(): return {{"type": "http.request", "body": b"", "more_body": False}}
    scope = {{"type": "http", "method": "GET", "path": path, "query_string": b"", "root_path": "",
             "headers": [(b"accept", b"text/html")], "http_version": "1.1", "scheme": "http"}}
    await app(scope, receive, send)
    print(path, sent[0]["status"], len(sent[1]["body"]))
for name in files.page_files():
    asyncio.run(ask("/" if name == files.INDEX else "/page/" + name))
"""


@pytest.mark.timeout(120)
def test_a_wheel_has_the_page_and_serves_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "k2cli", source / "k2cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, timeout=100,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(source.glob("k2cli-*.whl"))) as wheel:
        wheel.extractall(installed)  # as pip does with one of Python alone
    done = subprocess.run(
        [sys.executable, "-c", SERVE.format(folder=str(installed))],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    served = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert served == {
        "/" if name == "index.html" else f"/page/{name}": f"200 {(FOLDER / name).stat().st_size}"
        for name in page_files()
    }
