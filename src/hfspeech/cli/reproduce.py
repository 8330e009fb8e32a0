"""`hfspeech reproduce`: runs what a record says once more, and says whether the same comes out."""

from hfspeech.models.loading import quiet_transformers
from hfspeech.reproduction import MOVABLE, reproduce


def run(args):
    """Runs a recorded run again; returns the exit code."""
    quiet_transformers()
    return reproduce(args.run, args.output_dir, {name: getattr(args, name) for name in MOVABLE}, args.dry_run)
