"""A hub on this machine that offers one repository, `acme/tiny`: what huggingface_hub asks of one, and no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "76543210abcdef0123456789abcdef0123456789"


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[tuple[str, set[str]]]:
    """The address of a hub that serves `files`, and the names of those that were fetched so far."""
    fetched: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content_Length": str(len(body))}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith("/api/models/acme/tiny"):
                siblings = [{"rfilename": name} for name in files]
                model = {"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in files.items()
                ]
                content = tree if "/tree/" in path else model
                self.answer(json.dumps(content).encode(), Content_Type="application/json")
            elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
                name = path.partition(f"/{COMMIT}/")[2]
                fetched.add(name)
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                self.answer(files[name], ETag=etag, X_Repo_Commit=COMMIT)
            else:
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", fetched
        finally:
            server.shutdown()
