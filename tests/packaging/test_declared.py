"""What the code is made of and needs is declared in pyproject.toml, and pinned."""

import ast
import importlib
import importlib.metadata
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from project import BACKENDS, PYPROJECT, ROOT

PROJECT = PYPROJECT["project"]
TOOLS = PYPROJECT["tool"]
EXTRAS = {
    name: [Requirement(line) for line in lines if not line.startswith("paca-torch")]
    for name, lines in PROJECT["optional-dependencies"].items()
}
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
# Come with a device's own software, which no index has.
VENDORS = {"habana_frameworks"}
# Whose name is not that of its package, and which a machine without its device does not have.
OWNERS = {"optimum": "optimum-habana"}


def distribution(import_name: str) -> str:
    """The distribution that an import belongs to; where it is not installed, they are taken to share a name."""
    installed = importlib.metadata.packages_distributions()
    return canonicalize_name(OWNERS.get(import_name) or installed.get(import_name, [import_name])[0])


def imported_names(package: str) -> set[str]:
    """The top-level names that a package's files import, anywhere in them."""
    folder = ROOT / package if package == "paca" else ROOT / "backends" / package
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).split(".")[0])
    assert names, f"{folder} has no imports at all: is it there?"
    return names - sys.stdlib_module_names - {"paca", *BACKENDS}


@pytest.mark.parametrize("package", ["paca", *BACKENDS])
def test_every_imported_package_is_declared(package):
    extras = ["train", "quant"] if package == "paca" else [package.removeprefix("paca_")]
    declared = {canonicalize_name(requirement.name) for requirement in DEPENDENCIES}
    declared |= {canonicalize_name(requirement.name) for extra in extras for requirement in EXTRAS.get(extra, [])}
    assert {name for name in imported_names(package) - VENDORS if distribution(name) not in declared} == set()


def test_there_is_a_backend():
    assert "paca_cpu" in BACKENDS


@pytest.mark.parametrize("package", BACKENDS)
def test_every_backend_is_packaged_typed_and_fenced_in(package):
    name = package.removeprefix("paca_")
    assert f"backends/{package}" in TOOLS["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert PROJECT["entry-points"]["paca.backends"][name].startswith(f"{package}:")
    assert (ROOT / "backends" / package / "py.typed").exists()
    assert package in TOOLS["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert package in TOOLS["importlinter"]["root_packages"]
    core, independence, interface, _ = TOOLS["importlinter"]["contracts"]
    assert package in core["forbidden_modules"]
    assert package in independence["modules"]
    assert package in interface["source_modules"]


def test_every_entry_point_is_a_backend_here_with_its_own_name():
    for name, target in PROJECT["entry-points"]["paca.backends"].items():
        module, _, attribute = target.partition(":")
        assert module.partition(".")[0] in BACKENDS
        assert getattr(importlib.import_module(module), attribute).name == name


def pins() -> dict[str, list[Requirement]]:
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Requirement]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_pin_that_satisfies_it(python):
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    build = [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]
    for requirement in DEPENDENCIES + EXTRAS["train"] + EXTRAS["dev"] + build:
        name = canonicalize_name(requirement.name)
        if name == "torch":  # installed beforehand; its pin is in the Makefile
            continue
        versions = [
            next(iter(pin.specifier)).version
            for pin in pins().get(name, [])
            if pin.marker is None or pin.marker.evaluate(environment)
        ]
        assert len(versions) == 1, f"{requirement} on Python {python}: {versions}; run `make lock`"
        assert requirement.specifier.contains(versions[0]), (
            f"{requirement}, but {versions[0]} is pinned; run `make lock`"
        )


def test_the_makefiles_torch_satisfies_the_requirement():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = next(line.split("==")[1] for line in makefile.splitlines() if line.startswith("TORCH ?= torch=="))
    required = next(requirement for requirement in DEPENDENCIES if requirement.name == "torch")
    assert required.specifier.contains(pinned)


def test_the_changelog_tells_of_this_version():
    version = Version((ROOT / "paca" / "_version.py").read_text(encoding="utf-8").split('"')[-2])
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
