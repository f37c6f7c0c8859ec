"""Breaks each rule of the method once, in a copy of the project, and checks that its tests notice.

    python ci/break_rules.py            every rule
    python ci/break_rules.py "rule 3"   those whose description contains the text

A test that passes on broken code proves nothing. Exit status 1 if a break goes unnoticed, or no longer fits the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Break(NamedTuple):
    """One defect to plant: what it does, where, and the tests that must fail."""

    rule: str
    file: str
    old: str
    new: str
    tests: str


LINEAR, FRESH = "tests/core/test_linear.py", "tests/freshness/test_never_stale.py"
JUDGING = "tests/parity/test_judging.py"
QUANTISED = "tests/quantised/test_qpaca.py"
SWITCH, BANK = "tests/service/test_switching.py", "tests/service/test_bank.py"
ESTIMATE = "tests/estimate"
OTHERS = "tests/freshness/test_other_optimizers.py"
REMEMBERED = "tests/freshness/test_remembered_adapters.py"
BREAKS = [
    Break(
        "estimate: what was freed still counts",
        "paca/estimate/meter.py",
        "            entry.died = self.moment\n",
        "",
        f"{ESTIMATE}/test_meter.py",
    ),
    Break(
        "estimate: a layer's input is kept in place of its r channels",
        "paca/estimate/layers.py",
        "ctx.layer = layer\n        with torch.autocast",
        "ctx.layer, ctx.x = layer, x\n        with torch.autocast",
        f"{ESTIMATE}/test_step.py::test_shapes_tell_what_a_real_step_takes",
    ),
    Break(
        "estimate: what fits leaves the allocator nothing to lose",
        "paca/estimate/fit.py",
        "round(peak * (1 + ALLOCATOR_SHARE)) + CONTEXT_BYTES",
        "peak + CONTEXT_BYTES",
        f"{ESTIMATE}/test_fit.py::test_a_device_needs_room_for_allocator_and_context_too",
    ),
    Break(
        "rule 1, identity at start: deltas start at random",
        "paca/layer.py",
        "delta = torch.zeros(rows, len(index), dtype=dtype)",
        "delta = torch.randn(rows, len(index), dtype=dtype)",
        f"{LINEAR}::test_a_fresh_adapter_gives_the_bits_of_the_base_layer",
    ),
    Break(
        "rule 2, written once: every forward writes",
        "paca/layer.py",
        "if adapters and self.adapted.is_fresh(adapters):",
        "if False:",
        f"{FRESH}::test_each_layer_is_written_exactly_once_a_step_and_never_in_forward",
    ),
    Break(
        "rule 3, never stale: no write after the optimizer step",
        "paca/freshness.py",
        "        write_changed(layers)\n        for layer in layers:\n",
        "        for layer in layers:\n",
        f"{FRESH}::test_every_forward_sees_the_last_step",
    ),
    Break(
        "rule 3, never stale: optimizers that step flat copies are overlooked",
        "paca/freshness.py",
        "        _suspect(optimizer)\n",
        "        pass\n",
        f"{FRESH}::test_every_forward_sees_the_last_step",
    ),
    Break(
        "rule 3, never stale: a gradient does not make copies of the deltas suspect again",
        "paca/linear.py",
        "                ctx.held.settled = False\n",
        "                pass\n",
        f"{OTHERS}::test_copies_that_are_stepped_after_an_optimizer_of_the_deltas_are_seen_at_once",
    ),
    Break(
        "rule 3, never stale: gradients of replayed graphs are trusted for good",
        "paca/freshness.py",
        "again = other is not None and other.own_steps == _own_steps",
        "again = False",
        f"{OTHERS}::test_gradients_that_no_layer_saw_delay_that_by_one_step",
    ),
    Break(
        "never stale, at no cost: every other optimizer makes layers compare their values",
        "paca/freshness.py",
        "        waits = again or not layer.adapted.held.settled\n",
        "        waits = True\n",
        f"{OTHERS}::test_another_models_optimizer_costs_no_look",
    ),
    Break(
        "rule 3, never stale: a suspicion raised by one optimizer fails the step of another",
        "paca/freshness.py",
        "if due and layer.adapted.suspect in (None, mine):",
        "if due:",
        f"{OTHERS}::test_a_suspicion_outlasts_the_freezing_of_an_adapter",
    ),
    Break(
        "remembered writes: another weight in the same memory goes unseen",
        "paca/columns.py",
        "            weight is last.weight\n            and",
        "           ",
        "tests/freshness/test_remembered_writes.py",
    ),
    Break(
        "remembered writes: a weight whose values lie elsewhere goes unseen",
        "paca/columns.py",
        "            and weight.data_ptr() == last.address\n",
        "",
        "tests/freshness/test_remembered_writes.py",
    ),
    Break(
        "remembered writes: a delta whose values lie elsewhere goes unseen",
        "paca/columns.py",
        "            and delta.data_ptr() == write.delta.data_ptr()\n",
        "",
        "tests/freshness/test_remembered_writes.py",
    ),
    Break(
        "rule 3, never stale: versions are not looked at",
        "paca/columns.py",
        "delta.data_ptr(), version_of(delta), ",
        "delta.data_ptr(), ",
        f"{FRESH}::test_whatever_changes_a_delta_is_seen",
    ),
    Break(
        "rule 3, never stale: a change of scale is not seen",
        "paca/columns.py",
        "version_of(index), self.scale",
        "version_of(index)",
        f"{FRESH}::test_whatever_changes_a_delta_is_seen",
    ),
    Break(
        "registry: a backend that was installed since is not found",
        "paca/registry.py",
        "        _installed.cache_clear()  # it may have been installed since\n",
        "        pass\n",
        "tests/core/test_registry.py",
    ),
    Break(
        "rule 10, tied weights: a tie made later is not noticed",
        "paca/columns.py",
        "        self._refuse_second_holder(weight)\n",
        "",
        f"{FRESH}::test_two_layers_never_hold_columns_in_one_weight",
    ),
    Break(
        "rule 3, never stale: the spot check sees nothing",
        "paca/columns.py",
        "if not self.holds(adapters, rows, first):",
        "if False:",
        f"{FRESH}::test_an_edit_that_leaves_no_trace_is_refused_at_the_next_step",
    ),
    Break(
        "rule 3, never stale: a change between forward and backward goes unseen",
        "paca/linear.py",
        "if ctx.held is not None and ctx.held.key != ctx.key:",
        "if False:",
        f"{LINEAR}::test_a_change_between_forward_and_backward_is_refused",
    ),
    Break(
        "rule 4, exactly undone: a change is subtracted instead of restoring the columns",
        "paca/columns.py",
        "        self.pretrained_into(self.parameter)\n",
        "        if self.columns is not None and self.held.key is not None:\n"
        "            held = self.matrix.index_select(1, self.columns.index)\n"
        "            change = held.float() - self.columns.base.float()\n"
        "            self.matrix.index_add_(1, self.columns.index, (change * -1.001).to(held.dtype))\n",
        f"{FRESH}::test_undo_restores_the_weight_bit_for_bit",
    ),
    Break(
        "rule 4, exactly undone: state_dict shows the adapted columns",
        "paca/layer.py",
        "self.adapted.pretrained_into(state[key])",
        "pass",
        f"{FRESH}::test_undo_restores_the_weight_bit_for_bit",
    ),
    Break(
        "rule 5, deltas in float32: deltas take the weight's dtype",
        "paca/layer.py",
        "dtype = torch.promote_types(self.adapted.dtype, torch.float32)",
        "dtype = self.adapted.dtype",
        f"{FRESH}::test_deltas_are_float32_however_the_adapter_is_added",
    ),
    Break(
        "rule 6, only r channels are kept: all of x is saved",
        "paca/linear.py",
        "            keep(ctx, xs)\n            ctx.weight",
        "            keep(ctx, xs, x)\n            ctx.weight",
        f"{LINEAR}::test_exactly_r_channels_are_kept_for_backward",
    ),
    Break(
        "rule 6, one gather for layers that read the same input: each gathers its own",
        "paca/layer.py",
        "if then != now:",
        "if True:",
        f"{LINEAR}::test_layers_that_read_the_same_input_gather_once_and_keep_it_once",
    ),
    Break(
        "rule 7, same columns everywhere: the global generator is used",
        "paca/select.py",
        "generator=generator_for(seed, name), device",
        "device",
        "tests/core/test_select.py",
    ),
    Break(
        "rule 8, any shape: only three axes are expected",
        "paca/strategies.py",
        "return x.index_select(-1, index)",
        "return x[:, :, index]",
        f"{LINEAR}::test_output_and_gradients_stay_within_the_rounding_bound_of_float64",
    ),
    Break(
        "rule 9, gradients match: low-precision tokens are summed in low precision",
        "paca/strategies.py",
        "if gy.dtype in (torch.float32, torch.float64):",
        "if True:",
        f"{LINEAR}::test_output_and_gradients_stay_within_the_rounding_bound_of_float64",
    ),
    Break(
        "rule 9, gradients match: alpha / r is applied twice",
        "paca/linear.py",
        "ctx.ops.grad_columns(gy, xs, ctx.scale)",
        "ctx.ops.grad_columns(gy, xs, ctx.scale * ctx.scale)",
        "tests/parity/test_every_backend.py",
    ),
    Break(
        "rule 9, gradients match: tokens beyond the first block are left out",
        "paca/strategies.py",
        "zip(xs.split(TOKENS_PER_BLOCK), gy.split(TOKENS_PER_BLOCK), strict=True):",
        "[(xs[:TOKENS_PER_BLOCK], gy[:TOKENS_PER_BLOCK])]:",
        "tests/parity/test_every_backend.py::test_each_strategy_of_each_operation[cpu-grad_columns-thin_first]",
    ),
    Break(
        "parity: a result that was not computed is not missed",
        "paca/parity/judge.py",
        'verdicts.append(Verdict(Status.FAILED, detail=f"{place}: nothing was computed"))',
        "verdicts.append(Verdict(Status.IDENTICAL))",
        f"{JUDGING}::test_each_result_must_be_there",
    ),
    Break(
        "parity: written columns may be far off",
        "paca/parity/bounds.py",
        "inner = gamma(2, ACCUMULATOR_ROUNDOFF)",
        "inner = 2**15 * gamma(2, ACCUMULATOR_ROUNDOFF)",
        "tests/parity/test_planted_defects.py::test_no_other_operation_is_blamed[UpdateRoundedFirst]",
    ),
    Break(
        "parity: engines that chop are held to the bound of those that round",
        "paca/parity/bounds.py",
        "ACCUMULATOR_ROUNDOFF = 2 * ",
        "ACCUMULATOR_ROUNDOFF = ",
        "tests/parity/test_rounding_bounds.py::test_a_sum_that_loses_all_but_its_first_term_by_chopping_nearly_reaches_its_bound",
    ),
    Break(
        "parity: a trajectory's deltas are not looked at",
        "paca/parity/judge.py",
        "parts.append(of_deltas / tolerance.deltas)",
        "parts.append(0.0)",
        f"{JUDGING}::test_losses_and_deltas_are_both_held_to_their_tolerance",
    ),
    Break(
        "parity: what nobody proved exact is certified",
        "paca/parity/certificate.py",
        "if packet not in _PRODUCTS | _ADDITIONS | _ELEMENTWISE:",
        "if False:",
        "tests/parity/test_exactness.py::test_what_nobody_proved_is_not_certified",
    ),
    Break(
        "parity: what is recorded is not proved exact",
        "paca/parity/recording.py",
        "if case.tier == BITWISE:",
        "if False:",
        f"{JUDGING}::test_nothing_is_recorded_that_is_not_proved_exact",
    ),
    Break(
        "rule 3, never stale: compiled swapping layers leave the columns out where nothing trains",
        "paca/layer.py",
        "if base is not None and torch.compiler.is_compiling():",
        "if False:",
        "tests/parity/test_every_backend.py::test_training_steps[cpu-defaults-compile]",
    ),
    Break(
        "rule 10, works where Linear works: Conv1D is taken for a Linear",
        "paca/columns.py",
        "return weight.t() if isinstance(self.layer, Conv1D) else weight",
        "return weight",
        f"{LINEAR}::test_a_fresh_adapter_gives_the_bits_of_the_base_layer",
    ),
    Break(
        "rule 10, torch.compile: a Python counter in forward",
        "paca/layer.py",
        "        adapters = self.held_adapters()\n        if not adapters or self.merged:",
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        adapters = self.held_adapters() if self.calls % 10**6 else []\n"
        "        if not adapters or self.merged:",
        "tests/graph/test_compile.py::test_decoder_blocks_compile_whole_and_once_and_train_as_eager_does",
    ),
    Break(
        "switching: columns of the old adapter stay behind",
        "paca/columns.py",
        "            self.restore()\n            return self.matrix.detach().index_select(1, index)",
        "            return self.matrix.detach().index_select(1, index)",
        f"{SWITCH}::test_the_pretrained_bits_come_back_after_a_thousand_random_switches",
    ),
    Break(
        "switching: adapters of the same columns are restored in between",
        "paca/columns.py",
        "if before is not None and not self.left_behind and before.has(index):",
        "if False:",
        f"{SWITCH}::test_adapters_of_one_seed_train_the_same_columns_so_that_nothing_is_restored_between_them",
    ),
    Break(
        "bank: columns of the old adapter stay behind",
        "paca/bank.py",
        "return ColumnSwitch(old.write, new.write, apart)",
        "return ColumnSwitch(None, new.write, apart)",
        f"{BANK}::test_the_pretrained_bits_come_back_after_a_thousand_random_swaps",
    ),
    Break(
        "bank: what another bank holds is taken for pretrained values",
        "paca/bank.py",
        "            _holding[id(self.model)] = self\n",
        "            pass\n",
        "tests/service/test_bank.py::test_weights_that_hold_one_banks_adapter_are_nobody_elses",
    ),
    Break(
        "bank: columns that another adapter holds are taken for pretrained ones",
        "paca/bank.py",
        "columns = torch.where(kept, held.write.base[:, position], columns)",
        "pass",
        f"{BANK}::test_the_pretrained_bits_come_back_after_a_thousand_random_swaps",
    ),
    Break(
        "mixed batches: every row uses the last adapter",
        "paca/layer.py",
        "for row, other in enumerate(each) if other == name",
        "for row, other in enumerate(each)",
        "tests/service/test_mixed_batches.py::test_each_row_gets_what_its_adapter_gives_it_alone",
    ),
    Break(
        "conversion: a server's LoRA loses its scales",
        "paca/convert.py",
        "F.pad(layer.update(), (0, missing))",
        "F.pad(layer.delta, (0, missing))",
        "tests/service/test_conversion.py::test_one_rank_and_one_scale_lose_nothing",
    ),
    Break(
        "conversion: rows that scale their column are taken for one-hot",
        "paca/convert.py",
        "if bool((factors == 1).all()) else",
        "if True else",
        "tests/service/test_conversion.py::test_rows_of_one_entry_become_columns",
    ),
    Break(
        "compression: one bit takes the largest value for its scale",
        "paca/compress.py",
        "scale = delta.abs().mean(0)",
        "scale = largest",
        "tests/service/test_compression.py::test_one_bit_keeps_signs_with_the_best_scale_there_is",
    ),
    Break(
        "compression: the sign of four-bit codes is lost",
        "paca/compress.py",
        "np.where(nibbles > 7, nibbles - 16, nibbles)",
        "nibbles",
        "tests/service/test_compression.py::test_packing_is_exact_and_takes_the_bits_it_says",
    ),
    Break(
        "quantised, identity: int8 multiplies a dequantised weight, without rounding activations as the library does",
        "paca/strategies.py",
        "return form_fastest(dequantises, trains, tokens) if dequantises and trains else Form.SPLIT",
        "return form_fastest(dequantises, trains, tokens)",
        f"{QUANTISED}::test_a_new_adapter_changes_no_bit",
    ),
    Break(
        "quantised, fastest: the tokens of one row are taken for those of the batch",
        "paca/quantised.py",
        "x.shape[:-1].numel()",
        "x.shape[-2]",
        f"{QUANTISED}::test_the_tokens_of_a_batch_are_counted_over_all_its_rows",
    ),
    Break(
        "quantised, gradients: dX leaves the trained columns out",
        "paca/quantised.py",
        "gx = weight.ops.grad_input(gy, weight.overlaid(index, delta, ctx.scale, gy.dtype))",
        "gx = weight.ops.grad_input(gy, weight.overlaid(index, delta, 0.0, gy.dtype))",
        f"{QUANTISED}::test_gradients_meet_the_float64_oracle_on_the_dequantised_weight",
    ),
    Break(
        "quantised, merge: what one layer cannot do is found out after others were merged",
        "paca/model.py",
        "                layer.adapted.check_can_merge()",
        "                pass",
        f"{QUANTISED}::test_a_merge_that_one_layer_cannot_do_changes_none",
    ),
    Break(
        "quantised, only r channels are kept: the library's own autograd keeps the input",
        "paca/quantised.py",
        "keep(ctx, xs if ctx.needs_input_grad[3] else None, delta, index)",
        "keep(ctx, xs if ctx.needs_input_grad[3] else None, delta, index, x)",
        f"{QUANTISED}::test_only_r_channels_are_kept_for_backward",
    ),
    Break(
        "quantised, merge: the dequantised columns replace the trained ones",
        "paca/quantised.py",
        "weight.index_copy_(1, columns.index, adapted_columns(base, delta.detach(), scale))",
        "weight.index_copy_(1, columns.index, base)",
        f"{QUANTISED}::test_merging_keeps_the_trained_columns_exactly",
    ),
    Break(
        "quantised, fingerprint: only the format is compared",
        "paca/quantised.py",
        "digest.update(raw[sampled].cpu().numpy().tobytes())",
        "pass",
        f"{QUANTISED}::test_a_corrupted_base_is_refused",
    ),
    Break(
        "quantised, checkpointing: a forward that is recomputed takes another form than the first one took",
        "paca/quantised.py",
        "self.ops.quantised_form(self.is_bnb_4bit, trains or recomputed, x",
        "self.ops.quantised_form(self.is_bnb_4bit, trains, x",
        f"{QUANTISED}::test_gradient_checkpointing_changes_no_gradient",
    ),
    Break(
        "quantised, merge: layers of adapters that are not active are quantised again, from packed bits",
        "paca/requantise.py",
        "isinstance(m, PacaLayer) and _merges(m)",
        "isinstance(m, PacaLayer)",
        f"{QUANTISED}::test_requantising_leaves_layers_alone_that_only_another_adapter_trains",
    ),
    Break(
        "quantised, resume: a checkpoint goes on over a base that was quantised otherwise",
        "paca/training.py",
        "        expect_base_of(model, start)\n",
        "        pass\n",
        "tests/training/test_quantization.py::test_a_checkpoint_is_not_gone_on_from_on_a_base_quantised_otherwise",
    ),
    Break(
        "s2ft: keys and values stay behind when heads are reordered",
        "paca/permutation.py",
        "rows = order if number == 0 or not block.heads else _key_rows(order, block)",
        "rows = order if number == 0 or not block.heads else _key_rows(order, block).sort().values",
        "tests/family/test_structured_selection.py::test_a_reordered_model_computes_the_same",
    ),
    Break(
        "s2ft: column numbers of the reordered weight are saved",
        "paca/model.py",
        "state[key] = layer.order.to(state[key].device)[state[key]]",
        "pass",
        "tests/family/test_structured_selection.py::test_a_co_permuted_adapter_trains_and_saves_what_an_unpermuted_one_does",
    ),
    Break(
        "prefixes and groups: momentum moves columns that rest",
        "paca/schedule.py",
        "                    tensor.data.index_copy_(1, rest, values[number])",
        "                    pass",
        "tests/family/test_schedules.py",
    ),
    Break(
        "prefixes and groups: momentum made in the first step moves columns that rest",
        "paca/schedule.py",
        "                    tensor.data.index_fill_(1, rest, 0)",
        "                    pass",
        "tests/family/test_schedules.py::test_what_an_optimizer_makes_in_its_first_step_is_clean_where_columns_rest",
    ),
    Break(
        "s2ft: heads that have parameters of their own are reordered without them",
        "paca/permutation.py",
        '            return f"{name} {tuple(parameter.shape)} may belong to its heads or channels one by one"',
        "            pass",
        "tests/family/test_structured_selection.py::test_heads_and_channels_with_parameters_of_their_own_stay_where_they_are",
    ),
    Break(
        "reselect: new columns keep the optimizer state of old ones",
        "paca/schedule.py",
        "                columns[:, fresh.to(tensor.device)] = 0\n",
        "                columns[:, fresh.to(tensor.device)] *= tensor is not delta\n",
        "tests/family/test_schedules.py::test_new_columns_start_clean_and_old_ones_go_back",
    ),
    Break(
        "schedules: a resumed run starts them again",
        "paca/schedule.py",
        "        schedule.step = step",
        "        pass",
        "tests/family/test_schedules.py::test_a_resumed_run_trains_what_an_uninterrupted_one_does",
    ),
    Break(
        "rule 9, gradients match: a shared input's second product replaces the first",
        "paca/strategies.py",
        "total.addmm_(_tokens(gy), weight)",
        "total.addmm_(_tokens(gy), weight, beta=0)",
        "tests/device/cuda/test_shared_input.py::test_outputs_and_gradients_are_those_of_layers_that_run_alone",
    ),
    Break(
        "rule 3, never stale: an output computed before a change is handed out",
        "paca/shared_input.py",
        "return y if key == layer.adapted.held.key else None",
        "return y",
        "tests/device/cuda/test_shared_input.py::test_columns_that_change_before_an_output_is_collected_are_seen",
    ),
    Break(
        "graphs: a write shares its graph with the optimizer",
        "paca/freshness.py",
        "        ops.end_graph()\n        ops.write_columns(",
        "        ops.write_columns(",
        "tests/device/hpu/test_hpu_strategies.py::test_the_graph_ends_before_and_after_the_columns_of_a_step_are_written",
    ),
    Break(
        "graphs: a value that is read back goes unseen",
        "paca/graphs.py",
        "        if name in READS_BACK:",
        "        if False:",
        "tests/device/hpu/test_hpu_graphs.py::test_a_planted_item_is_found_with_its_line",
    ),
    Break(
        "graphs: shapes are no part of a graph's key",
        "paca/graphs.py",
        "return number, tuple(value.shape), value.stride(), value.storage_offset(), value.dtype",
        "return number, (), (), 0, value.dtype",
        "tests/device/hpu/test_hpu_graphs.py::test_a_ragged_last_batch_is_a_recompilation_with_the_line_and_the_shapes",
    ),
    Break(
        "recorder: a copy to the host is seen only where it is an operation",
        "paca/graphs.py",
        "if func in _TO_HOST or (",
        "if (",
        "tests/device/hpu/test_hpu_graphs.py::test_a_planted_copy_to_the_host_is_found_where_the_cpu_runs_no_operation_for_it",
    ),
    Break(
        "recorder: a copy that names its target goes unseen",
        "paca/graphs.py",
        '"cpu" in (*args[1:2],',
        '"CPU" in (*args[1:2],',
        "tests/device/hpu/test_hpu_graphs.py::test_a_planted_copy_to_the_host_is_found_where_the_cpu_runs_no_operation_for_it",
    ),
    Break(
        "doctor: what torch.compile skipped while operations were recorded stays skipped",
        "paca/doctor.py",
        "    torch._dynamo.reset()",
        "    pass",
        "tests/device/hpu/test_hpu_graphs.py::test_the_doctor_counts_what_torch_compile_makes_in_a_run_of_its_own[False]",
    ),
    Break(
        "mode: the bridge's word is taken, which reads the variable again",
        "backends/paca_hpu/bridge.py",
        "return not loaded[1]",
        "pass",
        "tests/device/hpu/test_hpu_mode.py::test_what_the_bridge_has_loaded_counts_not_what_the_variable_says_since",
    ),
    Break(
        "graphs: a swap's writes become part of what runs before them",
        "paca/bank.py",
        "        self._ops.end_graph()  # else",
        "        # else",
        f"{BANK}::test_the_writes_of_a_swap_are_a_graph_of_their_own",
    ),
    Break(
        "graphs: a write that is due becomes part of a recorded HPU graph",
        "backends/paca_hpu/writes.py",
        "if callable(write):",
        "if False:",
        "tests/device/hpu/test_hpu_mode.py::test_columns_are_written_before_a_model_is_recorded",
    ),
    Break(
        "checkpoints: the random state of another device stays behind unsaid",
        "paca/checkpoint.py",
        'return set(states) - {"python", "numpy", "cpu"}',
        "return set()",
        "tests/training/test_checkpoint.py::test_the_devices_whose_random_state_was_saved_are_named",
    ),
    Break(
        "float8: evaluation multiplies in float8, too",
        "paca/columns.py",
        'if training and self.residency == "resident" and',
        'if self.residency == "resident" and',
        "tests/device/cuda/test_float8.py",
    ),
    Break(
        "CUDA graphs: a capture uses accumulators that an earlier loss keeps alive",
        "backends/paca_cuda/graphs.py",
        "parameter.detach().requires_grad_() for parameter in trained}",
        "parameter for parameter in trained}",
        "tests/device/cuda/test_cuda_graphs.py",
    ),
    Break(
        "CUDA graphs: a graph without the gradients of recomputed blocks is used",
        "backends/paca_cuda/graphs.py",
        "if grad is None and id(source) in self._reached]:",
        "if False]:",
        "tests/device/cuda/test_cuda_graphs.py",
    ),
    Break(
        "CUDA graphs: a capture launches a kernel that is not loaded",
        "backends/paca_cuda/ops.py",
        "        return tiling if loaded else None\n",
        "        return tiling\n",
        "tests/device/cuda/test_grad_columns_kernel.py",
    ),
    Break(
        "bench: a model that runs eagerly is measured as a graph",
        "paca/bench/contestant.py",
        'if (why := getattr(self.run, "why_eager", None)) is not None:',
        'if (why := getattr(self.run, "why_eager", None)) == "":',
        "tests/bench/test_gpu_suite.py",
    ),
    Break(
        "float8: a trained column's part of dX is not exact",
        "backends/paca_cuda/float8.py",
        "        gx.index_copy_(1, self.index, rows @ self._columns(weight, gy.dtype))\n",
        "        gx.index_add_(1, self.index, rows @ self._columns(weight, gy.dtype) * 1.01)\n",
        "tests/device/cuda/test_float8.py",
    ),
    Break(
        "float8: a recomputed forward is another one",
        "paca/layer.py",
        "                if ops is not adapted.ops:  # a forward that is recomputed",
        "                if False:  # a forward that is recomputed",
        "tests/device/cuda/test_float8.py",
    ),
    Break(
        "rule 9, gradients match: a mask's entries are read off by column, not by row",
        "paca/masked.py",
        "return own[index // self.shape[1], index % self.shape[1]].unsqueeze(0)",
        "return own[index % self.shape[0], index // self.shape[0]].unsqueeze(0)",
        "tests/family/test_masks.py::test_the_gradient_is_that_of_the_whole_weight_at_the_masks_entries",
    ),
    Break(
        "masks: a weight as one row is a copy",
        "paca/masked.py",
        "return weight.view(1, -1)",
        "return weight.clone().view(1, -1)",
        "tests/family/test_masks.py::test_a_step_moves_the_masks_entries_and_no_others",
    ),
    Break(
        "masks: the smallest of the drawn entries are preferred",
        "paca/entries.py",
        "picked = drawn[first.sort().values][:count]",
        "picked = numbers[:count]",
        "tests/family/test_masks.py::test_random_entries_depend_on_seed_and_name_alone_and_all_are_equally_likely",
    ),
    Break(
        "schedules: an epoch's end goes unseen",
        "paca/schedule.py",
        "            schedule.every = steps\n",
        "            schedule.every = steps + 1\n",
        "tests/family/test_schedules.py::test_columns_are_chosen_anew_at_the_end_of_each_epoch",
    ),
    Break(
        "compile: each layer's columns are part of its graph",
        "paca/layer.py",
        "        if columns.slices is not None:\n",
        "        if len(columns.runs) < 1 or columns.slices is not None:\n",
        "tests/graph/test_compile.py::test_decoder_blocks_compile_whole_and_once_and_train_as_eager_does[resident]",
    ),
    Break(
        "plan: a run that was stopped counts as done",
        "paca/bench/plan.py",
        "    unfinished = out.parent / UNFINISHED / out.name\n",
        "    unfinished = out\n    unfinished.parent.mkdir(parents=True, exist_ok=True)\n    out.touch()\n",
        "tests/bench/test_gpu_suite.py::test_a_run_that_does_not_end_in_time_is_stopped_and_is_to_be_done_again",
    ),
    Break(
        "files: a file is written in place",
        "paca/whole.py",
        'path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")',
        "path",
        "tests/core/test_whole_files.py",
    ),
    Break(
        "remembered adapters: another strength goes unseen",
        "paca/remembered.py",
        "if scaling.get(name) != adapter.scale:",
        "if scaling.get(name) is None:",
        REMEMBERED,
    ),
    Break(
        "remembered adapters: another delta goes unseen",
        "paca/remembered.py",
        "deltas.get(name) is not adapter.delta or",
        "",
        REMEMBERED,
    ),
    Break(
        "remembered adapters: other active ones go unseen",
        "paca/remembered.py",
        "if active != self._active and [active] != self._active:",
        "if not active:",
        REMEMBERED,
    ),
    Break(
        "benchmark: what a method kept for its backward stays on the device",
        "paca/bench/kept.py",
        "        return tensor.detach()\n",
        "        return tensor\n",
        "tests/bench/test_kept_bytes.py",
    ),
    Break(
        "graphs: each replay zeroes the counters of each launch",
        "backends/paca_cuda/ops.py",
        "for stream, counters in _captured[-1:]:",
        "for stream, counters in _captured[:0]:",
        "tests/device/cuda/test_grad_columns_kernel.py",
    ),
    Break(
        "recomputation: the last product of a block is made again for nothing",
        "paca/keeping.py",
        "hooks = None if torch.compiler.is_compiling() else _hooks(False)",
        "hooks = None",
        "tests/device/cuda/test_launches.py",
    ),
    Break(
        "recomputation: what is kept brings the graph along that it came from",
        "paca/keeping.py",
        "t.detach() if t.requires_grad else t",
        "t",
        "tests/core/test_keeping.py",
    ),
    Break(
        "recomputation: a quantised layer's columns are multiplied again for nothing",
        "paca/quantised.py",
        "        keep(ctx, xs if ctx.needs_input_grad[2] else None, delta, index)",
        "        ctx.unpack = ctx.save_for_backward(xs if ctx.needs_input_grad[2] else None, delta, index)",
        "tests/core/test_keeping.py",
    ),
    Break(
        "largest change: layers that read the same input are ranked alone",
        "paca/largest_change.py",
        "config.share_columns and",
        "False and",
        "tests/family/test_schedules.py::test_the_largest_changes_of_a_warm_up_are_trained",
    ),
    Break(
        "device cuda: a model that stays on the CPU is given to kernels",
        "backends/paca_cuda/ops.py",
        "        if _takes_kernels(weights[members[0]]):",
        "        if True:",
        "tests/device/cuda/test_cuda_backend.py",
    ),
]


def notices(planted: Break) -> bool:
    """Plant one defect in a copy of the project and run its tests; True if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        left_out = shutil.ignore_patterns(".git", ".venv", ".*cache", "runs", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=left_out)
        file = copy / planted.file
        source = file.read_text()
        if source.count(planted.old) != 1:
            raise SystemExit(f"{planted.rule}: the code to break occurs {source.count(planted.old)}x in {planted.file}")
        file.write_text(source.replace(planted.old, planted.new))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{copy}:{copy / 'backends'}"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", planted.tests]
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if run.returncode not in (0, 1):
            raise SystemExit(f"{planted.rule}: pytest could not run\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 1


def unfit() -> list[str]:
    """Name the defects that the code has outgrown: what they replace must occur exactly once."""
    return [b.rule for b in BREAKS if (ROOT / b.file).read_text().count(b.old) != 1]


def main() -> int:
    """Plant every chosen defect in turn."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    unnoticed = 0
    for planted in [b for b in BREAKS if wanted in b.rule]:
        caught = notices(planted)
        unnoticed += not caught
        print(f"{'noticed  ' if caught else 'UNNOTICED'}  {planted.rule}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    raise SystemExit(main())
