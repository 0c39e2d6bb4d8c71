"""A server on the loopback that answers as the Hugging Face hub and the release page do, as far as tests need it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """`files[path of the address]` is what a GET gives; `requests` are (method, path); uploads become files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.address = ""

    def offer(self, repository: str, **files: bytes) -> None:
        """offer("user/name", config_json=b"{}"): the last underscore stands for a dot."""
        for name, content in files.items():
            self.files[f"/{repository}/resolve/main/{'.'.join(name.rsplit('_', 1))}"] = content

    @property
    def fetched(self) -> list[str]:
        return [path for method, path in self.requests if method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_file(with_body=False)

    def do_GET(self) -> None:
        self._answer_file(with_body=True)

    def _answer_file(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].replace(f"/resolve/{COMMIT}/", "/resolve/main/")
        self._note()
        content = self.hub.files.get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"})
            return
        about = {
            "ETag": f'"{self.hub.etags.get(path) or hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }
        self._send(200, content, about, with_body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self._json({"url": f"{self.hub.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main.*", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    content = base64.b64decode(value["content"])
                    self.hub.files[f"/{match[1]}/resolve/main/{value['path']}"] = content
            url = f"{self.hub.address}/{match[1]}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self._send(404, b"", {})

    def _note(self) -> None:
        self.hub.requests.append((self.command, self.path.partition("?")[0]))
        self.hub.tokens.add(self.headers.get("Authorization"))

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[LocalHub]:
    hub = LocalHub()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    http.daemon_threads = True
    hub.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
