"""The way to the Hub and back: who may write where, uploads that arrive whole, and what a revision stands for.

The token is that of `HF_TOKEN` or of `hf auth login`; it never appears in a message.
"""

import dataclasses
import hashlib
import logging
import os
import re
import time
from pathlib import Path, PurePosixPath

from .errors import UserError, nearest

logger = logging.getLogger("hfspeech")

TRIES = int(_given) if (_given := os.environ.get("HFSPEECH_HUB_TRIES", "")).isdigit() else 8  # two minutes in all
FIRST_WAIT_S = 1.0  # doubled after each try
MOST_WAIT_S = 60.0  # unless the Hub asks for more
MOST_ASKED_WAIT_S = 600.0
SILENCE_S = 120.0  # of a connection, after which it is given up

_PASSING = (408, 425, 429, 500, 502, 503, 504)
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_NEW_TOKEN = f"make one that may write at {_TOKENS_PAGE}, then type `hf auth login` (with --force in place of another token) or set HF_TOKEN"


class PushFailed(UserError):
    """An upload that was tried often enough; the message says what failed, and what has arrived stays there."""


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What an upload became.

    Attributes:
        repo_id: `owner/name`.
        commit: the commit that holds the files.
        url: page of that revision.
        revision: what to load it by: a tag, branch or `refs/pr/1`, or None for `main`.
        pr_url: page of the pull request, or None.
    """

    repo_id: str
    commit: str
    url: str
    revision: str | None = None
    pr_url: str | None = None


def redact(text):
    """Returns a text without anything that looks like a token of the Hub, or is the one in use."""
    from huggingface_hub import get_token

    text = re.sub(r"\b(hf|api)_[A-Za-z0-9]{20,}", r"\1_…", str(text))
    token = get_token()
    return text.replace(token, "…") if token else text


def require_write_access(repo_id, repo_type="model", private=None, revision=None, tag=None, create_pr=False):
    """Sees that an upload will be allowed, before anything is spent on what is to be uploaded.

    Args:
        repo_id: `owner/name`, or a bare name for the user's own namespace.
        repo_type: `model` or `dataset`.
        private, revision, create_pr: as for `upload_folder`.
        tag: one that must not be there yet.

    Returns:
        The full id of the repository, which need not exist yet.

    Raises:
        UserError: no token, or one that is not valid or may not write there; an id that is none; a repository,
            branch or tag that cannot be written; no way to the Hub.
    """
    repo = _Repo(repo_id, repo_type, private, revision, tag, create_pr, min(TRIES, 3))
    if repo.exists:
        repo.ask(f"{repo.id} could not be looked up", repo.require_free_tag)
    return repo.id


def upload_folder(
    folder,
    repo_id,
    repo_type="model",
    private=None,
    revision=None,
    tag=None,
    create_pr=False,
    commit_message="Upload with hfspeech",
    replaces=(),
    tries=None,
    first_wait_s=FIRST_WAIT_S,
    silence_s=SILENCE_S,
):
    """Uploads a folder in one commit, sees that every file has arrived whole, and tags it.

    Whatever may pass by itself (a lost connection, an overloaded Hub) is tried again. What is there already is not
    uploaded again, so that repeating an upload whose answer got lost adds nothing.

    Args:
        folder: what to upload, all of it.
        repo_id: `owner/name`, or a bare name for the user's own namespace; made if it is not there.
        repo_type: `model` or `dataset`.
        private: make it private; a repository that is public already is then refused.
        revision: branch, made if it is not there. Default: `main`.
        tag: name for the commit, such as v1.
        create_pr: open a pull request instead of writing to the branch.
        commit_message: first line of the commit.
        replaces: patterns of files that go out of the repository with this commit, unless the folder has them; a `*`
            stays within one folder.
        tries: how often each step is tried, `first_wait_s` and then twice as long apart. Default: HFSPEECH_HUB_TRIES, or 8.
        silence_s: how long the Hub may be silent before a connection is given up.

    Returns:
        `Pushed`.

    Raises:
        UserError: as `require_write_access`.
        PushFailed: the upload did not succeed, or something of it has not arrived.
    """
    repo = _Repo(repo_id, repo_type, private, revision, tag, create_pr, tries or TRIES, first_wait_s, silence_s)
    return repo.upload(Path(folder), commit_message, replaces)


def look_up(name, revision=None, repo_type="model", flag="--model_revision"):
    """Asks the Hub for a repository, such as for the commit that a revision stands for.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit. Default: `main`.
        repo_type: `model` or `dataset`.
        flag: what the revision is given by, for messages.

    Returns:
        (its `ModelInfo` or `DatasetInfo`, whose `sha` is the commit, None), or (None, why the Hub could not be asked).

    Raises:
        UserError: the Hub has no such repository or revision, or refuses it.
    """
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=30), None
    except errors.GatedRepoError:
        raise UserError(gated(name, repo_type)) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"The {repo_type} {name} has no revision {revision}; see {flag}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"There is no {repo_type} {name} on the Hub, or it is private: look at the spelling, or type `hf auth login`."
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{name} is neither a path here nor a Hub id such as owner/name.") from None
    except Exception as error:  # whatever the HTTP client raises when nobody answers
        return None, _explain(error)[0]


def gated(name, repo_type):
    """Returns the sentence about a repository whose files have to be asked for."""
    return (
        f"Access to the {repo_type} {name} has to be granted first: ask for it on its page on the Hub, "
        "then type `hf auth login`."
    )


def stated_license(card):
    """Returns the license that the head of a repository's card states, several with commas between, or None.

    Args:
        card: the head as a dict or a `CardData`, or None.
    """
    found = (card or {}).get("license") or []
    return ", ".join(map(str, found if isinstance(found, list) else [found])) or None


def license_in(readme):
    """Returns the license that the head of a README.md states, or None if there is no such file or head."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return stated_license(metadata_load(readme))
    except (OSError, ValueError, yaml.YAMLError):  # a README of another kind
        return None


def fetch_file(repo_id, filename, repo_type="model", revision=None, missing_ok=False):
    """Downloads one file of a repository into the cache.

    Args:
        repo_id, filename, repo_type, revision: which.
        missing_ok: whether there may be no such repository or revision.

    Returns:
        Its `Path`, or None if there is no such file.

    Raises:
        UserError: no such repository or revision, no access, or no way to the Hub and no copy in the cache.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        info, unreachable = look_up(repo_id, revision, repo_type, "--revision")
    except UserError:
        if missing_ok:
            return None
        raise
    commit = info.sha if info else revision
    try:
        return Path(_patiently(lambda: hf_hub_download(repo_id, filename, repo_type=repo_type, revision=commit), 3))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{filename} of {repo_id} is not in the cache, and {unreachable or _explain(error)[0]}."
        ) from None
    except errors.EntryNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"{filename} of {repo_id} cannot be downloaded: {_explain(error)[0]}.") from None


class _Repo:
    """A repository that may be written, as found when this is made; see `upload_folder` for the arguments."""

    def __init__(
        self, id, type, private, revision, tag, create_pr, tries, first_wait_s=FIRST_WAIT_S, silence_s=SILENCE_S
    ):
        from huggingface_hub import HfApi

        self.api, self.type = HfApi(), type
        self.private, self.tag, self.create_pr = private, tag, create_pr
        self.branch = None if revision == "main" else revision
        self.patience = {"tries": tries, "first_wait_s": first_wait_s, "silence_s": silence_s}
        if create_pr and (revision or tag):
            raise UserError("A pull request goes to main and has no tag: leave its revision and its tag out.")
        user = self._user()
        self.id = _full_id(id, user["name"])
        self._require_rights(user)
        self.exists = self._look()

    # What is allowed

    def _user(self):
        """Returns what the Hub says of the token's user."""
        import huggingface_hub
        from huggingface_hub import get_token

        if huggingface_hub.is_offline_mode():
            raise UserError(
                "The offline mode is on, so nothing can be pushed: unset HF_HUB_OFFLINE."
            )
        if not get_token():
            raise UserError(f"There is no token for the Hub: {_NEW_TOKEN}.")
        return self.ask("The Hub could not be asked who you are", self.api.whoami)

    def _require_rights(self, user):
        namespace = self.id.split("/")[0]
        token = user.get("auth", {}).get("accessToken", {})
        orgs = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
        if token.get("role") == "read":
            raise UserError(f"Your token may only read: {_NEW_TOKEN}.")
        if self.create_pr:
            return
        if namespace != user["name"] and namespace not in orgs:
            own = [user["name"], *orgs]
            raise UserError(
                f"{namespace} is not yours, so {self.id} cannot be written.{nearest(namespace, own)} "
                f"Choose a name under {' or '.join(own)}."
            )
        if orgs.get(namespace) == "read":
            raise UserError(
                f"You may read but not write in the organisation {namespace}: ask its admins for the role write, or push "
                f"to {user['name']}/{self.id.split('/')[1]}."
            )
        if token.get("role") == "fineGrained":
            scopes = token.get("fineGrained", {}).get("scoped", [])
            writable = [scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]]
            if not {namespace, self.id, None} & set(writable):
                raise UserError(
                    f"Your fine-grained token may not write to {self.id}: add write access to {namespace} at {_TOKENS_PAGE}."
                )

    def _look(self):
        """Sees whether the repository can be written as is asked, if it exists; returns whether it does."""
        from huggingface_hub import errors

        def info():
            try:
                return self.api.repo_info(self.id, repo_type=self.type)
            except errors.RepositoryNotFoundError:
                return None

        found = self.ask(f"{self.id} could not be looked up", info)
        if self.create_pr and not found:
            raise UserError(f"There is no {self.type} {self.id} to open a pull request for: check its name.")
        if self.create_pr or not found:
            return bool(found)
        self.ask(f"{self.id} cannot be written", lambda: self.api.auth_check(self.id, repo_type=self.type, write=True))
        if self.private and not found.private:
            raise UserError(
                f"{self.id} is public already, so what is pushed would be, too: make it private in its settings on the "
                "Hub, or choose another name."
            )
        return True

    def require_free_tag(self):
        """Raises a `UserError` if the tag is there already."""
        if self.tag and (commit := self._tags().get(self.tag)):
            raise UserError(f"{self.id} has a tag {self.tag} already, of {commit[:8]}: choose another name for it.")

    def _tags(self):
        refs = self.api.list_repo_refs(self.id, repo_type=self.type)
        return {ref.name: ref.target_commit for ref in refs.tags}

    def _pull_requests(self):
        """Returns the references of all pull requests, such as refs/pr/1, each with its commit."""
        refs = self.api.list_repo_refs(self.id, repo_type=self.type, include_pull_requests=True)
        return {ref.ref: ref.target_commit for ref in refs.pull_requests}

    # Uploading

    def upload(self, folder, message, replaces):
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self.local = {name: _LocalFile(path) for name, path in files.items()}
        logger.info(
            "Pushing %d files, %.1f MB, to %s",
            len(files),
            sum(file.size for file in self.local.values()) / 1e6,
            self.id,
        )
        if not self.exists:
            private = {"private": True} if self.private else {}
            self.ask(self._what, lambda: self.api.create_repo(self.id, repo_type=self.type, exist_ok=True, **private))
        if self.branch and not self.branch.startswith("refs/"):
            self.ask(
                self._what,
                lambda: self.api.create_branch(self.id, branch=self.branch, repo_type=self.type, exist_ok=True),
            )
        known = self.ask(self._what, self._pull_requests) if self.create_pr else {}
        commit, pr = self.ask(self._what, lambda: self._commit(message, replaces, known))
        if self.tag:
            what = f"{self.id} holds all files at {commit[:8]}, but the tag {self.tag} could not be set"
            self.ask(what, lambda: self._set_tag(commit))
        page = f"{self.api.endpoint}/{'datasets/' if self.type == 'dataset' else ''}{self.id}"
        revision = pr or self.tag or self.branch
        return Pushed(
            self.id,
            commit,
            f"{page}/tree/{revision}" if revision and not pr else page,
            revision,
            f"{page}/discussions/{pr.split('/')[-1]}" if pr else None,
        )

    def _commit(self, message, replaces, known_prs):
        """Commits what differs; returns the commit, and the reference of its pull request or None."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self.create_pr:  # one whose answer got lost is not opened again
            for ref, commit in self._pull_requests().items():
                if ref not in known_prs and not self._differences(ref, replaces):
                    return commit, ref
        differing = self._differences(self.branch, replaces)
        if not differing:
            return self.api.repo_info(self.id, revision=self.branch, repo_type=self.type).sha, None
        self.require_free_tag()
        operations = [
            CommitOperationAdd(name, self.local[name].path)
            if name in self.local
            else CommitOperationDelete(name, is_folder=False)
            for name in differing
        ]
        info = self.api.create_commit(
            self.id,
            operations,
            commit_message=message,
            repo_type=self.type,
            revision=self.branch,
            create_pr=self.create_pr,
        )
        if differing := self._differences(info.pr_revision or info.oid, replaces):
            raise PushFailed(
                f"{self.id} was written, but {differing[0]} has not arrived as it is here: push again, and see that no "
                ".gitignore of the repository keeps it out."
            )
        return info.oid, info.pr_revision

    def _differences(self, revision, replaces):
        """Returns the files that a revision lacks or holds otherwise, and those there that should be gone."""
        entries = self.api.list_repo_tree(self.id, recursive=True, revision=revision, repo_type=self.type)
        there = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        stale = [name for name in there.keys() - self.local.keys() if any(_matches(name, p) for p in replaces)]
        return [name for name, file in self.local.items() if not file.equals(there.get(name))] + sorted(stale)

    def _set_tag(self, commit):
        if self._tags().get(self.tag) != commit:
            self.api.create_tag(self.id, tag=self.tag, revision=commit, repo_type=self.type)

    @property
    def _what(self):
        return f"The push to {self.id} failed"

    def ask(self, what, call):
        """Calls the Hub patiently; ends in `PushFailed` that begins with `what`."""
        try:
            return _patiently(call, **self.patience)
        except UserError:
            raise
        except Exception as error:
            raise PushFailed(redact(f"{what}: {_explain(error)[0]}.")) from None


class _LocalFile:
    """A file here, to be held against the same one there."""

    def __init__(self, path):
        self.path, self.size, self.digests = path, path.stat().st_size, {}

    def equals(self, entry):
        """Tells whether a file of the Hub (`RepoFile` or None) has this content."""
        if entry is None or entry.size != self.size:
            return False
        return entry.lfs.sha256 == self._digest("sha256") if entry.lfs else entry.blob_id == self._digest("sha1")

    def _digest(self, algorithm):
        if algorithm not in self.digests:
            digest = hashlib.new(algorithm)
            if algorithm == "sha1":  # of a git blob
                digest.update(b"blob %d\0" % self.size)
            with self.path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
            self.digests[algorithm] = digest.hexdigest()
        return self.digests[algorithm]


def _matches(name, pattern):
    """Tells whether a path is one that a pattern means: folder by folder, so that `*.txt` leaves `a/b.txt` alone."""
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _full_id(id, user):
    """Returns `owner/name` for an id that may lack its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    full = id if "/" in id else f"{user}/{id}"
    try:
        validate_repo_id(full)
    except HFValidationError:
        raise UserError(
            f"{id!r} cannot be the name of a repository: write owner/name, with letters, digits, - _ and . only."
        ) from None
    return full


def _patiently(call, tries=None, first_wait_s=FIRST_WAIT_S, silence_s=SILENCE_S):
    """Calls the Hub, and again after a while if what went wrong may pass by itself."""
    from huggingface_hub import get_session

    tries, wait_s = tries or TRIES, first_wait_s
    for attempt in range(1, tries + 1):
        get_session().timeout = silence_s  # else a connection that falls silent is waited for without end
        try:
            return call()
        except Exception as error:
            reason, may_pass, asked_wait_s = _explain(error)
            if not may_pass or attempt == tries or (asked_wait_s or 0) > MOST_ASKED_WAIT_S:
                raise
        pause_s = wait_s if asked_wait_s is None else asked_wait_s
        logger.warning("%s: try %d of %d in %g s", redact(reason.split(";")[0]), attempt + 1, tries, pause_s)
        time.sleep(pause_s)
        wait_s = min(2 * wait_s, MOST_WAIT_S)


def _explain(error):
    """Returns what went wrong as part of a sentence, whether it may pass by itself, and the seconds the Hub asks for."""
    from huggingface_hub import errors
    from huggingface_hub.utils import parse_ratelimit_headers

    while error.__cause__ and not isinstance(error, (errors.HfHubHTTPError, UserError, ValueError)):
        error = error.__cause__  # an upload that fails in a thread is wrapped
    if isinstance(error, UserError):
        return str(error), False, None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the offline mode is on (unset HF_HUB_OFFLINE)", False, None
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = (error.server_message or "").strip().split("\n")[0].rstrip(".")
        if status in _PASSING:
            headers = error.response.headers
            limit = parse_ratelimit_headers(headers)  # the Hub's own, sent with every answer
            asked = str(limit.reset_in_seconds) if limit and not limit.remaining else headers.get("Retry-After", "")
            return f"the Hub answered {status}; try again later", True, float(asked) if asked.isdigit() else None
        if status == 401:
            return f"the token is not valid, or no longer; {_NEW_TOKEN}", False, None
        if status == 403:
            what_it_may = f"see what your token may do at {_TOKENS_PAGE}"
            return f"the Hub refuses it ({said or 'forbidden'}); {what_it_may}", False, None
        return f"the Hub answered {status}" + (f" ({said})" if said else ""), False, None
    if isinstance(error, (ValueError, TypeError, KeyError)) or getattr(error, "filename", None):
        return " ".join(str(error).split()).rstrip("."), False, None
    # Whatever the HTTP client raises when nobody answers, or no longer.
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".rstrip(".: ")
    return f"the Hub cannot be reached ({said}); see that the network is up", True, None
