"""Holds a packaged model repository against a real server: what its config.pbtxt promises is what requests get.

    pip download --no-deps nvidia-pytriton==0.7.0 && unzip -d FOLDER nvidia_pytriton-*.whl
    python -m tools.prove.triton_server ARTIFACT --server FOLDER/pytriton/tritonserver

The server in that wheel has the Python backend alone. So the copy of the repository that it serves has that backend in
the place of ONNX Runtime's, with a model.py that opens the packaged model.onnx; names, types, dims, reshapes, batches
and the warm-up are those of the packaged config.pbtxt, and the server's own code reads and checks them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import diffc
from diffc.artifact.folder import Artifact
from diffc.commands.package.request import PackageRequest
from diffc.commands.package.run import package
from diffc.models.registry import family_of_manifest
from diffc.models.spec import Shape

Arrays = Mapping[str, npt.NDArray[Any]]
PORT = 18001
MODEL = '''
import os
from site import addsitedir
addsitedir({site!r})
import numpy as np
import onnxruntime as ort
import torch
import triton_python_backend_utils as pb

def array(tensor):
    """By DLPack, as results: this backend has the sizes of numpy 1's arrays."""
    return torch.from_dlpack(tensor.to_dlpack()).numpy()

class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = ort.InferenceSession(os.path.join(folder, "model.onnx"), providers=["CPUExecutionProvider"])
        self.names = [(v.name, v.shape) for v in self.session.get_inputs()]

    def execute(self, requests):
        """As ONNX Runtime's backend does it: the requests of one call are one batch, a scalar is a tensor of one."""
        feeds = [{{n: array(pb.get_input_tensor_by_name(r, n)) for n, _ in self.names}} for r in requests]
        joined = {{n: np.concatenate([f[n] for f in feeds]) if s else feeds[0][n].reshape(()) for n, s in self.names}}
        (output,) = self.session.run(None, joined)
        name, sizes = self.session.get_outputs()[0].name, [len(f[self.names[0][0]]) for f in feeds]
        parts = np.split(output, np.cumsum(sizes)[:-1])
        return [pb.InferenceResponse([pb.Tensor.from_dlpack(name, torch.from_numpy(part.copy()))]) for part in parts]
'''


def with_python_backend(repository: Path) -> str:
    """Put model.py in the place of ONNX Runtime's backend, and return the model's name."""
    (file,) = repository.glob("*/config.pbtxt")
    text = file.read_text(encoding="utf-8")
    for line in ("platform", "default_model_filename"):
        text = re.sub(rf"^{line}: .*\n", "", text, flags=re.MULTILINE)
    text = re.sub('^backend: "onnxruntime"', 'backend: "python"', text, flags=re.MULTILINE)
    file.write_text(text, encoding="utf-8")
    (file.parent / "1" / "model.py").write_text(
        MODEL.format(site=str(Path(np.__file__).parents[1])), encoding="utf-8"
    )
    return file.parent.name


@contextmanager
def serving(server: Path, repository: Path) -> Iterator[Any]:
    """A client of the server, once it is ready. Raises RuntimeError with its log when it does not come up."""
    from tritonclient.grpc import InferenceServerClient

    program = server / "bin" / "tritonserver"
    program.chmod(0o755)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    stub.chmod(0o755)
    target = server / "backends" / "python" / stub.name
    target.write_bytes(stub.read_bytes())
    target.chmod(0o755)
    base = Path(sys.base_prefix)
    libraries = ":".join(str(p) for p in (base / "lib", *server.parents[1].glob("nvidia_pytriton.libs")))
    environment = os.environ | {"LD_LIBRARY_PATH": libraries}
    command = [str(program), f"--model-repository={repository}", f"--backend-directory={server / 'backends'}"]
    command += [f"--grpc-port={PORT}", "--allow-http=0", "--allow-metrics=0", "--exit-timeout-secs=5"]
    log = repository.with_suffix(".log")
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process,
    ):
        try:
            client = InferenceServerClient(f"localhost:{PORT}")
            for _ in range(240):
                if process.poll() is not None:
                    lines = log.read_text(encoding="utf-8").splitlines()
                    raise RuntimeError("\n".join(line for line in lines if line.startswith("E")))
                try:
                    if client.is_server_ready():
                        break
                except Exception:  # not up yet: grpc's own errors
                    pass
                time.sleep(0.5)
            yield client
        finally:
            process.terminate()


def drawn(artifact: Artifact, batch: int, seed: int) -> Arrays:
    """Inputs of the graph at the profile's smallest picture."""
    manifest = artifact.manifest
    family, config = family_of_manifest(manifest["model"]), manifest["model"]["config"]
    least = Shape(**{**manifest["profile"]["minimum"], "batch": batch})
    rng, types = np.random.default_rng(seed), {"FLOAT": np.float32, "FLOAT16": np.float16, "INT64": np.int64}
    shapes = family.input_shapes(config, least)
    return {
        v["name"]: rng.uniform(0, 1, shapes[v["name"]]).astype(types[v["dtype"]]) for v in manifest["inputs"]
    }


def asked(client: Any, model: str, config: Any, feed: Arrays) -> npt.NDArray[Any]:
    """The server's answer. Shapes are those of the configuration: [batch, 1] for a time, [1] for a scalar."""
    from tritonclient.grpc import InferInput

    inputs = []
    for item in config.input:
        array = feed[item.name]
        array = array.reshape(
            array.shape + (1,) * (len(item.dims) + (config.max_batch_size > 0) - array.ndim)
        )
        kind = {"float32": "FP32", "float16": "FP16", "int64": "INT64"}[str(array.dtype)]
        inputs.append(InferInput(item.name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    found: npt.NDArray[Any] = client.infer(model, inputs).as_numpy(config.output[0].name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every answer is that of the artifact's own session."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--server", type=Path, required=True, help="the folder pytriton/tritonserver of the wheel"
    )
    given = parser.parse_args(argv)
    artifact = Artifact.load(given.artifact.absolute())
    with tempfile.TemporaryDirectory() as place:
        repository = Path(place) / "repository"
        package(PackageRequest(artifact.folder, repository, "triton", target="ort"))
        model = with_python_backend(repository)
        with (
            serving(given.server.absolute(), repository) as client,
            diffc.session(artifact.folder) as session,
        ):
            version = client.get_server_metadata().version
            config = client.get_model_config(model).config
            feeds = [drawn(artifact, 1 + n % 2, n) for n in range(8)]
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda feed: asked(client, model, config, feed), feeds))
            wanted = [session.run(feed)[config.output[0].name] for feed in feeds]
            (statistics,) = client.get_inference_statistics(model).model_stats
    worst = max(float(np.abs(a - w).max() / np.abs(w).max()) for a, w in zip(answers, wanted, strict=True))
    print(f"server {version}, max_batch_size {config.max_batch_size}: {len(feeds)} requests,", end=" ")
    print(
        f"{statistics.inference_count} images in {statistics.execution_count} calls, largest error {worst:.1e}"
    )
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
