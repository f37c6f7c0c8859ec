"""Replays a record on the backends of this machine and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from paca import registry
from paca.errors import BackendUnavailableError
from paca.parity import block, coverage
from paca.parity.cases import BITWISE, BOUNDED, TIERS, TRAJECTORY, Case, truths
from paca.parity.coverage import Configuration, OperationChoice
from paca.parity.findings import Finding, Report, Status
from paca.parity.judge import Verdict, judge, judge_trajectory, same_bits, worst
from paca.parity.record import Record, environment
from paca.parity.replay import run_layer, run_operation
from paca.parity.trajectory import train_model

RESIDENCIES = ("resident", "swap")
BLOCK = f"block, {block.STEPS} SGD steps"
MODEL = "tiny Llama, AdamW"
THE_RECORD = "the record"


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

    Raises:
        ValueError: if a backend, tier or graph mode is not known.
        BackendUnavailableError: if a backend that was named cannot be used here.
    """
    selection = selection or Selection()
    if unknown := set(selection.tiers) - set(TIERS):
        raise ValueError(f"no tier named {', '.join(sorted(unknown))}; known: {', '.join(TIERS)}")
    backends = coverage.chosen_backends(selection.backends)
    usable = [name for name, why in backends.items() if why is None]
    _check_graphs(selection.graphs, usable)
    findings: list[Finding] = []
    say("the record itself")
    findings += audit(record, selection)
    for name in usable:
        say(f"{name}: single operations")
        for choice in coverage.operation_choices(name):
            findings += operation_findings(record, choice, selection)
        for configuration in coverage.configurations(name):
            if not selection.graphs or configuration.graph in selection.graphs:
                say(f"{name}: {configuration.strategy}, {configuration.graph}")
                findings += configuration_findings(record, configuration, selection)
    machines = {}
    for name in usable:
        with registry.use_backend(name) as backend:
            machines[name] = environment(backend)
    unavailable = {name: why for name, why in backends.items() if why is not None}
    return Report(record.made_by, machines, unavailable, tuple(findings))


def _check_graphs(graphs: Sequence[str], backends: Sequence[str]) -> None:
    known = sorted({configuration.graph for name in backends for configuration in coverage.configurations(name)})
    if unknown := set(graphs) - set(known):
        raise ValueError(f"no graph mode named {', '.join(sorted(unknown))} here; known: {', '.join(known)}")


def audit(record: Record, selection: Selection) -> Iterator[Finding]:
    """Compare what the record says with float64 computed here: a record is evidence, not authority."""
    for tier in filter(selection.wants, (BITWISE, BOUNDED)):
        for dtype in {case.dtype: None for case in record.cases if case.tier == tier}:
            cases = [case for case in record.cases if case.tier == tier and case.dtype == dtype]
            verdict = worst(map(_audited, cases))
            yield Finding(THE_RECORD, "layers", "", "", dtype, tier, verdict.status, verdict.fraction, verdict.detail)


def _audited(case: Case) -> Verdict:
    if case.tier == BOUNDED:
        return judge(case, case.expected)
    exact = truths(case, case.expected["adapted"], case.expected["adapted_after"])
    return worst(
        same_bits(case.expected[name], truth.exact.to(truth.dtype), f"{case.name} {name}")
        for name, truth in exact.items()
    )


def operation_findings(record: Record, choice: OperationChoice, selection: Selection) -> Iterator[Finding]:
    """Compare one strategy of one tensor operation."""
    strategy = f"{choice.kind}={choice.name}" if choice.kind else choice.name
    named = {choice.kind: choice.name} if choice.kind else {}
    for tier, dtype, cases in _grouped(record, choice.backend, selection):

        def run(cases: Sequence[Case] = cases) -> Verdict:
            with registry.use_backend(choice.backend, **named) as backend:
                return worst(judge(case, run_operation(case, choice.field, backend)) for case in cases)

        yield _finding(run, choice.backend, choice.field, strategy, "", dtype, tier)


def configuration_findings(record: Record, configuration: Configuration, selection: Selection) -> Iterator[Finding]:
    """Compare whole training steps in one configuration: single layers, the exact block, the tiny model.

    The tiny model is trained with the defaults only. Capturing a graph can take long: in graph modes that are not the
    backend's default a single shape stands for all, and strategies that are not the default run one resident layer.
    """
    name, strategy, graph = configuration.backend, configuration.strategy, configuration.graph
    everything, default_strategies = configuration.default_graph, not configuration.changed
    for residency in RESIDENCIES if everything or default_strategies else RESIDENCIES[:1]:
        for tier, dtype, of_all_shapes in _grouped(record, name, selection):
            cases = of_all_shapes if everything else of_all_shapes[:1]

            def layers(cases: Sequence[Case] = cases, residency: str = residency) -> Verdict:
                backend = configuration.make()
                return worst(judge(case, run_layer(case, backend, residency)) for case in cases)

            yield _finding(layers, name, f"layer, {residency}", strategy, graph, dtype, tier)
    dtypes = coverage.dtypes_of(name)
    trained_too = selection.wants(BITWISE) and (everything or default_strategies)
    for dtype in filter(dtypes.__contains__, record.block_dtypes if trained_too else ()):

        def trained(dtype: torch.dtype = dtype) -> Verdict:
            found = block.train_block(record.block, dtype, configuration.make())
            return worst(same_bits(found[key], wanted, f"block {key}") for key, wanted in record.block_expected.items())

        yield _finding(trained, name, BLOCK, strategy, graph, dtype, BITWISE)
    all_default = selection.wants(TRAJECTORY) and everything and default_strategies
    for dtype in filter(dtypes.__contains__, record.trajectories if all_default else ()):

        def run(dtype: torch.dtype = dtype) -> Verdict:
            found = train_model(record.model, dtype, configuration.make())
            return judge_trajectory(found, record.trajectories[dtype], record.tolerances[dtype])

        yield _finding(run, name, MODEL, strategy, graph, dtype, TRAJECTORY)


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
