"""Commands of `lathe` for what leaves the repository: publish, sign, verify, and the judge held against people."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import readable_bytes, write_lines
from lathe.config.load import load

if TYPE_CHECKING:
    from lathe.publishing.release import Release


def verify_outputs(args: argparse.Namespace) -> None:
    """Compare every output with dvc.lock, or a release with its signed statement; exit 1 if anything differs."""
    from lathe.provenance import verify

    if (args.path is None) != (args.key is None):
        raise InputError(
            "verify: PATH and --key belong together: a downloaded release and the public key of its publisher; "
            "give both, or neither for the outputs of this repository",
            code="missing-option",
        )
    sys.exit(verify.run() if args.path is None else _verify_release(args.path, args.key))


def compare_judge_with_people(args: argparse.Namespace) -> None:
    """Print how far the kept verdicts agree with a file of marks that people gave."""
    from lathe.evaluation.judge_agreement import compare_with_marks

    write_lines(compare_with_marks(args.file, paths.DATA_JUDGED, seed=load().params.seed).describe())


def make_signing_key(args: argparse.Namespace) -> None:
    """Write a new pair of keys."""
    from lathe.provenance.signed_statement import make_key

    public = make_key(args.file)
    sys.stdout.write(
        f"{args.file}: private, keep it to yourself and out of Git\n{public}: public, for whoever verifies\n"
    )


def publish(args: argparse.Namespace) -> None:
    """Lay out a release and say what is in it; with --yes upload it."""
    from lathe.publishing.release import prepare_release
    from lathe.publishing.upload import require_token, upload

    if args.yes:
        require_token(args.repository)
    release = prepare_release(args.repository, args.files or [], load().params, key=args.sign)
    write_lines(_describe_release(release, public=args.public))
    if not args.yes:
        sys.stdout.write("nothing was uploaded; the same with --yes uploads it\n")
        return
    if not release.gates_passed and not args.despite_gates:
        raise InputError(
            f"{args.repository}: a gate fails (`lathe gate`); make a better model, or give --despite-gates",
            code="gate-failed",
        )
    sys.stdout.write(f"uploaded and compared: {upload(release, public=args.public)}\n")


def _describe_release(release: "Release", *, public: bool) -> Iterator[str]:
    yield f"{release.repository} ({'public' if public else 'private'}), laid out in {_shorten(release.folder)}"
    for name, size in release.files.items():
        yield f"  {name}  {readable_bytes(size)}"
    for licence in release.licences:
        yield f"licence of {licence.describe()}"
    yield f"gates: {'all passed' if release.gates_passed else 'FAILED'}"
    yield f"signed with {release.key}" if release.key else "not signed: --sign KEY adds a signed statement"


def _verify_release(path: Path, key: Path) -> int:
    from lathe.provenance.signed_statement import verify_statement

    checked = verify_statement(path, key)
    write_lines(checked.problems)
    for made_from in checked.origin["resolvedDependencies"]:
        origin, digest = made_from.get("uri") or "not on the Hub", made_from["digest"]["dvc_md5"]
        sys.stdout.write(f"{made_from['name']}: {origin}, digest {digest}\n")
    sys.stdout.write(f"commit: {checked.origin['externalParameters']['commit']}\n")
    count = f"{len(checked.problems)} problems" if checked.problems else "nothing differs"
    sys.stdout.write(f"{checked.files} signed files, by the key {checked.key[:16]}: {count}\n")
    return 1 if checked.problems else 0


def _shorten(path: Path) -> Path:
    return path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path
