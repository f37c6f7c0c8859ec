"""A model replayed from graphs trains as it does without, and says why when it cannot.

Without a GPU a stand-in records and replays by running the function again, which shows the control flow and what
autograd makes of it; with one the same tests run on real CUDA graphs.
"""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from operations import Operations
from tiny_models import adapted, llama, tokens
from torch.utils.checkpoint import checkpoint

import paca
from paca import registry
from paca_cuda import CUDABackend
from paca_cuda.graphs import MOST_GRAPHS, WARM_UP, GraphedModel, _copies, record_cuda_graph

PLAIN = {"grad_columns": "matmul", "write": "index_copy"}


class StandIn:
    """Counts recordings and replays, and gives every replay the same tensors, as a graph would."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        outputs = function()

        def replay():
            self.replayed += 1
            with torch.enable_grad():  # a function that is replayed runs inside an autograd function
                again = function()
            for old, new in zip(outputs, again, strict=True):
                if old is not None:
                    old.detach().copy_(new)
            return outputs

        return outputs, replay


@pytest.fixture
def place():
    """Where it runs, and what records there."""
    if torch.cuda.is_available():
        return torch.device("cuda"), record_cuda_graph
    return torch.device("cpu"), StandIn()


def model_on(device, monkeypatch):
    monkeypatch.setattr(registry, "_current", CUDABackend(**PLAIN))
    return adapted(llama(use_cache=False)).to(device).train()


def train(model, run, device, steps=8, accumulate=1, length=9):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        for part in range(accumulate):
            ids = tokens(length=length, seed=10 * step + part).to(device)
            loss = run(input_ids=ids, labels=ids).loss / accumulate
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_from_graphs_follows_training_without(place, monkeypatch, accumulate):
    device, record = place
    plain, graphed = model_on(device, monkeypatch), model_on(device, monkeypatch)
    expected = train(plain, plain, device, accumulate=accumulate)
    run = GraphedModel(graphed, record)
    found = train(graphed, run, device, accumulate=accumulate)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert len(run._recordings) == 1
    paca.verify(graphed)
    if isinstance(record, StandIn):
        assert record.recorded == 2  # forward and backward
        assert record.replayed == 2 * (8 * accumulate - WARM_UP)


def test_gradients_that_are_kept_are_not_overwritten_by_the_next_step(place, monkeypatch):
    device, record = place
    model = model_on(device, monkeypatch)
    run = GraphedModel(model, record)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(seed):
        ids = tokens(seed=seed).to(device)
        run(input_ids=ids, labels=ids).loss.backward()

    for _ in range(WARM_UP + 1):
        gradients(0)
    model.zero_grad()
    gradients(1)
    kept = [p.grad.clone() for p in trained]
    gradients(2)
    both = [p.grad.clone() for p in trained]
    model.zero_grad()
    gradients(2)
    for a, b, p in zip(kept, both, trained, strict=True):
        assert torch.allclose(a + p.grad, b, rtol=1e-5, atol=1e-7)


def accumulators_in(output):
    """Return the tensors that a backward from an output would add gradients to."""
    queue, seen, found = [output.grad_fn], set(), []
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [following for following, _ in node.next_functions]
            found += [node.variable] if hasattr(node, "variable") else []
    return found


def test_a_capture_shares_no_accumulator_with_a_loss_that_is_still_alive(monkeypatch):
    # CUDA refuses a capture in which autograd waits for the stream of an accumulator from before.
    model = model_on(torch.device("cpu"), monkeypatch)
    ids = tokens()
    kept = [model(input_ids=ids, labels=ids).loss]
    parameters = {id(parameter) for parameter in model.parameters()}
    assert any(id(variable) in parameters for variable in accumulators_in(kept[0]))

    def record(function):
        outputs = function()
        if len(recorded) == 0:
            (loss,) = [output for output in outputs if output is not None and output.dim() == 0]
            recorded.extend(accumulators_in(loss))
        return outputs, lambda: outputs

    recorded = []
    run = GraphedModel(model, record)
    for _ in range(WARM_UP + 1):
        kept.append(run(input_ids=ids, labels=ids).loss)
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert {variable.data_ptr() for variable in recorded} == trained  # the same memory
    assert not any(id(variable) in parameters for variable in recorded)


def test_after_a_capture_that_failed_another_model_is_captured(gpu, monkeypatch):
    class Reads(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y * float(y.detach().sum())

    x = torch.randn(4, 8, device=gpu)
    for module, captured in ((Reads(8, 8), False), (torch.nn.Linear(8, 8), True), (Reads(8, 8), False)):
        run = GraphedModel(module.to(gpu))
        for _ in range(WARM_UP + 2):
            run(x).sum().backward()
        assert bool(run._recordings) == captured
        assert (run.why_eager is None) == captured
    assert torch.randn(3, device=gpu).isfinite().all()  # the generator does not believe in a capture either


def test_only_outputs_that_take_gradients_are_differentiated(place, monkeypatch):
    device, record = place
    model = model_on(device, monkeypatch)
    run, ids = GraphedModel(model, record), tokens().to(device)

    def step(use, run=run):
        made = run(input_ids=ids, labels=ids)
        model.zero_grad()
        use(made).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    for _ in range(WARM_UP + 2):
        found = step(lambda made: made.loss)
    (recording,) = run._recordings.values()
    assert [None if grad is None else grad.dim() for grad in recording.grad_outputs] == [0, None]  # loss, logits
    for a, b in zip(found, step(lambda made: made.loss, model), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match=r"output 1 of a model .* did not in the steps before"):
        step(lambda made: made.loss + made.logits.square().mean())


def test_a_graph_that_would_lose_gradients_is_not_used(place, monkeypatch, caplog):
    """Reentrant recomputation gives gradients to parameters that autograd does not know of beforehand."""
    device, record = place
    model = model_on(device, monkeypatch)
    model.enable_input_require_grads()
    layers = model.base_model.model.model.layers
    for layer in layers:
        inner = layer.forward
        layer.forward = lambda x, inner=inner, **rest: checkpoint(lambda x: inner(x, **rest), x, use_reentrant=True)
    run = GraphedModel(model, record)
    with caplog.at_level(logging.WARNING, logger="paca"):
        train(model, run, device)
    assert "would get no gradient; recompute with use_reentrant=False" in caplog.text
    assert run._recordings == {}
    ids = tokens().to(device)
    model.zero_grad()
    run(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loss_made_of_several_outputs_gets_all_gradients(place, monkeypatch):
    device, record = place
    model = model_on(device, monkeypatch)
    run, ids = GraphedModel(model, record), tokens().to(device)
    grads = []
    for one in (*[run] * (WARM_UP + 2), model):
        made = one(input_ids=ids, labels=ids)
        model.zero_grad()
        (made.loss + made.logits.square().mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert run._recordings
    for a, b in zip(grads[-2], grads[-1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_copy_captures_graphs_of_its_own(place, monkeypatch):
    device, record = place
    model = model_on(device, monkeypatch)
    run = GraphedModel(model, record)
    train(model, run, device)
    again = copy.deepcopy(run)
    assert again._recordings == {}
    expected = train(model, run, device)
    assert torch.allclose(train(again.module, again, device), expected, rtol=1e-5)
    assert len(again._recordings) == 1
    if record is record_cuda_graph:
        loaded = pickle.loads(pickle.dumps(run))
        assert loaded._recordings == {}


def test_copies_of_gradients_are_made_for_each_dtype_at_once():
    """In a list of several dtypes torch launches a kernel for each tensor."""
    given = [torch.ones(2), None, torch.ones(3).bfloat16(), torch.arange(4.0)]
    with Operations() as calls:
        made = _copies(given)
    assert calls.names == ["_foreach_mul", "_foreach_mul"]
    assert made[1] is None
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(made, given, strict=True) if b is not None
    )


def test_evaluation_runs_as_usual(place, monkeypatch):
    device, record = place
    model = model_on(device, monkeypatch)
    run = GraphedModel(model, record).eval()
    for _ in range(WARM_UP + 2):
        run(input_ids=tokens().to(device))
    assert run._recordings == {}


def test_each_shape_has_a_graph_until_there_are_too_many(place, monkeypatch, caplog):
    device, record = place
    model = model_on(device, monkeypatch)
    run = GraphedModel(model, record)
    for length in range(5, 5 + MOST_GRAPHS):
        train(model, run, device, steps=WARM_UP + 1, length=length)
    assert len(run._recordings) == MOST_GRAPHS
    with caplog.at_level(logging.WARNING, logger="paca"):
        losses = train(model, run, device, steps=WARM_UP + 2, length=20)
    assert losses.isfinite().all()
    assert run._recordings == {}
    (message,) = [record.message for record in caplog.records]
    assert "more than 4 shapes; pad or pack them to one length" in message


def test_what_cannot_be_captured_runs_as_usual_and_is_said_once(monkeypatch, caplog):
    model = model_on(torch.device("cpu"), monkeypatch)

    def record(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    run = GraphedModel(model, record)
    with caplog.at_level(logging.WARNING, logger="paca"):
        losses = train(model, run, torch.device("cpu"))
    assert losses.isfinite().all()
    (message,) = [record.message for record in caplog.records]
    assert "cannot be captured (RuntimeError: operation not permitted" in message


def test_an_output_that_is_no_tensor_is_said(monkeypatch, caplog):
    class Odd(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), "word"

    run = GraphedModel(Odd(3, 3), StandIn())
    with caplog.at_level(logging.WARNING, logger="paca"):
        for _ in range(WARM_UP + 2):
            assert run(torch.randn(2, 3))[1] == "word"
    assert "an output is no tensor but str" in caplog.text


def test_another_adapter_gets_a_graph_of_its_own(place, monkeypatch):
    device, record = place
    model = model_on(device, monkeypatch)
    model.add_adapter("other", paca.PacaConfig(r=2, paca_alpha=2, target_modules="all-linear"))
    run = GraphedModel(model, record)
    train(model, run, device)
    model.set_adapter("other")
    train(model, run, device)
    assert len(run._recordings) == 2


def test_the_backend_captures_and_its_trainer_does(monkeypatch):
    backend = CUDABackend(graph="cuda_graph", **PLAIN)
    module = torch.nn.Linear(2, 2)
    assert isinstance(backend.capture(module), GraphedModel)
    assert backend.capture(module).in_features == 2  # attributes are those of the module
    assert backend.trainer()[0].__name__ == "CUDAGraphTrainer"
    assert CUDABackend(**PLAIN).capture(module) is module


def test_the_trainer_replays_its_training_steps(tmp_path, monkeypatch):
    import paca_cuda.trainer as trainer_module

    record = StandIn()
    monkeypatch.setattr(trainer_module, "GraphedModel", lambda model: GraphedModel(model, record))
    model = model_on(torch.device("cpu"), monkeypatch)
    trainer_type, arguments = CUDABackend(graph="cuda_graph", **PLAIN).trainer()
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=12)]
    trainer = trainer_type(
        model,
        arguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=6,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-2,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    assert record.recorded == 2
    assert record.replayed == 2 * (6 - WARM_UP)
    assert trainer.evaluate()["eval_loss"] > 0
    paca.verify(model)
