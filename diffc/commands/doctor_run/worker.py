"""The process that runs one case: native code may end it, and its notes tell how far it came.

    python -m diffc.commands.doctor_run.worker REQUEST.json

REQUEST.json names the artifact, the case, the file of inputs (.npz), and where to write outputs (.npz) and notes. Notes
are one JSON object a line; the last one is {"done": true}, or has "error" or "not_run".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffc.artifact.folder import Artifact
from diffc.backends.signature import Signature
from diffc.backends.target import RUNTIMES
from diffc.backends.torch_types import TORCH_TYPES
from diffc.commands.doctor_run.cases import part
from diffc.errors import DiffcError
from diffc.models.sizes import size_of
from diffc.runtime.load import open_model, signature_of, why_not

Arrays = Mapping[str, npt.NDArray[Any]]
Note = Callable[..., None]


def main() -> int:
    """Serve one request; 0 also when what went wrong is in the notes."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(request["notes"]).open("w", encoding="utf-8", newline="\n") as file:

        def note(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

        try:
            run(request, note)
        except DiffcError as error:
            note(error=str(error))
        except Exception as error:  # whatever a library raises belongs into the report
            note(error=f"{type(error).__name__}: {error}")
            raise
    return 0


def run(request: Mapping[str, Any], note: Note) -> None:
    """Open the case, run every sample once and then `repeat` times, and write the outputs of the first runs."""
    artifact, target = Artifact.load(Path(request["artifact"])), RUNTIMES[request["target"]]
    model = part(artifact, request["number"])
    device = torch.device("cpu") if target.on_cpu else torch.device("cuda", request["gpu"])
    note(doing="ask whether the target runs here")
    reason, fix = why_not(model, target, device)
    if reason:
        note(not_run=f"{reason} ({fix})" if fix else reason)
        return
    signature = signature_of(artifact, target, model=model)
    note(doing="load", torch=torch.__version__, cuda=torch.version.cuda)
    started = time.perf_counter()
    session = open_model(model, target, device, signature)
    note(loaded=time.perf_counter() - started)
    outputs: dict[str, npt.NDArray[Any]] = {}
    with np.load(request["inputs"]) as held:
        for index in range(request["samples"]):
            values = {v.name: held[f"{index}/{v.name}"] for v in signature.inputs}
            found = _measured(session, signature, values, device, request["repeat"], index, note)
            outputs |= {f"{index}/{name}": array for name, array in found.items()}
    np.savez(request["outputs"], **outputs)  # type: ignore[arg-type]  # its stub has no arrays by name
    note(doing="close")
    session.close()
    note(done=True)


def _measured(
    session: Any,
    signature: Signature,
    values: Arrays,
    device: torch.device,
    repeat: int,
    index: int,
    note: Note,
) -> dict[str, npt.NDArray[Any]]:
    """The outputs of the first run in float32; its seconds, and the median of the others, are noted."""
    inputs = {
        v.name: torch.from_numpy(np.asarray(values[v.name])).to(device, TORCH_TYPES[v.dtype]).contiguous()
        for v in signature.inputs
    }
    sizes = signature.check({name: tuple(tensor.shape) for name, tensor in inputs.items()})
    shapes = {v.name: tuple(size_of(d, sizes) for d in v.dims) for v in signature.outputs}

    def once() -> tuple[float, Mapping[str, torch.Tensor]]:
        started = time.perf_counter()
        found = session.run(inputs, shapes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, found

    note(doing=f"run sample {index} for the first time")
    first, found = once()
    outputs = {name: tensor.float().cpu().numpy() for name, tensor in found.items()}
    note(doing=f"run sample {index} again")
    note(sample=index, first=first, median=median(once()[0] for _ in range(repeat)) if repeat else None)
    return outputs


if __name__ == "__main__":
    sys.exit(main())
