"""What is nobody else's business: paths, names and tokens of the machine, kept out of whatever is published."""

import getpass
import json
import mmap
import os
import re
import socket
import tempfile
from pathlib import Path

from hfspeech.errors import UserError
from hfspeech.runs import CHECKOUT, write_json

# Names that say nothing of anybody.
COMMON_NAMES = {"root", "user", "admin", "ubuntu", "runner", "jovyan", "docker", "localhost", "colab", "nobody"}
LEAST_SECRET = 8  # characters that a secret has at least
# Files whose texts are names and tokens of a vocabulary: nothing in them is a path, and any word may be one of them.
VOCABULARY = {"tokenizer.json", "vocab.json", "normalizer.json", "added_tokens.json"}
NUMBERS = {".safetensors", ".pt", ".distcp"}  # of gigabytes, where a short name stands by chance

# From a slash, or what may stand before one, to the end of the word; not in an address, a fraction or "and/or".
_PATH = re.compile(r"(?<![\w:/.~<|-])(?:~|\.{1,2})?(?:/[^\s'\"`<>|,;:()\[\]{}]+)+")
_LOADED_FROM = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}  # of transformers' files
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")


class Cleaner:
    """Makes a run's JSON fit to be read by anyone: paths become relative to the checkout, or bare names.

    Args:
        record: the run's `run.json`; its settings say which paths there are, spaces and all.
    """

    def __init__(self, record):
        paths = {leaf for leaf in _leaves(record["arguments"]) if "/" in leaf and leaf[0] in "/~."}
        self.known = sorted((path for path in paths if Path(path).name not in ("", "~", "..")), key=len, reverse=True)

    def text(self, text):
        """Returns a text with its paths cleaned."""
        for path in self.known:
            text = text.replace(path, _public_path(path))
        return _PATH.sub(lambda match: _public_path(match[0]), text)

    def value(self, value):
        """Returns a JSON-able value with the paths in all its texts cleaned, keys of dicts included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(entry) for entry in value]
        if isinstance(value, dict):
            return {self.text(name): self.value(entry) for name, entry in value.items()}
        return value


def forget_origin(path):
    """Takes out of one of transformers' JSON files where it was loaded from."""
    value = json.loads(
        path.read_text(encoding="utf-8"),
        object_hook=lambda entry: {name: of for name, of in entry.items() if name not in _LOADED_FROM},
    )
    write_json(path, value)


def public_record(record):
    """Returns the record of a run as it may be published: without paths, and without rows given as examples."""
    record = Cleaner(record).value(record)
    rows = record.get("rows", {})
    for entry in rows.get("account", {}).get("splits", {}).values():
        for left_out in entry["dropped"].values():
            left_out.pop("example", None)  # it quotes the row
    for entry in rows.get("bad_audio", {}).values():
        entry.pop("examples", None)
    return record


def require_private(folder, public_names=()):
    """Looks into every byte of a folder for what would tell of the machine or its user.

    Looked for are tokens and other secrets of the environment, the home folder, the checkout, folders for temporary
    files, and, where they are more than `root`, the names of user and host. Where a word or a name stands by chance,
    it is no secret: those of the environment are not looked for in a vocabulary, nor user and host in weights.

    Args:
        folder: what is to be published.
        public_names: names that are public in any case, such as the owner of the repository.

    Raises:
        UserError: something was found; which file holds what.
    """
    needles = list(_needles(set(public_names)))
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if not path.stat().st_size:
            continue
        patterns = [(what, pattern) for what, pattern, spared in needles if not spared & {path.name, path.suffix}]
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = next((what for what, pattern in patterns if pattern.search(content)), None)
        if found:
            raise UserError(
                f"Nothing is uploaded, for {path.relative_to(folder)} holds {found}: take it out of the run's folder, "
                "and push again."
            )


def _needles(public_names):
    """Yields (what it is, pattern of bytes that gives it away, names and suffixes of files in which it does not)."""
    from huggingface_hub import get_token

    yield "a token of the Hub", _TOKEN, set()
    secret = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")
    secrets = {f"the secret of {name}": value for name, value in os.environ.items() if secret.search(name)}
    for what, value in {**secrets, "the token of `hf auth login`": get_token() or ""}.items():
        if len(value) >= LEAST_SECRET:
            yield what, re.compile(re.escape(value.encode())), VOCABULARY
    folders = {"your home folder": Path.home()} | ({"the path of the checkout": CHECKOUT} if CHECKOUT else {})
    folders["the working folder"] = Path.cwd()
    folders["a path of temporary files"] = Path(tempfile.gettempdir())
    for what, path in folders.items():
        if path != Path(path.anchor):
            # In weights of gigabytes a short path stands by chance, but not with a further name after it.
            end = rb"(?![\w.-])" if len(str(path)) > LEAST_SECRET else rb"/[\w.-]+"
            yield what, re.compile(re.escape(os.fsencode(path)) + end), set()
    user, host = (name.encode() for name in (_user(), socket.gethostname()))
    if _is_telling(user.decode(), public_names):
        pattern = rb"[/\\~]" + re.escape(user) + rb"(?=[/\\])|\b" + re.escape(user) + rb"@"
        yield "your user name", re.compile(pattern), NUMBERS
    if _is_telling(host.decode(), public_names) and re.search(rb"[\d.-]", host):  # else it is a word like any other
        yield "the name of this machine", re.compile(rb"\b" + re.escape(host) + rb"\b"), NUMBERS


def _is_telling(name, public_names):
    return len(name) >= 4 and name.lower() not in COMMON_NAMES | {name.lower() for name in public_names}


def _user():
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in some containers
        return ""


def _public_path(path):
    """Returns a path relative to the checkout if it lies in there, and else its last name; a Hub id as it is."""
    if path[:1] not in ("/", "~", "."):
        return path
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    inside = CHECKOUT and whole.is_relative_to(CHECKOUT) and whole != CHECKOUT
    return whole.relative_to(CHECKOUT).as_posix() if inside else whole.name


def _leaves(value):
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, (list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry)
