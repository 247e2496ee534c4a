"""The routes of the web page: ``GET /`` and the files that it loads, all without a key.

Programs that ask for ``/``, such as Claude Code before its first request, get a line of JSON; a
browser, whose ``Accept`` names HTML, gets the page.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from k2cli.server.page.files import INDEX, PageFile, page_files

_VARY = {"Vary": "Accept"}


async def root(request: Request) -> Response:
    """Return the page to a browser, and the name of the server to a program."""
    if "text/html" in request.headers.get("accept", "").lower():
        return _response(request, page_files()[INDEX], _VARY)
    return JSONResponse({"server": "k2"}, headers=_VARY)


async def page_file(request: Request) -> Response:
    """Return a file that the page loads.

    Raises:
        HTTPException: 404, if the page has no such file.
    """
    name = request.path_params["name"]
    file = None if name == INDEX else page_files().get(name)
    if file is None:
        raise HTTPException(404)
    return _response(request, file, {})


def _response(request: Request, file: PageFile, more: dict[str, str]) -> Response:
    headers = {**file.headers, **more}
    if file.is_known_as(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
