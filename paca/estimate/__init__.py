"""How much memory training takes, told from a model's configuration alone, before anything is downloaded or allocated.

A training step is run on shapes (`step`) with layers that use memory as the real ones do (`layers`), and its storages
are followed from their making to their end (`meter`). `paca train --dry-run` and `paca estimate` both print that;
`check` compares the prediction with measured peaks.
"""
