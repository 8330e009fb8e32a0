"""A small Hub on the loopback interface: real clients download from it, push to it, and meet its failures."""

import dataclasses
import os
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from .handler import Handler
from .repos import Repo, User, as_file

TOKEN = "hf_loopbacktoken"
ALWAYS = 10**9  # as `times` of a fault


@dataclasses.dataclass
class Fault:
    """What `LoopbackHub.fail` says of the requests that it hits."""

    method: str
    path: str
    status: int | None
    times: int
    after: int
    headers: dict
    cut: bool
    lost: bool
    delay_s: float

    def hits(self, method, path):
        """Tells whether a request is hit, and counts it."""
        if self.times <= 0 or self.method not in (method, "*") or not re.search(self.path, path):
            return False
        self.after -= 1
        self.times -= self.after < 0
        return self.after < 0


class LoopbackHub:
    """Serves the repositories of a folder as a Hub does, and takes what is pushed to it, as a context.

    The clients read `HF_ENDPOINT` when they are imported, so run them in a subprocess with `env(...)`, or give the
    `endpoint` to `HfApi`. What is pushed stays in memory.

    Args:
        repos_dir: folder with `datasets/<owner>/<name>/` and `models/<owner>/<name>/`, each the files of one
            repository, which become its first commit.
        private: ids that are not there without the token.
        gated: ids whose files are refused without the token.
        token: the token of the user `tester`, who also reads what is private and writes for the organisation `acme`.

    Attributes:
        endpoint: such as `http://127.0.0.1:40123`.
        requests: list of (method, path) as they came.
        users: token → `User`; a token that is not there is expired.
        mangle: callable (path, content) → content as it is stored by a commit, or None if it gets lost.
        part_bytes: above this many, large files are uploaded in parts.
    """

    def __init__(self, repos_dir, private=(), gated=(), token=TOKEN):
        self.repos_dir = Path(repos_dir)
        self.private, self.gated, self.token = set(private), set(gated), token
        members = {id.split("/")[0]: "read" for id in self.private}
        self.users = {token: User("tester", orgs=members | {"acme": "write"})}
        self.requests, self.faults, self.repos, self.stored, self.parts = [], [], {}, {}, {}
        self.part_bytes = None
        self.lock = threading.RLock()
        self.mangle = lambda path, content: content

    def __enter__(self):
        class HandlerOfThis(Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), HandlerOfThis)
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

    def fail(self, method, path, status=None, times=1, after=0, headers=(), cut=False, lost=False, delay_s=0.0):
        """Makes requests fail.

        Args:
            method: such as POST; * for any.
            path: regular expression that is found in the path of the request (`/api/models/me/x/commit/main`).
            status: answer with this status, without doing anything.
            times: how many requests, or ALWAYS.
            after: how many pass before.
            headers: of that answer, such as {"Retry-After": "1"}.
            cut: cut the connection in the middle of the body that is sent, or else of the one that is answered.
            lost: do what is asked, then cut the connection instead of answering.
            delay_s: wait this long first.
        """
        self.faults.append(Fault(method, path, status, times, after, dict(headers), cut, lost, delay_s))

    def repo(self, kind, id):
        """Returns a `Repo`, or None; `kind` is `models` or `datasets`."""
        folder = self.repos_dir / kind / id
        if (kind, id) not in self.repos and folder.is_dir():
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            files = {path: as_file(path, source.read_bytes()) for path, source in files.items()}
            self.repos[kind, id] = Repo(kind, id, files, id in self.private, id.split("/")[0])
        return self.repos.get((kind, id))

    def commit(self, kind, id, revision="main"):
        """Returns the id of the commit that a revision stands for."""
        return self.repo(kind, id).find(revision).id

    def files(self, kind, id, revision="main"):
        """Returns the paths of a repository's files."""
        return sorted(self.repo(kind, id).find(revision).files)

    def read(self, kind, id, path, revision="main"):
        """Returns the bytes of one file."""
        return self.repo(kind, id).find(revision).files[path].content
