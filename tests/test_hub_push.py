"""Uploads that arrive whole or say why not: the real client, in a process of its own, against a Hub that fails."""

import json
import shutil
import subprocess
import sys

import pytest
from loopback_hub import ALWAYS, TOKEN, LoopbackHub, User

from hfspeech.publish.push import OWN_FILES

# The client reads its environment when it is imported, so it has a process; the token may change with every call.
CLIENT = """
import dataclasses, json, os, sys
from hfspeech import hub
for line in sys.stdin:
    function, token, args, kwargs = json.loads(line)
    os.environ["HF_TOKEN"] = token
    try:
        found = getattr(hub, function)(*args, **kwargs)
        found = (found[0] and found[0].sha, found[1]) if function == "look_up" else found
        answer = {"found": dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found}
    except hub.UserError as error:
        answer = {"error": str(error), "type": type(error).__name__}
    print(json.dumps(answer, default=str), flush=True)
"""


class Client:
    """Calls functions of `hfspeech.hub` in a process that takes a loopback Hub for the Hub."""

    def __init__(self, env):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env={**env, "HF_HUB_OFFLINE": env.get("HF_HUB_OFFLINE", "0")}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, function, *args, token=TOKEN, **kwargs):
        """Returns what a function returned as JSON, or the sentence of its error."""
        self.process.stdin.write(json.dumps([function, token, list(map(str, args)), kwargs]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert not token or token not in json.dumps(answer)
        self.last_type = answer.get("type")
        return answer.get("found", answer.get("error"))

    def push(self, *args, tries=6, first_wait_s=0.01, **kwargs):
        return self("upload_folder", *args, tries=tries, first_wait_s=first_wait_s, **kwargs)

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a repository of each of three owners; `tester` may write in one of two organisations."""
    repos = tmp_path_factory.mktemp("repos")
    for id in ("tester/old", "acme/old", "stranger/old"):
        (repos / "models" / id).mkdir(parents=True)
        (repos / "models" / id / "config.json").write_text("{}")
    with LoopbackHub(repos) as hub:
        hub.users[TOKEN].orgs["readers"] = "read"
        hub.users |= {
            "hf_readonlyreadonly": User("tester", "read"),
            "hf_finefinefinefine": User("tester", "fineGrained", {"acme": "write"}, scopes=("acme",)),
        }
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub.env(tmp_path_factory.mktemp("home")))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def healthy(hub):
    """Every test begins with a Hub that works."""
    yield
    hub.faults.clear()
    hub.part_bytes, hub.mangle = None, lambda path, content: content
    hub.requests.clear()


@pytest.fixture
def folder(tmp_path):
    """Something to push: a card, weights of 1 MB, a file in a folder, an empty one."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / "model.safetensors").write_bytes(str(tmp_path).encode() * 10_000)  # the Hub stores the same file once
    (folder / "sub/vocab.json").write_text('{"a": 0}')
    (folder / "empty.txt").write_text("")
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub, id, revision="main", kind="models"):
    """Returns path → bytes of what a repository holds, but for what the Hub adds itself."""
    files = {path: hub.read(kind, id, path, revision) for path in hub.files(kind, id, revision)}
    files.pop(".gitattributes", None)
    return files


def commits(hub, id):
    repo = hub.repo("models", id)
    return [commit.title for commit in repo.history(repo.find("main"))]


# Before anything is spent


@pytest.mark.parametrize(
    "id, token, words",
    [
        ("new", "", ["no token", "hf auth login"]),
        ("new", "hf_expiredexpired", ["token is not valid", "hf auth login", "--force"]),
        ("new", "hf_readonlyreadonly", ["may only read"]),
        ("acmee/new", TOKEN, ["acmee is not yours", "Did you mean acme?", "tester"]),
        ("stranger/old", TOKEN, ["stranger is not yours"]),
        ("readers/new", TOKEN, ["not write in the organisation readers", "tester/new"]),
        ("new", "hf_finefinefinefine", ["may not write to tester/new"]),
        ("so/many/parts", TOKEN, ["owner/name"]),
        ("bad name!", TOKEN, ["owner/name"]),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_at_once(client, id, token, words):
    sentence = client("require_write_access", id, token=token)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_a_push_that_may_succeed(client, hub):
    assert client("require_write_access", "new") == "tester/new"
    assert client("require_write_access", "tester/old") == "tester/old"
    assert client("require_write_access", "acme/new") == "acme/new"
    assert client("require_write_access", "acme/new", token="hf_finefinefinefine") == "acme/new"
    assert client("require_write_access", "stranger/old", create_pr=True) == "stranger/old"
    assert "no model stranger/new" in client("require_write_access", "stranger/new", create_pr=True)
    assert not [request for request in hub.requests if request[0] != "GET"]  # it changes nothing


def test_what_is_public_does_not_become_private_by_asking(client):
    assert "tester/old is public already" in client("require_write_access", "tester/old", private=True)


def test_a_member_whose_repository_is_closed_to_them(client, hub):
    hub.fail("GET", "auth-check/write", status=403)
    assert "acme/old cannot be written" in client("require_write_access", "acme/old")


def test_no_hub_and_offline(hub, tmp_path):
    nowhere = Client(hub.env(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9", "HFSPEECH_HUB_TRIES": "1"})
    offline = Client(hub.env(tmp_path) | {"HF_HUB_OFFLINE": "1"})
    assert "the Hub cannot be reached" in nowhere("require_write_access", "new")
    assert "unset HF_HUB_OFFLINE" in offline("require_write_access", "new")
    nowhere.close()
    offline.close()


# What arrives


def test_everything_arrives_in_one_commit_and_once(client, hub, folder):
    first = client.push(folder, "once", private=True, tag="v1")
    assert first["repo_id"] == "tester/once" and first["commit"] == hub.commit("models", "tester/once", "v1")
    assert first["url"] == f"{hub.endpoint}/tester/once/tree/v1" and first["pr_url"] is None
    assert hub.repo("models", "tester/once").private
    assert pushed(hub, "tester/once") == contents(folder)
    assert client.push(folder, "once", tag="v1") == first  # a second time there is nothing to add
    assert len(commits(hub, "tester/once")) == 2  # the Hub's own first commit, and ours
    (folder / "sub/vocab.json").write_text('{"b": 0}')
    assert "has a tag v1 already" in client.push(folder, "once", tag="v1")
    assert client.push(folder, "once", tag="v2")["commit"] != first["commit"]
    assert pushed(hub, "tester/once", "v1")["sub/vocab.json"] == b'{"a": 0}'
    assert "has a tag v1 already" in client("require_write_access", "once", tag="v1")


def test_files_that_a_push_replaces(client, hub, folder):
    """A star stays within its folder: other configurations and other people's folders are not its business."""
    others = {"sub/vocab.json", "onnx/old.safetensors", "data/en/train-0.parquet"}
    for name in (*others, "data/train-0.parquet", "last-checkpoint/shards/0.distcp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    client.push(folder, "replaced")
    for name in ("sub", "onnx", "data", "last-checkpoint"):
        shutil.rmtree(folder / name)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    client.push(folder, "replaced", replaces=[*OWN_FILES, "data/*.parquet"])
    assert set(pushed(hub, "tester/replaced")) == {*contents(folder), *others}


def test_branch_and_pull_request(client, hub, folder):
    branch = client.push(folder, "acme/old", revision="trial")
    assert branch["revision"] == "trial" and branch["url"].endswith("/acme/old/tree/trial")
    assert pushed(hub, "acme/old") == {"config.json": b"{}"} == pushed(hub, "stranger/old")
    assert contents(folder).items() < pushed(hub, "acme/old", "trial").items()
    hub.fail("POST", "/commit/", lost=True)  # must not be opened twice
    proposed = client.push(folder, "stranger/old", create_pr=True)
    assert proposed["pr_url"] == f"{hub.endpoint}/stranger/old/discussions/1" and proposed["revision"] == "refs/pr/1"
    assert contents(folder).items() < pushed(hub, "stranger/old", "refs/pr/1").items()
    assert "refs/pr/2" not in hub.repo("models", "stranger/old").refs


@pytest.mark.parametrize(
    "name, fault",
    [
        ("unavailable", {"path": "/commit/", "status": 503, "times": 3}),
        ("busy", {"path": "/repos/create", "status": 429, "headers": {"Retry-After": "0"}, "times": 2}),
        ("limited", {"path": "/commit/", "status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}),
        ("looking", {"path": "/api/models/", "method": "GET", "status": 502}),
        ("whoami", {"path": "whoami", "method": "GET", "cut": True}),
        ("cut-upload", {"path": "/lfs/[0-9a-f]{64}", "method": "PUT", "cut": True}),
        ("cut-commit", {"path": "/commit/", "cut": True}),
        ("lost-upload", {"path": "/lfs/[0-9a-f]{64}", "method": "PUT", "lost": True}),
        ("lost-create", {"path": "/repos/create", "lost": True}),
        ("lost-commit", {"path": "/commit/", "lost": True}),
        ("lost-tag", {"path": "/tag/", "lost": True}),
        ("silent", {"path": "/commit/", "delay_s": 1.0}),
    ],
)
def test_what_passes_by_itself_is_waited_for(client, hub, folder, name, fault):
    hub.fail(**{"method": "POST", **fault})
    found = client.push(folder, name, tag="v1", silence_s=0.5 if name == "silent" else 60)
    assert pushed(hub, f"tester/{name}", "v1") == contents(folder), found
    assert len(commits(hub, f"tester/{name}")) == 2 and found["commit"] == hub.commit("models", f"tester/{name}")
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_large_file_goes_in_parts(client, hub, folder):
    hub.part_bytes = 300_000
    hub.fail("PUT", "/lfs/.*/3", cut=True)
    client.push(folder, "parts")
    assert pushed(hub, "tester/parts") == contents(folder)


def test_a_push_that_fails_says_why(client, hub, folder):
    def failure(name, **fault):
        hub.fail(**{"method": "POST", **fault})
        sentence = client.push(folder, name, tries=2)
        hub.faults.clear()
        assert client.last_type == "PushFailed" and f"tester/{name}" in sentence and sentence.endswith(".")
        return sentence

    assert "the Hub answered 503" in failure("down", path="/commit/", status=503, times=ALWAYS)
    assert "token may do" in failure("refused", path="/commit/", status=403)
    assert "cannot be reached" in failure("gone", path="/commit/", cut=True, times=ALWAYS)
    assert "the Hub answered 507" in failure("full", path="/commit/", status=507)
    assert pushed(hub, "tester/full") == {}  # nothing of it is half there
    hub.fail("POST", "/tag/", status=403)
    assert "the tag v1 could not be set" in client.push(folder, "untagged", tag="v1")
    assert pushed(hub, "tester/untagged") == contents(folder)


@pytest.mark.parametrize("loss", ["a file", "a bit", "the end"])
def test_what_does_not_arrive_is_noticed(client, hub, folder, loss):
    def mangle(path, content):
        if path != "model.safetensors":
            return content
        return {"a file": None, "a bit": b"\1" + content[1:], "the end": content[:-1]}[loss]

    hub.mangle = mangle
    sentence = client.push(folder, loss.replace(" ", "-"))
    assert client.last_type == "PushFailed" and "model.safetensors has not arrived" in sentence
    hub.mangle = lambda path, content: content
    client.push(folder, loss.replace(" ", "-"))
    assert pushed(hub, f"tester/{loss.replace(' ', '-')}") == contents(folder)


def test_no_message_shows_a_token(client):
    assert client("redact", f"Bearer {TOKEN}, hf_{'a' * 34}") == "Bearer …, hf_…"


def test_a_card_that_the_hub_refuses(client, folder):
    (folder / "README.md").write_text("---\nbase_model: /home/me/whisper\n---\n")
    assert "base_model" in client.push(folder, "card")


# And back


def test_commit_and_file_of_a_revision(client, hub, folder):
    client.push(folder, "back", tag="v1")
    first = hub.commit("models", "tester/back")
    (folder / "sub/vocab.json").write_text("{}")
    client.push(folder, "back")
    assert client("look_up", "tester/back", revision="v1") == [first, None]
    assert client("look_up", "tester/back")[0] == hub.commit("models", "tester/back") != first
    assert "no revision v9" in client("look_up", "tester/back", revision="v9")
    assert "no dataset tester/back" in client("look_up", "tester/back", repo_type="dataset")
    for revision, content in (("v1", '{"a": 0}'), (None, "{}")):
        with open(client("fetch_file", "tester/back", "sub/vocab.json", revision=revision)) as file:
            assert file.read() == content
    assert client("fetch_file", "tester/back", "missing.json") is None
