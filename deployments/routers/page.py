"""The pages for browsers: a chat at ``/``, and the API's description at ``/docs``.

They are plain files. Their policy lets browsers load nothing from elsewhere and run no script but theirs.
"""

import mimetypes
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from deployments.errors import NoSuchRoute

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent.parent / "page"
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.is_file()}

_HEADERS = {
    # Images that a user attaches are data URLs.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Files are compared by their ETag, so that a new version is seen at once.
    "Cache-Control": "no-cache",
}


@router.get("/")
async def show_chat(request: Request) -> Response:
    """A page to chat with the models."""
    prefix = request.scope.get("app_root_path", "")
    if request.scope.get("raw_path") == prefix.encode():
        # The page's links are relative to a folder.
        return RedirectResponse(f"{prefix}/")
    return _file("index.html")


@router.get("/docs")
async def find_docs() -> Response:
    """Lead to the description of the API."""
    return RedirectResponse("page/docs")


@router.get("/page/docs")
async def show_docs() -> Response:
    """The description of the API."""
    return _file("docs.html")


@router.get("/page/{name}")
async def show_file(name: str) -> Response:
    """A script, style or icon of a page."""
    if name not in _FILES:
        raise NoSuchRoute("There is no such file.")
    return _file(name)


def _file(name: str) -> Response:
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return FileResponse(_FILES[name], media_type=kind, headers=_HEADERS)
