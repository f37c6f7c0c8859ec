"""Proves that devices compute the same, and carries the proof between machines; see docs/parity.md.

exact, certificate   numbers whose sums no device can round, and the proof
truth, bounds        what must come out, and how far rounding may take it
layouts, cases, block, trajectory
                     what is compared: layers, a block, a model in training
coverage, operations, training_step, judge, verify
                     every backend here, in every way it can run, against a record
record, recording    the record
"""
