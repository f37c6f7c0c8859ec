"""`paca env` says what a bug report needs, and nothing secret."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import paca
from paca import versions
from paca.report import HEADER, report


def lines() -> dict[str, str]:
    first, blank, *rest = report().splitlines()
    assert first == HEADER == "Copy-paste the following information when reporting an issue:"
    assert blank == ""
    assert all(line.startswith("- ") and ": " in line for line in rest)
    return {key: value for key, _, value in (line[2:].partition(": ") for line in rest)}


def test_torch_is_told_with_its_build_and_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"torch": "1", "peft": "2"}  # the metadata of torch's wheels need not have the build

    def version(name: str) -> str:
        if name not in numbers:
            raise metadata.PackageNotFoundError(name)
        return numbers[name]

    monkeypatch.setattr(versions, "version", version)
    told = versions.versions("peft", "nothing")
    assert told == {"paca": paca.__version__, "torch": torch.__version__, "peft": "2"}


def test_versions_and_machine_are_told() -> None:
    told = lines()
    assert told["torch"] == torch.__version__
    assert torch.__version__.startswith(metadata.version("torch"))
    assert told["peft"] == metadata.version("peft")
    assert told["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "GiB" in told["Memory"]


def test_each_backend_is_told_with_its_strategies_or_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from paca import registry

    monkeypatch.setitem(registry.BUILT_IN, "broken", "no_such_package:Backend")
    told = lines()
    assert told["Backend cpu"].startswith("available: ")
    assert "gather=index_select" in told["Backend cpu, strategies"]
    assert told["Backend broken"] == "unavailable: it cannot be imported: No module named 'no_such_package'"


def test_formats_are_told_as_the_installed_libraries_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    installed = {"torchao"}
    find = importlib.util.find_spec
    known = {"bitsandbytes", "torchao"}

    def found(name: str, package: str | None = None) -> object:
        return (name in installed or None) if name in known else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    needed = "fp8; fp4, int8, nf4 with bitsandbytes: pip install 'paca-torch[quant]'"
    assert lines()["Backend cpu, quantised bases"] == needed
    installed.clear()
    assert lines()["Backend cpu, quantised bases"].startswith("none; fp4, fp8, int8, nf4 with bitsandbytes and torchao")
    installed.update(known)
    assert lines()["Backend cpu, quantised bases"] == "fp4, fp8, int8, nf4"


def test_variables_are_told_but_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PT_HPU_LAZY_MODE", "HABANA_VISIBLE_DEVICES", "PACA_BACKEND", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "cpu" if name == "PACA_BACKEND" else "secret-or-not")
    told = lines()
    assert told["PT_HPU_LAZY_MODE"] == told["HABANA_VISIBLE_DEVICES"] == "secret-or-not"
    assert "HF_TOKEN" not in told
    assert "WANDB_API_KEY" not in told


def test_gaudi_is_told_without_importing_its_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "habana_frameworks"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    info = tmp_path / "habana_torch_plugin-1.23.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: habana-torch-plugin\nVersion: 1.23.0\n")
    tool = tmp_path / "hl-smi"
    tool.write_text("#!/bin/sh\necho 'HL-225, 1.23.0, 98304 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    told = lines()
    assert told["habana_frameworks"] == "1.23.0 (habana-torch-plugin)"
    assert told["PT_HPU_LAZY_MODE"].startswith("not set")
    assert told["hl-smi"] == "HL-225, 1.23.0, 98304 MiB"


def test_a_tool_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "hl-smi"
    tool.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert lines()["hl-smi"] == "exit status 9: no driver"
