"""Every backend, strategy, graph mode and dtype that this machine has, against the record that paca ships (rule 9).

What is compared comes from the backends themselves: their choices and capabilities. One that cannot be used is skipped
with its reason, unless `--backend` names it: then it is an error.
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace

import pytest
import torch
from parity_summary import LEFT_OUT, note

from paca import registry
from paca.backend import Backend, Ops
from paca.errors import BackendUnavailableError
from paca.parity import coverage
from paca.parity.cases import BITWISE
from paca.parity.coverage import Configuration
from paca.parity.findings import Status
from paca.parity.operations import OPERATIONS
from paca.parity.record import REFERENCE, Record, read
from paca.parity.verify import BLOCK, MODEL, STACKED, Selection, audit, configuration_findings, operation_findings

# torch.compile's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(scope="session")
def record() -> Record:
    return read(REFERENCE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = {"choice": coverage.operation_choices, "configuration": coverage.configurations}
    for argument, listed in wanted.items():
        if argument not in metafunc.fixturenames:
            continue
        parameters = []
        try:
            backends = coverage.chosen_backends(metafunc.config.getoption("--backend"))
        except (BackendUnavailableError, ValueError) as error:
            raise pytest.UsageError(f"--backend: {error}") from error
        for name, why in backends.items():
            if why is not None:
                parameters.append(pytest.param((name, why), id=f"{name}-unavailable"))
                continue
            parameters += [pytest.param(value, id=label(value)) for value in listed(name)]
        metafunc.parametrize(argument, parameters)


def label(value: coverage.Configuration | coverage.OperationChoice) -> str:
    if isinstance(value, coverage.OperationChoice):
        return f"{value.backend}-{value.field}-{value.name}"
    return f"{value.backend}-{value.strategy}-{value.graph}"


def skip_unless_usable(parameter: object, record_property) -> None:
    if isinstance(parameter, tuple):
        record_property(LEFT_OUT, parameter)
        pytest.skip(f"backend {parameter[0]}: {parameter[1]}")


@pytest.fixture
def traced_only(monkeypatch):
    """Capture graphs as torch.compile does, but run them with the kernels of eager mode: generating code is slow."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))


def assert_no_failure(findings, record_property) -> None:
    note(record_property, findings)
    assert findings
    assert [str(finding) for finding in findings if finding.status is Status.FAILED] == []


def test_each_strategy_of_each_operation(record, choice, record_property):
    skip_unless_usable(choice, record_property)
    assert_no_failure(list(operation_findings(record, choice, Selection())), record_property)


def test_training_steps(record, configuration, record_property, traced_only):
    """A layer of each residency, a block over several optimizer steps, a model in training; bits, bounds, drift."""
    skip_unless_usable(configuration, record_property)
    selection = Selection()
    if not configuration.default_graph:  # tracing takes seconds
        record, selection = replace(record, block_dtypes=(torch.bfloat16,)), Selection(tiers=[BITWISE])
    findings = list(configuration_findings(record, configuration, selection))
    assert_no_failure(findings, record_property)
    operations = {finding.operation for finding in findings}
    if configuration.default_graph or not configuration.changed:
        further = {STACKED} if configuration.default_graph else set()
        further |= {MODEL} if configuration.default_graph and not configuration.changed else set()
        assert operations == {"layer, resident", "layer, swap", BLOCK, *further}


@pytest.mark.slow
def test_generated_code_gives_the_recorded_bits(record, record_property):
    """The CPU's default strategies through the whole compiler, once; `paca parity verify` does it for all."""
    torch.compiler.reset()
    compiled = next(c for c in coverage.configurations("cpu") if c.graph == "compile" and not c.changed)
    one_dtype = replace(record, cases=[c for c in record.cases if c.dtype == torch.bfloat16], block_dtypes=())
    assert_no_failure(list(configuration_findings(one_dtype, compiled, Selection(tiers=[BITWISE]))), record_property)


def test_the_record_itself_is_exact(record, record_property):
    assert_no_failure(list(audit(record, Selection())), record_property)


USABLE = [name for name, why in registry.available_backends().items() if why is None]


@pytest.mark.parametrize("name", USABLE)
def test_all_strategies_graph_modes_and_dtypes_of_a_backend_are_covered(name):
    with registry.use_backend(name) as backend:
        choices, capabilities, ops = backend.choices, backend.capabilities, backend.ops
    listed, single = list(coverage.configurations(name)), list(coverage.operation_choices(name))
    assert {c.graph for c in listed} == {mode.value for mode in capabilities.graph_modes}
    for kind, known in choices.items():
        if kind == "quantised":  # no weight of the record is
            continue
        comparable = {choice: sets for choice, sets in known.items() if sets.get("copy_frozen") is None}  # not fp8
        assert {dict(c.strategies)[kind] for c in listed} == set(comparable)
        for choice, sets in comparable.items():
            named = {c.field for c in single if (c.kind, c.name) == (kind, choice)}
            assert named == {field for field in sets if field in OPERATIONS and sets[field] is not None}
    assert {c.field for c in single} >= {field for field in OPERATIONS if getattr(ops, field) is not None}
    assert set(coverage.dtypes_of(name)) == set(coverage.DTYPES) & capabilities.dtypes


def test_every_tensor_operation_of_a_dense_layer_is_compared():
    functions = {field.name for field in fields(Ops)} - {"runs_to_slice", "end_graph", "quantised_form", "copy_frozen"}
    assert set(OPERATIONS) == functions


def test_a_backend_that_is_named_and_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "asleep", "paca_dummy:AsleepBackend")
    monkeypatch.syspath_prepend("tests/plugin")
    assert coverage.chosen_backends([])["asleep"] == "it sleeps"
    with pytest.raises(BackendUnavailableError, match="it sleeps"):
        coverage.chosen_backends(["asleep"])


@pytest.fixture
def compiled() -> Configuration:
    return next(c for c in coverage.configurations("cpu") if c.graph == "compile" and not c.changed)


def test_a_compiler_that_compiles_nothing_is_said(
    record: Record, monkeypatch: pytest.MonkeyPatch, compiled: Configuration
) -> None:
    monkeypatch.setattr(Backend, "capture", lambda self, module: module)
    found = list(configuration_findings(record, compiled, Selection(tiers=["bitwise"])))
    assert found
    assert {finding.status for finding in found if finding.operation.startswith("layer")} == {Status.SKIPPED}
    assert "compiles nothing" in found[0].detail


def test_a_missing_compiler_is_no_failure_of_the_device(
    record: Record, monkeypatch: pytest.MonkeyPatch, compiled: Configuration
) -> None:
    def refuse(self: Backend, module: object) -> object:
        raise RuntimeError("InductorError: InvalidCxxCompiler: no g++")

    monkeypatch.setattr(Backend, "capture", refuse)
    found = list(configuration_findings(record, compiled, Selection(tiers=["bitwise"])))
    assert {finding.status for finding in found} == {Status.SKIPPED}
    assert "install g++, or --graph eager" in found[0].detail
