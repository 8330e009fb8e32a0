"""What a Hub holds: its users, and its repositories with their commits."""

import dataclasses
import functools
import hashlib
import json

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npy", ".parquet", ".wav", ".flac", ".mp3")  # as in .gitattributes
_LFS_BYTES = 10 * 2**20
_WRITING_ROLES = ("admin", "write", "contributor")


@dataclasses.dataclass
class User:
    """Who stands behind a token.

    Args:
        name: the user's namespace.
        role: the token's: `write`, `read`, or `fineGrained`, which may write what `scopes` names.
        orgs: organisation → role in it: admin, write, contributor or read.
        scopes: namespaces and repository ids that a fine-grained token may write.
    """

    name: str
    role: str = "write"
    orgs: dict = dataclasses.field(default_factory=dict)
    scopes: tuple = ()

    def why_not_write(self, id):
        """Returns why this user may not write a repository, in the Hub's words, or None."""
        namespace = id.split("/")[0]
        if self.role == "read" or (self.role == "fineGrained" and not {namespace, id} & set(self.scopes)):
            return "You must use a write token to upload to a repository"
        if namespace != self.name and self.orgs.get(namespace) not in _WRITING_ROLES:
            return f'You don\'t have the rights to write under the namespace "{namespace}"'
        return None


@dataclasses.dataclass
class File:
    """One file of a commit, either in git itself or in large file storage."""

    content: bytes
    is_lfs: bool

    @functools.cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def oid(self):
        """The id of the git blob: of the content, or of the pointer to it."""
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self):
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.oid

    def as_json(self, path):
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        entry = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        return entry | ({"lfs": lfs} if self.is_lfs else {})


@dataclasses.dataclass
class Commit:
    id: str
    parent: str | None
    files: dict  # path → File
    title: str
    message: str
    author: str


class Repo:
    """One repository: its commits, and what its branches, tags and pull requests point to.

    Attributes:
        commits: commit id → `Commit`.
        refs: full name, such as `refs/heads/main`, → commit id.
    """

    def __init__(self, kind, id, files, private=False, author="tester"):
        self.kind, self.id, self.private = kind, id, private
        self.commits, self.refs = {}, {}
        self.add("refs/heads/main", files, "initial commit", "", author)

    def add(self, ref, files, title, message, author, parent=None):
        """Adds a commit with these files on top of a reference and returns it; `parent` begins a new reference."""
        parent = parent or self.refs.get(ref)
        tree = [(path, file.oid) for path, file in sorted(files.items())]
        id = hashlib.sha1(
            json.dumps([self.kind, self.id, parent, title, len(self.commits), tree]).encode()
        ).hexdigest()
        self.commits[id] = Commit(id, parent, files, title, message, author)
        self.refs[ref] = id
        return self.commits[id]

    def find(self, revision):
        """Returns the commit of a branch, tag, pull request or commit id, or None."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return self.commits.get(revision)

    def history(self, commit):
        """Yields a commit and those before it."""
        while commit:
            yield commit
            commit = self.commits.get(commit.parent)


def as_file(path, content):
    """Returns a `File`, which goes to large file storage if it is large or not text."""
    return File(content, is_lfs(path, len(content), content[:512]))


def is_lfs(path, size, sample):
    return bool(size) and (path.endswith(LFS_SUFFIXES) or size > _LFS_BYTES or b"\0" in sample)
