"""How a Hub answers: its HTTP interface, as far as the clients use it."""

import base64
import fnmatch
import hashlib
import json
import mimetypes
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .repos import LFS_SUFFIXES, File, Repo, as_file, is_lfs


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status, message, code=None, headers=None, **body):
        self.status, self.message, self.body = status, message, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


_ROUTES = []


def _route(method, path):
    """Registers a method of the handler for a path; the groups of the pattern are its arguments, unquoted."""
    path = path.replace("REPO", "(models|datasets)/([^/]+/[^/]+)").replace("REV", "([^/]+)")
    path = path.replace("GIT", "(?:(datasets)/)?([^/]+/[^/]+)")

    def register(function):
        _ROUTES.append((method, re.compile(path), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        """Answers one request, whatever its method."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, unquote(url.path)))
        self.fault = next((f for f in self.hub.faults if f.hits(self.command, unquote(url.path))), None)
        try:
            if self.fault:
                time.sleep(self.fault.delay_s)
            if self.fault and self.fault.cut and int(self.headers.get("Content-Length") or 0) > 1:
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
                return self._cut()
            self.body = self._read_body()
            try:
                if self.fault and self.fault.status:
                    raise _Refused(self.fault.status, "This answer is asked for", headers=self.fault.headers)
                self._send(200, *self._dispatch(url.path))
            except _Refused as refused:
                self._send(refused.status, json.dumps(refused.body).encode(), refused.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _dispatch(self, path):
        """Returns the content and headers of an answer, or raises `_Refused`."""
        method = "GET" if self.command == "HEAD" else self.command
        for of_method, pattern, function in _ROUTES:
            found = pattern.fullmatch(path) if of_method == method else None
            if found:
                # The slashes of a revision such as refs/pr/1 come escaped, so that it stays one part of the path.
                parts = [part and unquote(part) for part in found.groups()]
                self._require_valid_token()
                with self.hub.lock:
                    answer = function(self, *parts)
                if isinstance(answer, tuple):
                    return answer
                return json.dumps(answer).encode(), {"Content-Type": "application/json"}
        raise _Refused(404, "Not Found")

    def _send(self, status, content, headers):
        if self.fault and self.fault.lost:
            return self._cut()
        self.send_response(status if "Content-Range" not in headers else 206)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            is_cut = self.fault and self.fault.cut
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
            if is_cut:
                self._cut()

    def _cut(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    # Who may do what

    @property
    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def _user(self):
        return self.hub.users.get(self._token)

    def _require_valid_token(self):
        if self._token and not self._user:
            raise _Refused(401, "Invalid credentials in Authorization header")

    def _repo(self, kind, id, revision="main"):
        """Returns a repository and the commit of a revision, if this caller may see them."""
        repo = self.hub.repo(kind, id)
        user = self._user
        is_member = user and id.split("/")[0] in (user.name, *user.orgs)
        if not repo or (repo.private and not is_member):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if not (commit := repo.find(revision)):
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def _require_write(self, id):
        if not self._user:
            raise _Refused(401, "Invalid username or password.")
        if reason := self._user.why_not_write(id):
            raise _Refused(403, reason)

    # The user, and repositories as a whole

    @_route("GET", "/api/whoami-v2")
    def _whoami(self):
        if not (user := self._user):
            raise _Refused(401, "Invalid username or password.")
        scoped = [
            {"entity": {"type": "user" if s == user.name else "model" if "/" in s else "org", "name": s},
             "permissions": ["repo.content.read", "repo.write"]}
            for s in user.scopes
        ]  # fmt: skip
        fine = {"fineGrained": {"global": [], "scoped": scoped}} if user.role == "fineGrained" else {}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        access = {"displayName": "test", "role": user.role, **fine}
        return {
            "type": "user",
            "name": user.name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }

    @_route("POST", "/api/repos/create")
    def _create_repo(self):
        asked = json.loads(self.body)
        id = f"{asked.get('organization') or (self._user.name if self._user else '')}/{asked['name']}"
        self._require_write(id)
        kind = f"{asked.get('type') or 'model'}s"
        url = f"{self.hub.endpoint}/{self._prefix(kind)}{id}"
        if self.hub.repo(kind, id):
            raise _Refused(409, f"You already created this {kind[:-1]} repo", url=url)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": as_file(".gitattributes", attributes.encode())}
        self.hub.repos[kind, id] = Repo(kind, id, files, asked.get("visibility") == "private", self._user.name)
        return {"url": url, "name": id, "id": id}

    @_route("DELETE", "/api/repos/delete")
    def _delete_repo(self):
        asked = json.loads(self.body)
        id = f"{asked.get('organization') or self._user.name}/{asked['name']}"
        self._require_write(id)
        repo, _ = self._repo(f"{asked.get('type') or 'model'}s", id)
        del self.hub.repos[repo.kind, repo.id]
        return {}

    @_route("PUT", "/api/REPO/settings")
    def _settings(self, kind, id):
        self._require_write(id)
        repo, asked = self._repo(kind, id)[0], json.loads(self.body)
        repo.private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
        return {"private": repo.private}

    @_route("GET", "/api/REPO/auth-check(/write)?")
    def _auth_check(self, kind, id, write):
        self._repo(kind, id)
        if write:
            self._require_write(id)
        return {}

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self):
        """Refuses the metadata of a card as the Hub does, as far as a program is likely to get it wrong."""
        try:
            metadata = _card_metadata(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            raise _Refused(400, "Invalid metadata", errors=[{"message": str(error)}]) from None
        errors = []
        bases, languages = (metadata.get(name) or [] for name in ("base_model", "language"))
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
                errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from the Hub.')
        for language in [languages] if isinstance(languages, str) else languages:
            if not re.fullmatch(r"[a-z]{2,3}(-\w+)*|multilingual|code", str(language)):
                errors.append(f'"language" must be an ISO 639 code, not "{language}"')
        if metadata.get("license") and not re.fullmatch(r"[a-z0-9.-]+", metadata["license"]):
            errors.append(f'"license" must be one of the identifiers, not "{metadata["license"]}"')
        if errors:
            raise _Refused(400, "Invalid metadata", errors=[{"message": message} for message in errors])
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    # Reading

    @_route("GET", "/api/REPO(?:/revision/REV)?")
    def _repo_info(self, kind, id, revision):
        repo, commit = self._repo(kind, id, revision or "main")
        try:
            card = _card_metadata(commit.files["README.md"].content.decode()) if "README.md" in commit.files else None
        except yaml.YAMLError:
            card = None
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for entry in siblings:
                told = commit.files[entry["rfilename"]].as_json("")
                entry |= {"size": told["size"], "blobId": told["oid"]}
                if "lfs" in told:
                    entry["lfs"] = {"sha256": told["lfs"]["oid"], "size": told["size"], "pointerSize": 130}
        return {
            "_id": id,
            "id": id,
            "modelId": id,
            "author": id.split("/")[0],
            "sha": commit.id,
            "private": repo.private,
            "gated": "auto" if id in self.hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": card,
            "siblings": siblings,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
        }

    @_route("GET", "/api/REPO/tree/REV(?:/(.+))?")
    def _tree(self, kind, id, revision, folder):
        _, commit = self._repo(kind, id, revision)
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        if entries := _entries(commit, folder or "", is_recursive):
            return entries
        raise _Refused(404, "Entry not found", "EntryNotFound")

    @_route("POST", "/api/REPO/paths-info/REV")
    def _paths_info(self, kind, id, revision):
        _, commit = self._repo(kind, id, revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in _entries(commit, "", True)}
        return [entries[path] for path in ([paths] if isinstance(paths, str) else paths) if path in entries]

    @_route("GET", "/api/REPO/commits/REV")
    def _commits(self, kind, id, revision):
        repo, commit = self._repo(kind, id, revision)
        return [
            {"id": c.id, "title": c.title, "message": c.message, "authors": [{"user": c.author}],
             "date": "2024-01-01T00:00:00.000Z"}
            for c in repo.history(commit)
        ]  # fmt: skip

    @_route("GET", "/api/REPO/refs")
    def _refs(self, kind, id):
        repo, _ = self._repo(kind, id)
        found = {
            "branches": "refs/heads/",
            "converts": "refs/convert/",
            "tags": "refs/tags/",
            "pullRequests": "refs/pr/",
        }
        return {
            name: [
                {"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit}
                for ref, commit in repo.refs.items()
                if ref.startswith(start)
            ]
            for name, start in found.items()
        }

    @_route("GET", "/GIT/resolve/REV/(.+)")
    def _resolve(self, kind, id, revision, path):
        _, commit = self._repo(kind or "models", id, revision)
        if id in self.hub.gated and not self._user:
            raise _Refused(403, "Access is restricted", "GatedRepo")
        if not (file := commit.files.get(path)):
            raise _Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
        content = file.content
        headers = {
            "ETag": f'"{file.etag}"',
            "X-Repo-Commit": commit.id,
            "Accept-Ranges": "bytes",
            "Content-Type": mimetypes.guess_type(path)[0] or "application/octet-stream",
        }
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(content))}
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last), len(content) - 1) if first and last else len(content) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        return content, headers

    # Writing

    @_route("POST", "/api/REPO/branch/REV")
    def _create_branch(self, kind, id, branch):
        self._require_write(id)
        repo, commit = self._repo(kind, id, json.loads(self.body or b"{}").get("startingPoint") or "main")
        if f"refs/heads/{branch}" in repo.refs:
            raise _Refused(409, "Reference already exists")
        repo.refs[f"refs/heads/{branch}"] = commit.id
        return {}

    @_route("POST", "/api/REPO/tag/REV")
    def _create_tag(self, kind, id, revision):
        self._require_write(id)
        repo, commit = self._repo(kind, id, revision)
        tag = json.loads(self.body)["tag"]
        if f"refs/tags/{tag}" in repo.refs:
            raise _Refused(409, "Tag reference exists already")
        repo.refs[f"refs/tags/{tag}"] = commit.id
        return {}

    @_route("DELETE", "/api/REPO/(branch|tag)/REV")
    def _delete_ref(self, kind, id, sort, name):
        self._require_write(id)
        repo, _ = self._repo(kind, id)
        if not repo.refs.pop(f"refs/{'heads' if sort == 'branch' else 'tags'}/{name}", None):
            raise _Refused(404, "No such reference", "RevisionNotFound")
        return {}

    @_route("POST", "/api/REPO/preupload/REV")
    def _preupload(self, kind, id, revision):
        if not self._is_for_pull_request:
            self._require_write(id)
        _, commit = self._repo(kind, id, revision)
        asked = json.loads(self.body)
        ignored = asked.get("gitIgnore")
        if ignored is None and ".gitignore" in commit.files:
            ignored = commit.files[".gitignore"].content.decode()
        patterns = [
            line.strip().rstrip("/") for line in (ignored or "").splitlines() if line.strip()[:1] not in ("", "#")
        ]
        files = []
        for file in asked["files"]:
            path, known = file["path"], commit.files.get(file["path"])
            names = [path, *path.split("/")]
            is_large = is_lfs(path, file["size"], base64.b64decode(file["sample"]))
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names),
                    "oid": known.etag if known else None,
                }
            )
        return {"files": files}

    @_route("POST", r"/GIT\.git/info/lfs/objects/batch")
    def _lfs_batch(self, kind, id):
        kind = kind or "models"
        repo, _ = self._repo(kind, id)
        base = f"{self.hub.endpoint}/{self._prefix(kind)}{id}.git/info/lfs/objects"
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size, limit = asked["oid"], asked["size"], self.hub.part_bytes
            entry = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                upload = {"href": f"{self.hub.endpoint}/lfs/{oid}"}
                if limit and size > limit:
                    parts = {str(n + 1): f"{self.hub.endpoint}/lfs/{oid}/{n + 1}" for n in range(-(-size // limit))}
                    upload = {
                        "href": f"{self.hub.endpoint}/lfs/{oid}/join",
                        "header": {"chunk_size": str(limit), **parts},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    @_route("PUT", "/lfs/([0-9a-f]{64})")
    def _lfs_put(self, oid):
        return self._store(oid, self.body)

    @_route("PUT", r"/lfs/([0-9a-f]{64})/(\d+)")
    def _lfs_put_part(self, oid, number):
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        return b"", {"ETag": hashlib.md5(self.body).hexdigest()}

    @_route("POST", "/lfs/([0-9a-f]{64})/join")
    def _lfs_join(self, oid):
        return self._store(oid, b"".join(part for _, part in sorted(self.hub.parts.pop(oid).items())))

    def _store(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "The content does not match its SHA-256")
        self.hub.stored[oid] = content
        return b"", {}

    @_route("POST", r"/GIT\.git/info/lfs/objects/verify")
    def _lfs_verify(self, kind, id):
        asked = json.loads(self.body)
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "No such object")
        return {}

    @_route("POST", "/api/REPO/commit/REV")
    def _commit(self, kind, id, revision):
        if not self._is_for_pull_request:
            self._require_write(id)
        elif not self._user:
            raise _Refused(401, "Invalid username or password.")
        repo, parent = self._repo(kind, id, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", parent.id) != parent.id:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        ref = f"refs/heads/{revision}"
        if self._is_for_pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref = f"refs/pr/{number}"
        elif ref not in repo.refs:
            if not revision.startswith("refs/pr/"):
                raise _Refused(400, f"{revision} is not a branch")
            ref = revision
        files = self._changed(dict(parent.files), lines)
        commit = repo.add(ref, files, header["summary"], header.get("description", ""), self._user.name, parent.id)
        url = f"{self.hub.endpoint}/{self._prefix(kind)}{id}"
        answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{url}/commit/{commit.id}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if self._is_for_pull_request else {})

    def _changed(self, files, lines):
        """Returns the files of a commit after the operations of a request."""
        for line in lines:
            path = line["value"].get("path")
            if line["key"] == "file":
                content, is_large = base64.b64decode(line["value"]["content"]), False
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.hub.stored:
                    raise _Refused(400, f"The object of {path} has not been uploaded")
                content, is_large = self.hub.stored[line["value"]["oid"]], True
            elif line["key"] in ("deletedFile", "deletedFolder"):
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
                continue
            else:
                continue
            stored = self.hub.mangle(path, content)
            if stored is not None:
                files[path] = File(stored, is_large)
        return files

    @property
    def _is_for_pull_request(self):
        return "create_pr" in self.query

    @staticmethod
    def _prefix(kind):
        return "datasets/" if kind == "datasets" else ""


def _entries(commit, folder, is_recursive):
    """Lists the files and folders below a folder, as the tree endpoint does."""
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        names = path[len(prefix) :].split("/")
        for depth in range(1, len(names) if is_recursive else min(2, len(names))):
            name = prefix + "/".join(names[:depth])
            entries[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        if is_recursive or len(names) == 1:
            entries[path] = file.as_json(path)
    return list(entries.values())


def _card_metadata(text):
    """Returns the metadata block of a card as a dict."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    return (yaml.safe_load(found[1]) or {}) if found else {}
