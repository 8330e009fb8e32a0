"""`hfspeech check`: a look over a run before paying for it."""

from hfspeech.preflight import check


def run(args):
    """Goes through a run; returns the exit code."""
    flags = [flag for flag in args.flags if flag != "--overfit"]
    check(args.arguments_file, flags, overfit=args.overfit or len(flags) < len(args.flags))
    return 0
