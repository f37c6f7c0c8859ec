"""A record travels: it reads back as it was written, tells damage, and is remade by the command that made it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import paca
from paca import registry
from paca.parity import coverage, recording
from paca.parity import verify as verifying
from paca.parity.cases import BITWISE, BOUNDED
from paca.parity.certificate import NotExactError
from paca.parity.command import main
from paca.parity.findings import Status
from paca.parity.record import REFERENCE, RecordError, read, write
from paca.parity.table import summary
from paca.parity.verify import Selection, verify

FOUR_MEGABYTES = 4_000_000


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE, tmp_path / "record"))


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_shipped_record_is_small_and_names_no_place():
    assert sum(file.stat().st_size for file in REFERENCE.iterdir()) < FOUR_MEGABYTES
    document = json.loads((REFERENCE / "parity.json").read_text())
    assert "/" not in json.dumps(document["made_by"])


def test_a_record_reads_back_as_it_was_written(tmp_path):
    record = read(REFERENCE)
    write(record, tmp_path / "again")
    again = read(tmp_path / "again")
    assert again.made_by == record.made_by
    assert (again.tolerances, again.block_dtypes) == (record.tolerances, record.block_dtypes)
    for one, other in zip(record.cases, again.cases, strict=True):
        assert replace(one, inputs={}, expected={}) == replace(other, inputs={}, expected={})
        assert equal(one.inputs, other.inputs)
        assert equal(one.expected, other.expected)
    assert equal(record.block, again.block)
    assert equal(record.block_expected, again.block_expected)
    assert equal(record.model, again.model)
    for name in ("parity.json", "parity.safetensors"):
        assert (REFERENCE / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_shipped_record_is_what_the_recording_makes():
    """Inputs and exact results bit for bit; of the rest, what the rounding bounds allow another machine."""
    shipped = read(REFERENCE)
    made = recording.make_record(paca.set_backend("cpu"))
    for one, other in zip(shipped.cases, made.cases, strict=True):
        assert one.name == other.name
        assert equal(one.inputs, other.inputs)
        assert set(one.expected) == set(one.output_names)
        if one.tier == BITWISE:
            assert equal(one.expected, other.expected)
    assert equal(shipped.block, made.block)
    assert equal(shipped.block_expected, made.block_expected)
    assert equal(shipped.model, made.model)
    report = verify(made, Selection(backends=["cpu"], graphs=["eager"]))
    assert report.passed


def test_a_record_is_not_overwritten(copy, capsys):
    with pytest.raises(FileExistsError, match="holds a record already"):
        write(read(REFERENCE), copy)
    assert main(["record", "--out", str(copy)]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_another_schema_is_named(copy):
    document = json.loads((copy / "parity.json").read_text())
    (copy / "parity.json").write_text(json.dumps(document | {"schema": 99}))
    with pytest.raises(RecordError, match="schema 99, this paca reads schema 2"):
        read(copy)


def edit_a_tolerance(folder):
    document = json.loads((folder / "parity.json").read_text())
    document["trajectories"]["float32"]["tolerance_of_deltas"] = 0.9
    (folder / "parity.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "parity.json").unlink(), "holds no parity.json"),
        (lambda folder: (folder / "parity.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "parity.json").write_text("[]"), "schema None"),
        (lambda folder: (folder / "parity.safetensors").unlink(), "holds a parity.json but no parity.safetensors"),
        (lambda folder: (folder / "parity.safetensors").write_bytes(b"x"), "is not the file that"),
        (edit_a_tolerance, "is not as it was written"),
    ],
    ids=["no document", "broken document", "no object", "no tensors", "other tensors", "edited document"],
)
def test_a_damaged_record_says_so(copy, damage, message):
    damage(copy)
    with pytest.raises(RecordError, match=message):
        read(copy)
    assert main(["verify", str(copy)]) == 2


@pytest.mark.parametrize(
    "changes", [{"made_by": []}, {"cases": "x"}, {"trajectories": []}, {"block_dtypes": ["float12"]}], ids=str
)
def test_a_document_of_another_form_is_refused_though_its_checksum_is_right(copy, changes):
    content = json.loads((copy / "parity.json").read_text()) | changes
    del content["sha256_of_document"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (copy / "parity.json").write_text(json.dumps(content | {"sha256_of_document": digest}))
    with pytest.raises(RecordError, match="is damaged"):
        read(copy)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, made_by=without(r.made_by, "torch")), "it does not say with which torch it was made"),
        (lambda r: replace(r, cases=()), "it holds no cases"),
        (lambda r: replace(r, cases=r.cases[:1] * 2), "two cases are named bitwise/odd/float32"),
        (lambda r: with_case(r, tier="best"), "bitwise/odd/float32: its tier is 'best'"),
        (lambda r: with_case(r, alpha=0.0), "its alpha is 0.0"),
        (lambda r: with_case(r, lead=(36,)), "(36, "),
        (lambda r: with_case(r, lead=(-1, -37)), "its leading sizes are [-1, -37], no counts"),
        (lambda r: with_case(r, inputs=without(r.cases[0].inputs, "weight")), "no weight"),
        (lambda r: with_case(r, inputs=without(r.cases[0].inputs, "bias")), "bias is missing"),
        (lambda r: with_case(r, expected=without(r.cases[0].expected, "y")), "y is missing"),
        (lambda r: with_case(r, expected={**r.cases[0].expected, "z": torch.ones(1)}), "z is not known"),
        (lambda r: with_case(r, inputs={**r.cases[0].inputs, "index": torch.tensor([4, 3, 2, 1, 0])}), "ascending"),
        (lambda r: with_case(r, inputs={**r.cases[0].inputs, "index": torch.tensor([1, 2, 3, 4, 53])}), "0 to 52"),
        (lambda r: with_case(r, inputs={**r.cases[0].inputs, "bias": torch.full((29,), torch.nan)}), "not finite"),
        (lambda r: replace(r, block_dtypes=()), "proved exact in no dtype"),
        (lambda r: replace(r, block=without(r.block, "x")), "block: x is missing"),
        (lambda r: replace(r, block_expected=without(r.block_expected, "y")), "block: y is missing"),
        (lambda r: replace(r, model=without(r.model, "input_ids")), "model: input_ids is missing"),
        (lambda r: with_tolerance(r, deltas=math.nan), "no finite number"),
        (lambda r: with_tolerance(r, deltas=0.0), "not above 0"),
        (lambda r: with_tolerance(r, deltas=3.0), "not below 1"),
        (lambda r: with_tolerance(r, losses=(0.1,)), "not of 8 steps"),
    ],
)
def test_a_record_that_cannot_be_compared_with_says_why(tmp_path, change, message):
    write(change(read(REFERENCE)), tmp_path / "other")
    with pytest.raises(RecordError, match=re.escape(message)):
        read(tmp_path / "other")
    assert main(["verify", str(tmp_path / "other")]) == 2


def with_case(record, **changes):
    return replace(record, cases=(replace(record.cases[0], **changes), *record.cases[1:]))


def with_tolerance(record, **changes):
    tolerances = {dtype: replace(tolerance, **changes) for dtype, tolerance in record.tolerances.items()}
    return replace(record, tolerances=tolerances)


def changed(record, name, tier):
    """The record with one number of one result off by the smallest possible step."""
    case = next(case for case in record.cases if case.tier == tier)
    value = case.expected[name]
    value[0, 0] = torch.nextafter(value[0, 0], value.new_tensor(9e9))
    return case


def test_a_record_that_is_wrong_by_one_ulp_is_found_out_and_so_is_who_differs_from_it():
    record = read(REFERENCE)
    case = changed(record, "grad_delta", BITWISE)
    report = verify(record, Selection(backends=["cpu"], tiers=[BITWISE], graphs=["eager"]))
    wrong = [finding for finding in report.failed if finding.backend == "the record"]
    assert [finding.dtype for finding in wrong] == [case.dtype]
    assert f"{case.name} grad_delta: [0, 0] is " in wrong[0].detail
    assert "1 ulp apart; 1 of " in wrong[0].detail
    assert {f.operation for f in report.failed if f.backend == "cpu"} == {
        *("grad_columns", "layer, resident", "layer, swap", "layer, two adapters"),
    }


def test_a_backend_that_is_not_there_is_said_to_be_left_out(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "asleep", "paca_dummy:AsleepBackend")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin"))
    monkeypatch.setattr(registry, "available_backends", lambda: {"asleep": "it sleeps"})
    report = verify(read(REFERENCE), Selection(tiers=[BITWISE]))
    assert "asleep: not compared: it sleeps" in list(summary(report))


def test_nothing_compared_is_no_pass(monkeypatch):
    monkeypatch.setattr(registry, "available_backends", lambda: {"asleep": "it sleeps"})
    report = verify(read(REFERENCE))
    assert report.findings
    assert not report.passed


def test_json_and_page_hold_every_finding(tmp_path, capsys):
    words = ["verify", "--backend", "cpu", "--tier", "bitwise", "--graph", "eager"]
    assert main([*words, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "pages" / "a.html")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["passed"]
    assert {finding["status"] for finding in report["findings"]} == {Status.IDENTICAL.value}
    assert report["machines"]["cpu"]["backend"] == "cpu"
    page = (tmp_path / "pages" / "a.html").read_text()
    assert page.count('class="identical"') == len(report["findings"])
    assert "every comparison passed" in page
    printed = capsys.readouterr().out
    assert printed.count("identical  ") > 10
    assert "cpu, float32, bfloat16, float16, compared with the record of cpu" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "nowhere"], "there is no backend 'nowhere'"),
        (["--backend", "cpu", "--graph", "hpu_graphs"], "no graph mode named hpu_graphs here"),
        (["elsewhere"], "holds no parity.json; `paca parity record --out DIR` makes a record"),
        (["--json", "."], "is a folder; name a file"),
        (["--html", "/proc/none/a.html"], "/proc/none"),
    ],
)
def test_what_cannot_be_done_is_status_2_with_the_reason(words, message, capsys, monkeypatch):
    monkeypatch.setattr(verifying, "audit", lambda *given: pytest.fail("work was begun"))
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_proved_exact_here_is_status_2_and_nothing_is_recorded(tmp_path, capsys, monkeypatch):
    def refuse(*given, **named):
        raise NotExactError("aten.new.default is none of the operations that can be proved exact")

    monkeypatch.setattr(recording, "make_record", refuse)
    assert main(["record", "--out", str(tmp_path)]) == 2
    assert "paca parity record: aten.new.default is none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_hold_a_record_is_found_before_one_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recording, "make_record", lambda *given, **named: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    assert main(["record", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_a_backend_without_the_graph_mode_that_was_asked_for_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(registry.BUILT_IN, "elsewhere", "paca_dummy:DummyBackend")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin"))
    monkeypatch.setattr("paca_dummy.DummyBackend.name", "elsewhere")
    monkeypatch.setattr(registry, "available_backends", lambda: dict.fromkeys(["cpu", "elsewhere"]))
    graphs = {c.graph for c in coverage.configurations("elsewhere")}
    assert "compile" not in graphs
    monkeypatch.setattr(verifying, "configuration_findings", lambda *given: iter(()))
    report = verify(read(REFERENCE), Selection(tiers=[BITWISE], graphs=["compile"]))
    assert set(report.machines) == {"cpu"}
    assert report.unavailable == {"elsewhere": f"of compile it has none; its graph modes: {', '.join(graphs)}"}


def test_the_report_of_a_failure_is_valid_json(tmp_path, monkeypatch):
    record = read(REFERENCE)
    next(case for case in record.cases if case.tier == BOUNDED).expected["y"][0, 0] = math.nan
    report = verify(record, Selection(backends=["cpu"], tiers=[BOUNDED], graphs=["eager"]))
    assert not report.passed
    assert '"infinite"' in json.dumps(report.as_json(), allow_nan=False)


def test_the_file_of_a_record_is_no_folder(copy, capsys):
    assert main(["verify", str(copy / "parity.json")]) == 2
    assert "parity.json is a file; name the folder that holds" in capsys.readouterr().err


def test_a_backend_that_cannot_record_leaves_no_folder(tmp_path, capsys):
    assert main(["record", "--backend", "nowhere", "--out", str(tmp_path / "new")]) == 2
    assert "there is no backend 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_was_compared_before_an_interruption_is_kept(tmp_path, capsys, monkeypatch):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(verifying, "configuration_findings", interrupt)
    words = ["verify", "--backend", "cpu", "--tier", "bitwise"]
    assert main([*words, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]) == 130
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["interrupted"], report["passed"]) == (True, False)
    assert {"the record", "cpu"} == {finding["backend"] for finding in report["findings"]}
    assert "interrupted: the rest was not compared" in (tmp_path / "a.html").read_text()
    printed = capsys.readouterr().out
    assert "grad_columns" in printed
    assert printed.endswith("interrupted: the rest was not compared\n")


def test_a_machine_records_and_is_verified_by_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry.BUILT_IN, "elsewhere", "paca_dummy:DummyBackend")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin"))
    monkeypatch.setattr("paca_dummy.DummyBackend.name", "elsewhere")
    assert main(["record", "--backend", "elsewhere", "--out", str(tmp_path / "there")]) == 0
    assert main(["verify", str(tmp_path / "there"), "--backend", "cpu", "--graph", "eager"]) == 0
    assert "compared with the record of elsewhere" in capsys.readouterr().out
