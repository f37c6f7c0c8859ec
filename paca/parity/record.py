"""What travels between machines: inputs, the results one machine computed, and what machine that was.

A folder with two files. `parity.json` holds the schema's version, where the record was made, the settings of each case
and the tolerances of each trajectory; `parity.safetensors` holds the tensors, `<case>/inputs/<name>` and
`<case>/expected/<name>`. docs/parity.md describes the schema.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from paca.backend import Backend
from paca.parity.cases import Case
from paca.parity.formats import dtype_named, name_of
from paca.parity.layouts import Bias, Storage
from paca.parity.trajectory import Tolerance, Trajectory
from paca.parity.well_formed import what_is_wrong
from paca.versions import versions
from paca.whole import replacing, write_text

SCHEMA = 2
REFERENCE = Path(__file__).parent / "reference"
_DOCUMENT, _TENSORS = "parity.json", "parity.safetensors"
_PACKAGES = ("transformers", "peft", "triton", "optimum-habana", "habana-torch-plugin")


class RecordError(ValueError):
    """A record that cannot be read; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Record:
    """Everything that is compared.

    Attributes:
        made_by: the machine and software, by name; see `environment`.
        cases: single layers.
        block: weights and inputs of the exact block, the same for all dtypes.
        block_expected: what training it gives, float32.
        block_dtypes: in which it was proved exact.
        model: weights and tokens of the tiny model.
        trajectories: its runs by dtype.
        tolerances: how far from them a run may be, by dtype.
    """

    made_by: Mapping[str, str]
    cases: tuple[Case, ...]
    block: Mapping[str, Tensor]
    block_expected: Mapping[str, Tensor]
    block_dtypes: tuple[torch.dtype, ...]
    model: Mapping[str, Tensor]
    trajectories: Mapping[torch.dtype, Trajectory]
    tolerances: Mapping[torch.dtype, Tolerance]


def environment(backend: Backend) -> dict[str, str]:
    """Describe machine and software, without the name or a path of either."""
    found = versions(*_PACKAGES) | {"python": platform.python_version(), "system": platform.system()}
    strategies = ", ".join(f"{kind}={choice}" for kind, choice in backend.strategies.items())
    return found | {"backend": backend.name, "device": backend.describe(), "strategies": strategies}


def write(record: Record, folder: Path) -> None:
    """Write a record; the document comes last, so that a folder with one is complete.

    Raises:
        FileExistsError: if the folder holds a record already: records are evidence and are not overwritten.
    """
    if (folder / _DOCUMENT).exists():
        raise FileExistsError(f"{folder} holds a record already; choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _prefixed("block/inputs", record.block) | _prefixed("block/expected", record.block_expected)
    tensors |= _prefixed("model", record.model)
    for case in record.cases:
        tensors |= _prefixed(f"{case.name}/inputs", case.inputs) | _prefixed(f"{case.name}/expected", case.expected)
    for dtype, trajectory in record.trajectories.items():
        tensors |= _prefixed(f"trajectory/{name_of(dtype)}/deltas", trajectory.deltas)
    with replacing(folder / _TENSORS) as unfinished:
        unfinished.write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
    document = {
        "schema": SCHEMA,
        "made_by": dict(record.made_by),
        "sha256_of_tensors": _digest((folder / _TENSORS).read_bytes()),
        "cases": [
            {
                "name": case.name,
                "tier": case.tier,
                "dtype": name_of(case.dtype),
                "lead": list(case.lead),
                "alpha": case.alpha,
                "storage": case.storage.value,
                "bias": case.bias.value,
            }
            for case in record.cases
        ],
        "block_dtypes": [name_of(dtype) for dtype in record.block_dtypes],
        "trajectories": {
            name_of(dtype): {
                "losses": list(trajectory.losses),
                "tolerance_of_losses": list(record.tolerances[dtype].losses),
                "tolerance_of_deltas": record.tolerances[dtype].deltas,
            }
            for dtype, trajectory in record.trajectories.items()
        },
    }
    document["sha256_of_document"] = _document_digest(document)
    write_text(folder / _DOCUMENT, json.dumps(document, indent=1))


def read(folder: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: if it is missing, damaged, of another schema, or holds what cannot be compared.
    """
    document = _document(folder)
    if not (folder / _TENSORS).exists():
        raise RecordError(f"{folder} holds a {_DOCUMENT} but no {_TENSORS}; copy both again")
    try:
        if _digest((folder / _TENSORS).read_bytes()) != document["sha256_of_tensors"]:
            raise RecordError(f"{folder / _TENSORS} is not the file that {_DOCUMENT} was written with; copy both again")
        with safe_open(folder / _TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        record = _assembled(document, tensors)
        wrong = what_is_wrong(record)
    except RecordError:
        raise
    except (SafetensorError, AttributeError, OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{folder} is damaged: {error!r}; copy it again") from error
    if wrong:
        raise RecordError(f"{folder} cannot be compared with: {wrong}; record anew")
    return record


def _document(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise RecordError(f"{folder} is a file; name the folder that holds {_DOCUMENT} and {_TENSORS}")
    try:
        document = json.loads((folder / _DOCUMENT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{folder} holds no {_DOCUMENT}; `paca parity record --out DIR` makes a record") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{folder / _DOCUMENT} cannot be read: {error}; copy it again") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise RecordError(
            f"{folder} is a record of schema {schema}, this paca reads schema {SCHEMA}; record anew, or use the paca "
            "that made it"
        )
    if _document_digest(document) != document.get("sha256_of_document"):
        raise RecordError(f"{folder / _DOCUMENT} is not as it was written (its own checksum differs); copy it again")
    found: dict[str, Any] = document
    return found


def _assembled(document: dict[str, Any], tensors: dict[str, Tensor]) -> Record:
    cases = tuple(
        Case(
            stored["name"],
            stored["tier"],
            dtype_named(stored["dtype"]),
            tuple(stored["lead"]),
            stored["alpha"],
            Storage(stored["storage"]),
            Bias(stored["bias"]),
            _under(tensors, f"{stored['name']}/inputs"),
            _under(tensors, f"{stored['name']}/expected"),
        )
        for stored in document["cases"]
    )
    runs = {dtype_named(name): stored for name, stored in document["trajectories"].items()}
    return Record(
        made_by=document["made_by"],
        cases=cases,
        block=_under(tensors, "block/inputs"),
        block_expected=_under(tensors, "block/expected"),
        block_dtypes=tuple(dtype_named(name) for name in document["block_dtypes"]),
        model=_under(tensors, "model"),
        trajectories={
            dtype: Trajectory(tuple(run["losses"]), _under(tensors, f"trajectory/{name_of(dtype)}/deltas"))
            for dtype, run in runs.items()
        },
        tolerances={
            dtype: Tolerance(tuple(run["tolerance_of_losses"]), run["tolerance_of_deltas"])
            for dtype, run in runs.items()
        },
    )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, at least one."""
    found = {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
    if not found:
        raise KeyError(prefix)
    return found


def _document_digest(document: Mapping[str, Any]) -> str:
    """Digest all of a document but the digest itself."""
    content = {key: value for key, value in document.items() if key != "sha256_of_document"}
    return _digest(json.dumps(content, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
