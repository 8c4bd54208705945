"""Files that clients have uploaded, kept in memory for requests that name them. Belongs to the event loop."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mm.serve.limits import Refused

if TYPE_CHECKING:
    from mm.serve.app import Server


@dataclass(frozen=True)
class Stored:
    data: bytes
    filename: str
    purpose: str
    id: str = field(default_factory=lambda: f"file-{secrets.token_hex(12)}")  # whoever knows it may use it
    created: int = field(default_factory=lambda: int(time.time()))

    def to_openai(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class Uploads:
    """At most `room` bytes; the oldest go first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._files: OrderedDict[str, Stored] = OrderedDict()

    def add(self, data: bytes, filename: str, purpose: str) -> Stored:
        stored = Stored(data, filename[:200], purpose[:40])
        self._files[stored.id] = stored
        while sum(len(each.data) for each in self._files.values()) > self._room or len(self._files) > 1_000:
            self._files.popitem(last=False)
        return self.get(stored.id)

    def get(self, file_id: str) -> Stored:
        """Raises Refused, file_not_found."""
        if file_id not in self._files:
            raise Refused("file_not_found", f"{file_id[:80]!r} is not here")
        return self._files[file_id]

    def remove(self, file_id: str) -> None:
        """Raises Refused, file_not_found."""
        del self._files[self.get(file_id).id]


async def upload(server: Server, request: Request) -> Response:
    """POST /v1/files: a form with `file` and `purpose`."""
    server.take_place(request)
    if "charset" in request.headers["content-type"].lower():  # Python knows some that are no encodings of text
        raise Refused("unsupported_media_type", "a form that names a charset; UTF-8 is understood")
    async with request.form(max_files=1, max_fields=8, max_part_size=1 << 16) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise Refused("missing_parameter", "no file in the form", "file")
        stored = server.uploads.add(await file.read(), file.filename or "", str(purpose or "user_data"))
    return JSONResponse(stored.to_openai())
