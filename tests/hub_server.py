"""A local server in memory with the part of the Hub's HTTP API that the real client needs to push and load a model."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret_of_the_tests"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of the Hub client. All requests except POST work without a token."""

    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        """Send bytes as they are, or any other body as JSON. An underscore in the name of a header means a hyphen."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        """Handle a request of any method."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        hub = self.server.hub
        is_asked_for_user = path == "api/whoami-v2"
        if (self.command == "POST" or is_asked_for_user) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if is_asked_for_user:
            return self.answer({"type": "user", "name": "user", "auth": {}})
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "api/repos/create":
            spec = json.loads(body)
            name = f"{spec.get('organization') or 'user'}/{spec['name']}"
            hub.private = bool(spec.get("private")) or spec.get("visibility") == "private"
            exists = hub.repos.setdefault(name, None) is not None
            hub.repos[name] = hub.repos[name] or {}
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if exists else 200)
        if path.startswith("lfs/"):
            hub.blobs[path.removeprefix("lfs/")] = body
            return self.answer(b"")
        if path.endswith("info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.answer(
                {
                    "transfer": "basic",
                    "objects": [o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects],
                }
            )
        parts = path.split("/")
        name = "/".join(parts[2:4] if path.startswith(("api/models/", "api/datasets/")) else parts[:2])
        files = hub.repos.get(name)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if "preupload" in parts:
            requested = json.loads(body)["files"]
            lfs_endings = (".safetensors", ".png", ".parquet")
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(lfs_endings) else "regular",
                    "shouldIgnore": False,
                }
                for f in requested
            ]
            return self.answer({"files": modes})
        if "branch" in parts:
            hub.branches.append(parts[-1])
            return self.answer(b"", 201)
        if "commit" in parts:
            hub.revision = parts[-1]
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            return self.answer({"success": True, "commitOid": SHA, "commitUrl": f"{hub.url}/{name}/commit/{SHA}"})
        if "tree" in parts:
            return self.answer(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )
        if "resolve" in parts:
            content = files.get("/".join(parts[4:]))
            if content is None:
                return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            return self.answer(content, X_Repo_Commit=SHA, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        siblings = [{"rfilename": p} for p in files]
        return self.answer(
            {
                "id": name,
                "modelId": name,
                "sha": SHA,
                "siblings": siblings,
                "private": hub.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args: object) -> None:
        pass


class HubServer:
    """The local Hub: `with HubServer() as hub:`.

    `hub.env(home)` is the environment of a process that uses this Hub. `hub.repos` is {repository id: {path: bytes}}.
    """

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.private = False
        self.branches: list[str] = []
        self.revision = ""  # of the last commit

    def env(self, home: object, token: str = TOKEN) -> dict[str, str]:
        """Return the environment of a process that uses this Hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
