"""`macosnet push`: uploads a model with its processor, a prepared data set, or the Space, in one commit."""

from __future__ import annotations

import argparse

from ..io.hub import KINDS, check_name, plan, push, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet push`."""
    parser.description = "Upload a model with its processor, a prepared data set, or the Space, in one commit."
    parser.add_argument("kind", choices=KINDS, help="what the folder holds")
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint, a prepared data set, or a checkout")
    parser.add_argument("repository", metavar="ID", help="repository on the Hub, NAME or OWNER/NAME")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="only list the files; needs no network")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")


def run(args: argparse.Namespace) -> int:
    """`macosnet push`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    check_name(args.repository)
    uploads = plan(args.kind, args.folder)
    print(table(uploads))
    if args.kind != "space" and not any(upload.name == "README.md" for upload in uploads):
        print("There is no README.md: a repository without a card is hard to find and to trust.")
    if args.dry_run:
        print(f"Nothing was uploaded to {args.repository}.")
        return 0
    print(push(args.kind, args.folder, args.repository, private=args.private, message=args.message))
    return 0
