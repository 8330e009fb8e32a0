"""`hfspeech push-dataset`: your recordings to the Hub, as a dataset that everyone's tools read."""

from hfspeech.publish.dataset import push_dataset


def run(args):
    """Pushes recordings; returns the exit code."""
    names = ("audio_column_name", "text_column_name", "speaker_column_name")
    push_dataset(
        args.path,
        args.repo_id,
        args.config,
        args.language,
        args.license,
        args.private,
        args.revision,
        args.tag,
        {name: value for name in names if (value := getattr(args, name))},
        args.audio_root or (),
    )
    return 0
