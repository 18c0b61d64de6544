"""The page's files, each with the rules that the browser keeps it to."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from mimoflash.serve.errors import ApiError

FOLDER = Path(__file__).parent / "page"
# the page may talk to any endpoint, but takes code from here only
_PAGE = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src *; frame-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# a document that a model wrote runs, and reaches nothing: no network, no storage, no page around it
_ARTIFACT = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data: blob:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'self'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    return _file("index.html")


@router.get("/page/{path:path}")
async def page_file(path: str) -> Response:
    return _file(path)


def _file(path: str) -> Response:
    file = (FOLDER / path).resolve()
    if not file.is_relative_to(FOLDER) or not file.is_file():
        raise ApiError(404, f"there is nothing at /page/{path}")
    rules = _ARTIFACT if path == "artifact.html" else _PAGE
    headers = {
        "Content-Security-Policy": rules, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache", "X-DNS-Prefetch-Control": "off",
    }
    if path == "artifact.html":
        headers["Connection-Allowlist"] = "()"  # Chromium: no WebRTC either, and no connection before a refusal
    return FileResponse(file, headers=headers)
