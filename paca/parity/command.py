"""The command line of `paca parity`: makes records and verifies them."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from paca.parity.cases import TIERS
from paca.whole import write_text

if TYPE_CHECKING:
    from paca.parity.findings import Report

INTERRUPTED = 130  # as shells count a process that Ctrl-C ended
ABOUT = """\
Prove that the devices of this machine compute what another machine did.

  bitwise      numbers whose sums no device can round: every bit must be the same
  bounded      real-valued numbers: within the rounding bound of float64
  trajectory   a tiny model in training: as close as one ulp of change leaves it
"""
EXAMPLES = """\
examples:
  paca parity verify                                  every backend here against the record that paca came with
  paca parity verify --backend hpu --html parity.html
  paca parity verify --tier bitwise --graph eager --json parity.json
  paca parity record --out gaudi2                     a record to carry away; there: paca parity verify gaudi2

exit status:
  0  something was compared and nothing failed
  1  something failed, or there was nothing to compare
  2  the command, the record or a backend that was named cannot be used; the message says why
  130  interrupted; what was compared until then is printed and written
"""


def main(argv: Sequence[str]) -> int:
    """Run `paca parity` with the words after it; returns the exit status."""
    from paca.errors import BackendUnavailableError

    options = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks a model by the name that transformers 5 renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except (ArithmeticError, BackendUnavailableError, OSError, ValueError) as error:
        print(f"paca parity {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="paca parity", description=ABOUT, epilog=EXAMPLES, formatter_class=style, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    about = "replay a record on the backends of this machine and compare"
    check = commands.add_parser(
        "verify", help=about, description=about, epilog=EXAMPLES, formatter_class=style, allow_abbrev=False
    )
    check.set_defaults(run=_verify)
    check.add_argument("record", nargs="?", type=Path, metavar="DIR", help="a record; default: the one paca came with")
    check.add_argument("--backend", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    check.add_argument("--tier", action="append", default=[], choices=TIERS, help="only this one; repeatable")
    check.add_argument("--graph", action="append", default=[], metavar="MODE", help="only this graph mode; repeatable")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write all findings there")
    check.add_argument("--html", type=Path, metavar="FILE", help="also write a page for people there")

    about = "record inputs, results and the machine, to be verified elsewhere"
    make = commands.add_parser(
        "record", help=about, description=about, epilog=EXAMPLES, formatter_class=style, allow_abbrev=False
    )
    make.set_defaults(run=_record)
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder without a record")
    make.add_argument("--backend", metavar="NAME", help="default: the one in use")
    return parser


def _record(options: argparse.Namespace) -> int:
    return record_to(options.out, options.backend)


def _verify(options: argparse.Namespace) -> int:
    return verify_here(options.record, options.backend, options.tier, options.graph, options.json, options.html)


def record_to(folder: Path, backend: str | None) -> int:
    """Make a record and verify it on the machine that made it.

    Returns:
        0, or 1 if this machine does not compute what it recorded, or 130 if it was interrupted in finding out.
    """
    from paca.parity.record import read, write
    from paca.parity.recording import make_record
    from paca.parity.table import summary
    from paca.parity.verify import Selection, verify
    from paca.registry import get_backend, use_backend

    if (folder / "parity.json").exists():
        raise FileExistsError(f"{folder} holds a record already; choose another folder, or delete it")
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; name a folder, which need not exist")
    with use_backend(backend or get_backend().name) as chosen:
        _check_writable(folder / "parity.json")
        made = make_record(chosen, say=_progress)
    write(made, folder)
    chosen_only = Selection(backends=[chosen.name], graphs=[chosen.graph_mode.value])
    report = verify(read(folder), chosen_only, say=_progress)
    for line in summary(report):
        print(line)
    for finding in report.failed:
        print(f"  {finding}")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.2f} MB; verify it elsewhere with: paca parity verify {folder.resolve().name}")
    return exit_status(report)


def verify_here(
    folder: Path | None,
    backends: Sequence[str],
    tiers: Sequence[str],
    graphs: Sequence[str],
    as_json: Path | None,
    as_html: Path | None,
) -> int:
    """Replay a record, the shipped one unless there is another, and print what was found.

    Returns:
        0 if something was compared and nothing failed, 130 if that was interrupted, else 1.
    """
    from paca.parity.page import page
    from paca.parity.record import REFERENCE, read
    from paca.parity.table import text
    from paca.parity.verify import Selection, verify

    record = read(folder or REFERENCE)
    for file in filter(None, (as_json, as_html)):
        _check_writable(file)
    report = verify(record, Selection(backends, tiers, graphs), say=_progress)
    print(text(report))
    if as_json is not None:
        _write(as_json, json.dumps(report.as_json(), indent=1, allow_nan=False))
    if as_html is not None:
        _write(as_html, page(report))
    return exit_status(report)


def exit_status(report: Report) -> int:
    """Return what `paca parity` exits with after a report."""
    if report.interrupted:
        return INTERRUPTED
    return 0 if report.passed else 1


def _progress(line: str) -> None:
    print(f"… {line}", file=sys.stderr, flush=True)


def _check_writable(file: Path) -> None:
    """Find out before the work whether a file can be written after it.

    Raises:
        OSError: if not.
    """
    file = file.resolve()
    if not file.exists() or file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=file.parent).close()
    elif file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file")


def _write(file: Path, content: str) -> None:
    file = file.resolve()  # what a link means is written, not the link
    if file.exists() and not file.is_file():  # /dev/stdout
        file.write_text(content, encoding="utf-8")
        return
    write_text(file, content)
