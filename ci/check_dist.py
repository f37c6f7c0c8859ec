"""Build paca and use it in each way that people install it, away from this checkout.

Each claim is printed as it is proved. The first that does not hold ends the run with what was found.

torch and the other requirements are not installed again: the environments made here see those of the environment that
runs this script, but not its paca.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What a user's program does with the library; also read by the type checker.
PROGRAM = """\
import sys
from pathlib import Path

import paca
import paca_cpu
from typing_extensions import assert_type

backend: paca.Backend = paca.set_backend("cpu")
assert isinstance(backend, paca_cpu.CPUBackend), type(backend)
assert_type(paca.get_backend(), paca.Backend)
assert_type(paca.PacaConfig(r=8, target_modules="all-linear").r, int)
if __name__ == "__main__":
    for module in (paca, paca_cpu):
        assert module.__file__ is not None
        found, wanted = Path(module.__file__).resolve(), Path(sys.argv[1]).resolve()
        assert wanted in found.parents, f"{module.__name__} came from {found}, not from {wanted}"
"""

# Were paca or paca_cpu untyped or not found, everything would be Any and these lines would pass.
WRONG_PROGRAM = """\
import paca
import paca_cpu

wrong_backend: int = paca.get_backend()
wrong_class: int = paca_cpu.CPUBackend()
"""

# How these are read. The packages that the library builds on take minutes to read and are not in question here.
MYPY_SETTINGS = """\
[mypy]
strict = true
[mypy-torch.*,transformers.*,peft.*,safetensors.*,numpy.*,psutil.*,tqdm.*]
follow_imports = skip
[mypy-paca.*,paca_cpu.*]
follow_imports = silent
"""


class ClaimError(Exception):
    """A claim that does not hold; the message says what was found."""


def run(words: Sequence[object], folder: Path, **variables: str) -> str:
    """Run a command, its words made strings, in a folder and return what it printed.

    Raises:
        ClaimError: it failed; with the command and the end of its output.
    """
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=clean_environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    printed: str = done.stdout
    if done.returncode:
        command = " ".join(str(word) for word in words)
        last_lines = "\n".join(printed.splitlines()[-40:])
        raise ClaimError(f"in {folder}:\n$ {command}\n{last_lines}\n(exit status {done.returncode})")
    return printed


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would let a program find the checkout."""
    lock = str(ROOT / "requirements" / "constraints.txt")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH", "VIRTUAL_ENV")}
    # Older pips read the first of these in isolated builds, newer ones the second. Blanks separate file names there.
    return kept if " " in lock else kept | {"PIP_CONSTRAINT": lock, "PIP_BUILD_CONSTRAINT": lock}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with all requirements and without paca."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, requirements: Path) -> Environment:
        venv.create(folder, with_pip=False)
        environment = cls(folder)
        (environment.site_packages / "requirements.pth").write_text(f"{requirements}\n")
        return environment

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python*/site-packages"))

    def install(self, *words: object) -> None:
        """Install with the pip of the environment that runs this script."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        run([*pip, "install", "-q", "--no-deps", *words], self.folder)


def link_requirements(folder: Path) -> None:
    """Fill a folder with links to everything that is installed here but paca."""
    folder.mkdir()
    for path in sys.path:
        if Path(path).name in ("site-packages", "dist-packages"):
            for entry in Path(path).iterdir():
                ours = entry.name.lstrip("_").startswith(("paca", "editable__"))
                if not ours and entry.suffix != ".pth" and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)


def copy_checkout(folder: Path) -> None:
    """Copy what git has or would add, as a clone made now would have it."""
    names = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def same(what: str, found: set[str], wanted: set[str]) -> None:
    """Demand that two sets of names are one."""
    if found != wanted:
        raise ClaimError(f"{what}: missing {sorted(wanted - found)}, not expected {sorted(found - wanted)}")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sources(checkout: Path) -> set[str]:
    """Return the files of all import packages, named as they are in a wheel."""
    files = {
        file.relative_to(root).as_posix()
        for root, package in [(checkout, checkout / "paca")]
        + [(checkout / "backends", package) for package in sorted((checkout / "backends").glob("paca_*"))]
        for file in package.rglob("*")
        if file.is_file()
    }
    return {name for name in files if "__pycache__" not in name}


class Checks:
    """The claims, in the order in which they build on each other."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.requirements = work / "requirements"
        self.checkout = work / "checkout"
        self.dist = work / "dist"
        self.elsewhere = work / "elsewhere"
        self.elsewhere.mkdir()
        self.checkout.mkdir()
        link_requirements(self.requirements)
        copy_checkout(self.checkout)
        self.program = self.elsewhere / "program.py"
        self.program.write_text(PROGRAM)
        self.wrong_program = self.elsewhere / "wrong_program.py"
        self.wrong_program.write_text(WRONG_PROGRAM)
        self.mypy_settings = self.elsewhere / "mypy.ini"
        self.mypy_settings.write_text(MYPY_SETTINGS)
        # A user's own folder of this name must not get in the way.
        (self.elsewhere / "backends").mkdir()
        (self.elsewhere / "backends" / "__init__.py").write_text("raise ImportError('this is not the library')\n")

    def wheel(self) -> Path:
        return next(self.dist.glob("*.whl"))

    def use(self, environment: Environment, source: Path, **variables: str) -> None:
        """Run the program; then its types must be known, and wrong ones noticed."""
        run([environment.python, self.program, source], self.elsewhere, **variables)
        mypy: list[object] = [sys.executable, "-m", "mypy", "--python-executable", environment.python]
        mypy += ["--config-file", self.mypy_settings, "--cache-dir", self.work / "mypy_cache"]
        run([*mypy, self.program], self.elsewhere, **variables)
        try:
            run([*mypy, self.wrong_program], self.elsewhere, **variables)
        except ClaimError as error:
            if str(error).count("[assignment]") == 2 and "Found 2 errors" in str(error):
                return
            raise
        raise ClaimError("mypy takes a Backend for an int: it does not see the types")

    def sdist_and_wheel_are_built(self) -> None:
        run([sys.executable, "-m", "build", "--outdir", self.dist, self.checkout], self.work)

    def wheel_holds_the_packages_and_nothing_else(self) -> None:
        names = set(contents(self.wheel()))
        metadata = {name for name in names if ".dist-info/" in name}
        same("files in the wheel", names - metadata, sources(self.checkout))
        files = {name.split(".dist-info/")[1] for name in metadata}
        same("its metadata", files, {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"})

    def wheel_from_the_tree_equals_the_wheel_from_the_sdist(self) -> None:
        direct = self.work / "direct"
        run([sys.executable, "-m", "build", "--wheel", "--outdir", direct, self.checkout], self.work)
        from_tree, from_sdist = contents(next(direct.glob("*.whl"))), contents(self.wheel())
        same("files", set(from_tree), set(from_sdist))
        differing = {name for name in from_tree if from_tree[name] != from_sdist[name]}
        same("files that differ", differing, set())

    def sdist_holds_the_tests(self) -> None:
        with tarfile.open(next(self.dist.glob("*.tar.gz"))) as archive:
            names = {name.split("/", 1)[1] for name in archive.getnames() if "/tests/" in name}
        tests = (file for file in (self.checkout / "tests").rglob("*") if file.is_file())
        same("tests", names, {file.relative_to(self.checkout).as_posix() for file in tests})

    def installed_wheel_works_elsewhere_and_is_typed(self) -> None:
        environment = Environment.make(self.work / "wheel_env", self.requirements)
        environment.install(self.wheel())
        self.use(environment, environment.site_packages)
        run([environment.folder / "bin" / "paca", "env"], self.elsewhere)
        found = "import importlib.metadata as m; print(*sorted(e.name for e in m.entry_points(group='paca.backends')))"
        names = set(run([environment.python, "-c", found], self.elsewhere).split())
        devices = {name.partition("-")[0] for name in names}  # "hpu-rehearsal" is of the package paca_hpu
        same("backends that the entry points name", devices, {name[5:] for name in self.backend_packages()})

    def editable_install_works_elsewhere_is_typed_and_sees_new_code(self) -> None:
        environment = Environment.make(self.work / "editable_env", self.requirements)
        environment.install("-e", self.checkout)
        self.use(environment, self.checkout)
        (self.checkout / "paca" / "just_written.py").touch()
        (self.checkout / "backends" / "paca_new").mkdir()
        (self.checkout / "backends" / "paca_new" / "__init__.py").touch()
        run([environment.python, "-c", "import paca.just_written, paca_new"], self.elsewhere)
        (self.checkout / "paca" / "just_written.py").unlink()
        shutil.rmtree(self.checkout / "backends" / "paca_new")

    def bare_checkout_works_and_is_typed(self) -> None:
        environment = Environment.make(self.work / "bare_env", self.requirements)
        roots = os.pathsep.join([str(self.checkout), str(self.checkout / "backends")])
        self.use(environment, self.checkout, PYTHONPATH=roots, MYPYPATH=roots)

    def tests_are_found_in_a_bare_checkout_without_any_install(self) -> None:
        environment = Environment.make(self.work / "tests_env", self.requirements)
        run([environment.python, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"], self.checkout)

    def backend_packages(self) -> list[str]:
        return [folder.name for folder in (self.checkout / "backends").glob("paca_*")]

    def in_order(self) -> list[Callable[[], None]]:
        return [
            self.sdist_and_wheel_are_built,
            self.wheel_holds_the_packages_and_nothing_else,
            self.wheel_from_the_tree_equals_the_wheel_from_the_sdist,
            self.sdist_holds_the_tests,
            self.installed_wheel_works_elsewhere_and_is_typed,
            self.editable_install_works_elsewhere_is_typed_and_sees_new_code,
            self.bare_checkout_works_and_is_typed,
            self.tests_are_found_in_a_bare_checkout_without_any_install,
        ]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="paca-dist-") as folder:
        for claim in Checks(Path(folder)).in_order():
            name = claim.__name__.replace("_", " ")
            began = time.monotonic()
            try:
                claim()
            except ClaimError as error:
                print(f"FAILED  {name}\n{textwrap.indent(str(error), '    ')}", file=sys.stderr)
                return 1
            print(f"ok      {name} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
