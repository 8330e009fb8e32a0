"""From a run to the Hub: packed and checked here, uploaded whole, and never lost with what went before."""

import logging
import shlex
import tempfile
from pathlib import Path

from hfspeech.errors import UserError
from hfspeech.hub import redact, require_write_access, upload_folder
from hfspeech.publish.tables import loading_code
from hfspeech.runs import default_repo_name, writing

# What one push may leave behind and another one does not write: an adapter, say, where the model was merged before.
OWN_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
OWN_FILES += tuple(f"{folder}/{files}" for folder in ("checkpoint-*", "last-checkpoint") for files in ("*", "*/*"))

logger = logging.getLogger("hfspeech")


def push(
    run_dir,
    repo_id=None,
    merge=False,
    private=None,
    revision=None,
    tag=None,
    create_pr=False,
    with_checkpoint=False,
):
    """Packs a run into a folder of its own, uploads that, and prints where it is and how to load it.

    Args:
        run_dir: output folder of a finished run.
        repo_id: `owner/name`, or a bare name for the user's own namespace. Default: the name of the folder.
        merge: upload the whole model and not its adapter.
        private, revision, tag, create_pr: as for `hfspeech.hub.upload_folder`.
        with_checkpoint: also upload the last checkpoint with the optimizer's state, for others to train on from.

    Returns:
        `hfspeech.hub.Pushed`.

    Raises:
        UserError: the run is not whole, or may not be uploaded there.
        PushFailed: the upload did not succeed.
    """
    from hfspeech.publish.package import finished_record, package

    finished_record(Path(run_dir))
    where = {"private": private, "revision": revision, "tag": tag, "create_pr": create_pr}
    repo_id = require_write_access(repo_id or default_repo_name(run_dir), **{**where, "tag": None})
    with tempfile.TemporaryDirectory(prefix="hfspeech-") as folder, writing(folder, "set TMPDIR to a larger disk"):
        package(Path(run_dir), Path(folder), merge=merge, with_checkpoint=with_checkpoint, repo_id=repo_id)
        pushed = upload_folder(folder, repo_id, replaces=OWN_FILES, **where)
        code = loading_code(Path(folder), pushed.repo_id, pushed.revision)
    nothing_new = create_pr and not pushed.pr_url
    done = "No pull request was opened, for all of it is there already:" if nothing_new else "Pushed to"
    print(f"{done} {pushed.pr_url or pushed.url}\nLoad it with stock code:\n    model = {code}")
    return pushed


def push_at_end(train_args):
    """Pushes a run as its arguments say; whatever goes wrong is said, with the command to do it later."""
    options = push_options(train_args)
    try:
        push(train_args.output_dir, **options)
    except (Exception, KeyboardInterrupt) as error:
        # The hours of training are on the disk, whole: nothing about the Hub may make a failure of them.
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": ")
        logger.warning(
            "%s\nThe run itself is whole, in %s. Push it later with:\n    %s",
            redact(reason),
            train_args.output_dir,
            push_command(train_args.output_dir, **options),
        )


def push_options(train_args):
    """Returns the arguments of `push` that a run's settings stand for."""
    return {
        "repo_id": train_args.hub_model_id or default_repo_name(train_args.output_dir),
        "merge": train_args.hub_merge,
        "private": train_args.hub_private_repo,
        "revision": train_args.hub_revision,
        "tag": train_args.hub_tag,
        "create_pr": train_args.hub_create_pr,
        "with_checkpoint": train_args.hub_strategy == "checkpoint",
    }


def push_command(run_dir, repo_id, **options):
    """Returns the command line that does what `push` does."""
    flags = []
    for name, value in options.items():
        if value:
            flags += [f"--{name}"] if value is True else [f"--{name}", value]
    return shlex.join(["hfspeech", "push", str(run_dir), repo_id, *flags])
