"""Replays a record on the backends of this machine and compares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from paca import registry
from paca.backend import Backend
from paca.errors import BackendUnavailableError
from paca.parity import block, coverage, trajectory
from paca.parity.cases import BITWISE, BOUNDED, TIERS, TRAJECTORY, Case
from paca.parity.coverage import Configuration, OperationChoice
from paca.parity.findings import Finding, Report, Status
from paca.parity.judge import Verdict, judge, judge_trajectory, same_bits, worst
from paca.parity.operations import OPERATIONS, run_operation
from paca.parity.record import Record, environment
from paca.parity.training_step import layer_results, run_layer
from paca.parity.trajectory import train_model
from paca.parity.truth import truths

RESIDENCIES = ("resident", "swap")
BLOCK = f"block, {block.STEPS} SGD steps"
MODEL = f"tiny Llama, {trajectory.STEPS} SGD steps"
STACKED = "layer, two adapters"
THE_RECORD = "the record"
# Computes what the record says in float64.
AUDITOR = "cpu"


@dataclass(frozen=True)
class Selection:
    """What to compare; empty means all there is."""

    backends: Sequence[str] = ()
    tiers: Sequence[str] = ()
    graphs: Sequence[str] = ()

    def wants(self, tier: str) -> bool:
        """Whether a tier is to be compared."""
        return not self.tiers or tier in self.tiers


def verify(
    record: Record, selection: Selection | None = None, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Compare everything that this machine can run with a record.

    Args:
        record: from `record.read`.
        selection: what to compare.
        say: gets a line as each part begins.

    Returns:
        What was found; after Ctrl-C what was found until then, and that it is not all.

    Raises:
        ValueError: if a backend, tier or graph mode is not known.
        BackendUnavailableError: if a backend that was named cannot be used here.
    """
    selection = selection or Selection()
    if unknown := set(selection.tiers) - set(TIERS):
        raise ValueError(f"no tier named {', '.join(sorted(unknown))}; known: {', '.join(TIERS)}")
    backends = dict(coverage.chosen_backends(selection.backends))
    usable = [name for name, why in backends.items() if why is None]
    modes = {name: sorted({each.graph for each in coverage.configurations(name)}) for name in usable}
    if unknown := set(selection.graphs) - set().union(*modes.values()):
        known = ", ".join(sorted(set().union(*modes.values())))
        raise ValueError(f"no graph mode named {', '.join(sorted(unknown))} here; known: {known}")
    for name in usable:
        if selection.graphs and set(modes[name]).isdisjoint(selection.graphs):
            backends[name] = f"of {', '.join(selection.graphs)} it has none; its graph modes: {', '.join(modes[name])}"
    usable = [name for name, why in backends.items() if why is None]
    findings: list[Finding] = []
    interrupted = False
    try:
        for finding in _all_findings(record, usable, selection, say):
            findings.append(finding)
    except KeyboardInterrupt:
        interrupted = True
    machines = {}
    for name in usable:
        with registry.use_backend(name) as backend:
            machines[name] = environment(backend)
    unavailable = {name: why for name, why in backends.items() if why is not None}
    return Report(record.made_by, machines, unavailable, tuple(findings), interrupted)


def _all_findings(
    record: Record, backends: Sequence[str], selection: Selection, say: Callable[[str], None]
) -> Iterator[Finding]:
    say("the record itself")
    yield from audit(record, selection)
    for name in backends:
        say(f"{name}: single operations")
        for choice in coverage.operation_choices(name):
            yield from operation_findings(record, choice, selection)
        for configuration in coverage.configurations(name):
            if not selection.graphs or configuration.graph in selection.graphs:
                say(f"{name}: {configuration.strategy}, {configuration.graph}")
                yield from configuration_findings(record, configuration, selection)


def audit(record: Record, selection: Selection) -> Iterator[Finding]:
    """Compare what the record says with float64 computed here: a record is evidence, not authority."""
    for tier in filter(selection.wants, (BITWISE, BOUNDED)):
        for dtype in {case.dtype: None for case in record.cases if case.tier == tier}:
            cases = [case for case in record.cases if case.tier == tier and case.dtype == dtype]
            yield _finding(functools.partial(_audited_cases, cases), THE_RECORD, "layers", "", "", dtype, tier)
    with registry.use_backend(AUDITOR) as auditor:
        if selection.wants(BITWISE):
            for dtype in record.block_dtypes:
                run = functools.partial(_trained_block, record, torch.float64, auditor)
                yield _finding(run, THE_RECORD, BLOCK, "", "", dtype, BITWISE)
        for dtype in record.trajectories if selection.wants(TRAJECTORY) else ():
            run = functools.partial(_trained_model, record, dtype, torch.float64, auditor)
            yield _finding(run, THE_RECORD, MODEL, "", "", dtype, TRAJECTORY)


def _audited_cases(cases: Sequence[Case]) -> Verdict:
    return worst(map(_audited, cases))


def _audited(case: Case) -> Verdict:
    if case.tier == BOUNDED:
        return judge(case, case.expected, case.output_names)
    exact = truths(case, case.expected["adapted"], case.expected["adapted_after"])
    return worst(
        same_bits(case.expected[name], truth.exact.to(truth.dtype), f"{case.name} {name}")
        for name, truth in exact.items()
    )


def _trained_block(record: Record, dtype: torch.dtype, backend: Backend) -> Verdict:
    found = block.train_block(record.block, dtype, backend)
    return worst(same_bits(found[key], wanted, f"block {key}") for key, wanted in record.block_expected.items())


def _trained_model(record: Record, of: torch.dtype, dtype: torch.dtype, backend: Backend) -> Verdict:
    """Train the model of one dtype in another, and compare."""
    numbers = {name: value.to(of) if value.is_floating_point() else value for name, value in record.model.items()}
    return judge_trajectory(train_model(numbers, dtype, backend), record.trajectories[of], record.tolerances[of])


def operation_findings(record: Record, choice: OperationChoice, selection: Selection) -> Iterator[Finding]:
    """Compare one strategy of one tensor operation."""
    strategy = f"{choice.kind}={choice.name}" if choice.kind else choice.name
    named = {choice.kind: choice.name} if choice.kind else {}
    for tier, dtype, cases in _grouped(record, choice.backend, selection):

        def run(cases: Sequence[Case] = cases) -> Verdict:
            with registry.use_backend(choice.backend, **named) as backend:
                wanted = OPERATIONS[choice.field].results
                return worst(judge(case, run_operation(case, choice.field, backend), wanted) for case in cases)

        yield _finding(run, choice.backend, choice.field, strategy, "", dtype, tier)


def configuration_findings(record: Record, configuration: Configuration, selection: Selection) -> Iterator[Finding]:
    """Compare whole training steps in one configuration: single layers, the exact block, the tiny model.

    The tiny model is trained with the defaults only. Capturing a graph can take long: in graph modes that are not the
    backend's default a single shape stands for all, and strategies that are not the default run one resident layer.
    """
    name, strategy, graph = configuration.backend, configuration.strategy, configuration.graph
    everything, default_strategies = configuration.default_graph, not configuration.changed

    def finding(run: Callable[[Backend], Verdict], operation: str, dtype: torch.dtype, tier: str) -> Finding:
        return _finding(lambda: run(configuration.make()), name, operation, strategy, graph, dtype, tier)

    for residency in RESIDENCIES if everything or default_strategies else RESIDENCIES[:1]:
        for tier, dtype, of_all_shapes in _grouped(record, name, selection):
            cases = of_all_shapes if everything else of_all_shapes[:1]
            run = functools.partial(_run_layers, cases, residency, False)
            yield finding(run, f"layer, {residency}", dtype, tier)
            if tier == BITWISE and residency == RESIDENCIES[0] and everything:
                yield finding(functools.partial(_run_layers, cases, residency, True), STACKED, dtype, tier)
    dtypes = coverage.dtypes_of(name)
    if selection.wants(BITWISE) and (everything or default_strategies):
        for dtype in filter(dtypes.__contains__, record.block_dtypes):
            yield finding(functools.partial(_trained_block, record, dtype), BLOCK, dtype, BITWISE)
    if selection.wants(TRAJECTORY) and everything and default_strategies:
        for dtype in filter(dtypes.__contains__, record.trajectories):
            yield finding(functools.partial(_trained_model, record, dtype, dtype), MODEL, dtype, TRAJECTORY)


def _run_layers(cases: Sequence[Case], residency: str, stacked: bool, backend: Backend) -> Verdict:
    return worst(judge(case, run_layer(case, backend, residency, stacked), layer_results(case)) for case in cases)


def _grouped(record: Record, backend: str, selection: Selection) -> Iterator[tuple[str, torch.dtype, list[Case]]]:
    """Sort the record's layers by tier and dtype, those that a backend computes in."""
    for tier in filter(selection.wants, (BITWISE, BOUNDED)):
        for dtype in coverage.dtypes_of(backend):
            cases = [case for case in record.cases if case.tier == tier and case.dtype == dtype]
            if cases:
                yield tier, dtype, cases


def _finding(
    run: Callable[[], Verdict], backend: str, operation: str, strategy: str, graph: str, dtype: torch.dtype, tier: str
) -> Finding:
    """Run a comparison; what a device cannot do is a finding, too."""
    try:
        verdict = run()
    except BackendUnavailableError as error:
        verdict = Verdict(Status.SKIPPED, detail=str(error))
    except Exception as error:
        verdict = Verdict(Status.FAILED, detail=f"raised {type(error).__name__}: {error}")
        if "InvalidCxxCompiler" in verdict.detail:  # torch wraps it in another error
            verdict = Verdict(
                Status.SKIPPED, detail="torch.compile needs a C++ compiler: install g++, or --graph eager"
            )
    return Finding(backend, operation, strategy, graph, dtype, tier, verdict.status, verdict.fraction, verdict.detail)
