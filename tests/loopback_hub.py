"""A small Hub on the loopback interface, for real `load_dataset` and `from_pretrained` calls on folders of files."""

import hashlib
import json
import mimetypes
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopbacktoken"


class LoopbackHub:
    """Serves the repositories of a folder as a Hub does, as a context.

    The clients read `HF_ENDPOINT` when they are imported, so run them in a subprocess with `env(...)`.

    Args:
        repos_dir: folder with `datasets/<owner>/<name>/` and `models/<owner>/<name>/`, each the files of one
            repository; its only commit is a hash of them, whatever revision is asked for, except that a revision
            called `missing` does not exist.
        private: ids that are not there without the token.
        gated: ids whose files are refused without the token.
        token: the one token that opens both.

    Attributes:
        endpoint: such as `http://127.0.0.1:40123`.
        requests: list of (method, path) as they came.
    """

    def __init__(self, repos_dir, private=(), gated=(), token=TOKEN):
        self.repos_dir = Path(repos_dir)
        self.private, self.gated, self.token = set(private), set(gated), token
        self.requests = []

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def env(self, home, token=None):
        """Returns the environment for a process that takes this for the Hub, with a cache of its own."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env = {name: value for name, value in env.items() if name.lower() not in ("http_proxy", "all_proxy")}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    def commit(self, kind, id):
        """Returns the commit of a repository; `kind` is `datasets` or `models`."""
        content = hashlib.sha1()
        for path in self.files(kind, id):
            content.update(path.encode() + (self.repos_dir / kind / id / path).read_bytes())
        return content.hexdigest()

    def files(self, kind, id):
        """Returns the paths of a repository's files."""
        folder = self.repos_dir / kind / id
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, unquote(url.path)))
        # The slashes of a revision such as refs/convert/parquet come escaped, so it stays one part.
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            if parts[0] == "api":
                self._api(parts[1:], parse_qs(url.query), body)
            else:
                kind = "datasets" if parts[0] == "datasets" else "models"
                parts = parts[1:] if kind == "datasets" else parts
                if len(parts) < 5 or parts[2] != "resolve":
                    return self._send(404)
                self._resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _api(self, parts, query, body):
        if parts[0] == "whoami-v2":
            if not self._has_token():
                return self._send(401)
            return self._json({"type": "user", "name": "tester", "auth": {"accessToken": {"role": "write"}}})
        if parts[0] not in ("datasets", "models") or len(parts) < 3:
            return self._send(404)
        kind, id, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        revision = rest[1] if len(rest) > 1 else "main"
        if not self._admits(kind, id, revision):
            return None
        if not rest or rest[0] == "revision":
            files = [{"rfilename": path} for path in self.hub.files(kind, id)]
            return self._json(
                {
                    "_id": id,
                    "id": id,
                    "modelId": id,
                    "author": id.split("/")[0],
                    "sha": self.hub.commit(kind, id),
                    "private": id in self.hub.private,
                    "gated": "auto" if id in self.hub.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": files,
                    "lastModified": "2024-01-01T00:00:00.000Z",
                    "createdAt": "2024-01-01T00:00:00.000Z",
                }
            )
        if rest[0] == "tree":
            folder = "/".join(rest[2:])
            found = self._entries(kind, id, folder, query.get("recursive", ["false"])[0].lower() in ("true", "1"))
            return self._json(found) if found else self._send(404, "EntryNotFound")
        if rest[0] == "paths-info":
            if "json" in self.headers.get("Content-Type", ""):
                paths = json.loads(body)["paths"]
            else:
                paths = parse_qs(body.decode())["paths"]
            paths = [paths] if isinstance(paths, str) else paths
            entries = {entry["path"]: entry for entry in self._entries(kind, id, "", True)}
            return self._json([entries[path] for path in paths if path in entries])
        return self._send(404)

    def _entries(self, kind, id, folder, recursive):
        """Lists files and folders below a folder, as the tree endpoint does."""
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path in self.hub.files(kind, id):
            if not path.startswith(prefix):
                continue
            names = path[len(prefix) :].split("/")
            for depth in range(1, len(names) if recursive else min(2, len(names))):
                name = prefix + "/".join(names[:depth])
                entries[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if recursive or len(names) == 1:
                content = (self.hub.repos_dir / kind / id / path).read_bytes()
                entries[path] = {
                    "type": "file",
                    "oid": hashlib.sha1(content).hexdigest(),
                    "size": len(content),
                    "path": path,
                }
        return list(entries.values())

    def _resolve(self, kind, id, revision, path):
        if not self._admits(kind, id, revision):
            return None
        if id in self.hub.gated and not self._has_token():
            return self._send(403, "GatedRepo")
        file = self.hub.repos_dir / kind / id / path
        if not file.is_file():
            return self._send(404, "EntryNotFound", {"X-Repo-Commit": self.hub.commit(kind, id)})
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit(kind, id),
            "Accept-Ranges": "bytes",
            "Content-Type": mimetypes.guess_type(path)[0] or "application/octet-stream",
        }
        status, asked = 200, self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last), len(content) - 1) if first and last else len(content) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        return self._send(status, headers=headers, content=content)

    def _has_token(self):
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _admits(self, kind, id, revision):
        """Answers itself, and returns False, if the repository or revision is not there for this caller."""
        is_there = (self.hub.repos_dir / kind / id).is_dir()
        if not is_there or (id in self.hub.private and not self._has_token()):
            self._send(404 if self._has_token() else 401, "RepoNotFound")
            return False
        if revision == "missing":
            self._send(404, "RevisionNotFound")
            return False
        return True

    def _json(self, value):
        self._send(200, headers={"Content-Type": "application/json"}, content=json.dumps(value).encode())

    def _send(self, status, error=None, headers=None, content=b""):
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
