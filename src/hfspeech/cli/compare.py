"""`hfspeech compare`: what differs between runs, and whether that is more than chance."""

from hfspeech.comparison import as_text, compare
from hfspeech.runs import claim_folder, write_json


def run(args):
    """Prints, and writes if asked, the comparison of several runs; returns the exit code."""
    if args.output:
        claim_folder(args.output.parent, "--output")
    result = compare([args.first, *args.others], args.metric)
    print(as_text(result))
    if args.output:
        write_json(args.output, result)
    return 0
