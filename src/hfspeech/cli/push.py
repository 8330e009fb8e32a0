"""`hfspeech push`: a finished run to the Hub, or into a folder to look at first."""

from hfspeech.errors import UserError
from hfspeech.models.loading import quiet_transformers
from hfspeech.publish.push import push
from hfspeech.runs import claim_folder, default_repo_name


def run(args):
    """Pushes a run; returns the exit code."""
    quiet_transformers()
    if not args.dry_run:
        push(
            args.run_dir,
            args.repo_id,
            merge=args.merge,
            private=args.private,
            revision=args.revision,
            tag=args.tag,
            create_pr=args.create_pr,
            with_checkpoint=args.with_checkpoint,
        )
        return 0
    from hfspeech.publish.package import package

    claim_folder(args.dry_run, "--dry_run")
    if any(args.dry_run.iterdir()):
        raise UserError(f"{args.dry_run} is not empty: choose another folder with --dry_run.")
    repo_id = args.repo_id or default_repo_name(args.run_dir)
    package(args.run_dir, args.dry_run, merge=args.merge, with_checkpoint=args.with_checkpoint, repo_id=repo_id)
    for path in sorted(path for path in args.dry_run.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>12,} bytes  {path.relative_to(args.dry_run)}")
    print(
        f"Nothing was pushed: look at {args.dry_run}, and leave --dry_run out to push it to {repo_id}."
        + ("" if "/" in repo_id else " under your own name.")
    )
    return 0
