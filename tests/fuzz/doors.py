"""The doors that files of strangers come through: a valid file for each, the lies about it, and what opens it.

`use` opens a file as commands do and goes on as far as nothing heavy runs, so that what was let in wrongly stumbles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from diffc.artifact.folder import Artifact
from diffc.backends.signature import Signature
from diffc.cache.plan import CachePlan
from diffc.errors import DiffcError, MismatchError
from diffc.frontend.first_look import first_look
from diffc.frontend.onnx_file import read_model
from diffc.models.embedded import tiny
from diffc.models.profiles import ShapeProfile, default_profile, parse_profile
from diffc.models.registry import FAMILIES, family_of_manifest
from diffc.models.single.files import read_file
from diffc.models.sources.components import pipeline_variant
from diffc.models.sources.locate import locate
from diffc.models.sources.lora_files import parse_lora
from diffc.models.sources.safetensors_files import file_weights
from diffc.quantize.checkpoint import Checkpoint
from passes import Pipeline
from passes.base import PassCheckError, PassError
from passes.storage import load, save
from passes.weights.evaluate import evaluate
from passes.weights.lora.fuse import apply_files
from passes.weights.lora.match import Strength
from passes.weights.torch_files import torch_tensors
from tests import DATA
from tests.fuzz.lies import ODD, damaged, json_file, onnx_file, safetensors_file
from tests.models.single.test_gguf import q4_0
from tests.models.single.test_gguf import write as write_gguf
from tests.models.sources.folders import backbone, config_of
from tests.passes.weights.lora.files import FLUX, factors, written

Use = Callable[[Path], Any]


@dataclass(frozen=True)
class Door:
    """`make` writes what is valid into a folder and says what lies about it: strategies of (file name, bytes).

    `use` opens the folder. `apart`: it starts a process for each, which costs 30 ms.
    """

    name: str
    make: Callable[[Path], st.SearchStrategy[tuple[str, bytes]]]
    use: Use
    apart: bool = False


def files(name: str, contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Lies about the file of that name."""
    return contents.map(lambda data: (name, data))


def network() -> onnx.ModelProto:
    """A small graph with weights inside it, a quantizer, a Constant, an If and Einsum."""
    rng = np.random.default_rng(1)
    info = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "W"),
        numpy_helper.from_array(np.float32(0.1), "s"),
        numpy_helper.from_array(np.int8(0), "z"),
        numpy_helper.from_array(np.array([0, -1]), "shape"),
        numpy_helper.from_array(np.array(True), "c"),
    ]
    branch = helper.make_graph([helper.make_node("Neg", ["r"], ["b"], "neg")], "b", [], [info("b", 1, None)])
    other = helper.make_graph([helper.make_node("Abs", ["r"], ["d"], "abs")], "d", [], [info("d", 1, None)])
    nodes = [
        helper.make_node("QuantizeLinear", ["W", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], "dequantize"),
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Einsum", ["p", "W"], ["e"], "einsum", equation="bi,ij->bj"),
        helper.make_node("Constant", [], ["k"], "constant", value=helper.make_tensor("k", 1, [1], [2.0])),
        helper.make_node("Add", ["e", "k"], ["a"], "add"),
        helper.make_node("Reshape", ["a", "shape"], ["r"], "reshape"),
        helper.make_node("If", ["c"], ["y"], "if", then_branch=branch, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["n", 8])], [info("y", 1, ["n", 8])], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _onnx(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    (folder / "m.onnx").write_bytes(network().SerializeToString())
    return files("m.onnx", onnx_file(network()))


def _external(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    model = network()
    model.graph.initializer[0].ClearField("raw_data")
    (folder / "w.bin").write_bytes(np.arange(64, dtype=np.float32).tobytes())
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "256")):
        model.graph.initializer[0].external_data.add(key=key, value=value)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return files("m.onnx", onnx_file(model))


def _use_storage(folder: Path) -> None:
    save(load(folder / "m.onnx"), folder / "o.onnx")


def _use_import(folder: Path) -> None:
    read_model(folder / "m.onnx")


def _use_passes(folder: Path) -> None:
    model = load(folder / "m.onnx")
    first_look(model, "m.onnx")
    Pipeline.parse("fold-constants,remove-unused,fold-weight-qdq").run(model)


def _safetensors(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    rng = np.random.default_rng(2)
    arrays = {"a.weight": rng.normal(size=(4, 6)).astype(np.float16), "b": np.arange(8, dtype=np.int64)}
    save_file(arrays, folder / "w.safetensors", {"format": "pt"})
    return files("w.safetensors", safetensors_file((folder / "w.safetensors").read_bytes()))


def _use_safetensors(folder: Path) -> None:
    for recipe in file_weights(folder / "w.safetensors").values():
        array = evaluate(recipe)
        assert array.dtype.kind != "f" or (array.astype(np.float64) < np.inf).all()  # NaN is not, either


def _lora(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    layer = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = factors(layer, 8, 8) | {f"{layer}.alpha": np.array(2.0, np.float32)}
    settings = {"r": 3, "lora_alpha": 6, "use_rslora": False, "alpha_pattern": {"to_q": 8}}
    written(folder / "l.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    return files("l.safetensors", safetensors_file((folder / "l.safetensors").read_bytes()))


def _use_lora(folder: Path) -> None:
    for applied in apply_files([(folder / "l.safetensors", Strength(0.7))], FLUX, partial=True):
        assert all(np.isfinite(change.scale) for change in applied.matched.changes)


def _peft(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    made = np.random.default_rng(3).normal(size=(3, 8)).astype(np.float32)
    layer = "base_model.model.transformer_blocks.0.attn.to_q"
    written(
        folder / "adapter_model.safetensors",
        {f"{layer}.lora_A.weight": made, f"{layer}.lora_B.weight": made.T},
    )
    settings = {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {"to_[qk]": 8},
        "rank_pattern": {},
    }
    return files("adapter_config.json", json_file(settings))


def _use_peft(folder: Path) -> None:
    apply_files([(folder, Strength(1.0))], FLUX, partial=True)


def _gguf(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    values = np.random.default_rng(4).normal(size=(2, 64)).astype(np.float32)
    tensors = {"a": ("F32", (2, 64), values.tobytes()), "b": ("Q4_0", (2, 64), q4_0(values))}
    return files("m.gguf", damaged(write_gguf(folder / "m.gguf", tensors).read_bytes()))


def _use_gguf(folder: Path) -> None:
    for recipe in read_file(folder / "m.gguf").tensors.values():
        evaluate(recipe)


def _torch(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    torch.save({"state_dict": {"a": torch.ones(3, 4), "b": [torch.arange(6)]}, "n": 7}, folder / "m.ckpt")
    return files("m.ckpt", damaged((folder / "m.ckpt").read_bytes()))


def _use_torch(folder: Path) -> None:
    for recipe in torch_tensors(folder / "m.ckpt").values():
        evaluate(recipe)


_CONFIG = config_of("SD3Transformer2DModel", tiny.SD3)
_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}


def _model(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    backbone(folder / "transformer", _CONFIG)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "sample_size": 128}')
    (folder / "model_index.json").write_text(json.dumps(_INDEX))
    weights = "diffusion_pytorch_model.safetensors"
    shards = {"metadata": {}, "weight_map": dict.fromkeys(("a.weight", "b.weight", "c.bias"), weights)}
    return st.one_of(
        files("transformer/config.json", json_file(_CONFIG)),
        files("model_index.json", json_file(_INDEX)),
        files(f"transformer/{weights}.index.json", json_file(shards)),
        files("vae/config.json", json_file({"sample_size": 128})),
    )


def _use_model(folder: Path) -> None:
    source = locate(str(folder))
    pipeline_variant(folder)
    default_profile(source.family, source.config)
    source.family.input_shapes(source.config, source.family.native(source.config))


def _manifest(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    stored = json.loads((DATA / "manifest-schema-1.json").read_text("utf-8"))
    for name, entry in stored["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(entry["bytes"])
    (folder / "manifest.json").write_text(json.dumps(stored))
    return files("manifest.json", json_file(stored))


def _use_manifest(folder: Path) -> None:
    artifact = Artifact.load(folder)
    Signature.of(artifact.manifest)
    family, config = family_of_manifest(artifact.manifest["model"]), artifact.manifest["model"]["config"]
    if isinstance(artifact.manifest["profile"], dict):
        profile = ShapeProfile.of_manifest(artifact.manifest["profile"])
        family.input_shapes(config, profile.minimum)
    for engine in artifact.engines:
        assert engine["file"] in artifact.manifest["files"]
    for target, name in artifact.manifest["targets"].items():
        assert target is not None
        assert artifact.present(name).resolve().is_relative_to(folder.resolve())


def _checkpoint(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    own = {
        "num_bits": 8,
        "axis": 0,
        "block_sizes": None,
        "type": "static",
        "unsigned": False,
        "narrow_range": True,
    }
    settings = {"a.weight_quantizer": own, "a.input_quantizer": own | {"axis": None}}
    amax = {
        "a.weight_quantizer": np.full((4, 1), 0.5, np.float32),
        "a.input_quantizer": np.array(2.0, np.float32),
    }
    Checkpoint("sd3", "int8", {"_class_name": "X"}, settings, amax, "source").save(folder / "c")
    record = json.loads((folder / "c" / "checkpoint.json").read_text("utf-8"))
    tensors = (folder / "c" / "quantizers.safetensors").read_bytes()
    return st.one_of(
        files("c/checkpoint.json", json_file(record)),
        files("c/quantizers.safetensors", safetensors_file(tensors)),
    )


def _use_checkpoint(folder: Path) -> None:
    found = Checkpoint.load(folder / "c")
    assert all((value > 0).all() and np.isfinite(value).all() for value in found.amax.values())
    assert found.digest


def _plan(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    entry = {
        "blocks": ["a.0-15"],
        "except": ["b"],
        "steps": {"every": 2, "start": 0.1, "stop": -1},
        "keep": "residual",
    }
    listed = {"blocks": "a.*", "steps": [1, 3, 5]}
    record = {
        "name": "mine",
        "entries": [entry, listed, {"blocks": ["c"], "steps": {"by_count": {"4": [1, 2]}}}],
    }
    (folder / "p.json").write_text(json.dumps(record))
    return st.one_of(files("p.json", json_file(record)), files("p.yaml", json_file(record)))


def _use_plan(folder: Path) -> None:
    for name in ("p.json", "p.yaml"):
        if (folder / name).is_file():
            plan = CachePlan.load(folder / name)
            for entry in plan.entries:
                if entry.steps.by_count is None:
                    [entry.steps.reuses(step, 8) for step in range(8)]


_WRITTEN = (
    "batch=1:2:4",
    "height=512",
    "remove-unused",
    "rewrite-opset{to=23}",
    "style.safetensors=0.8,*attn*=0.5",
)
_WORDS = st.one_of(
    st.sampled_from([str(value)[:300] for value in ODD]),
    st.sampled_from(_WRITTEN),
    st.sampled_from(_WRITTEN).flatmap(
        lambda text: damaged(text.encode()).map(lambda data: data.decode("latin-1"))
    ),
    st.text(max_size=20),
    st.text("=:,x0123456789-.{};*", max_size=24),
)


def _options(_: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    texts = st.lists(_WORDS, min_size=1, max_size=3).map(",".join)
    return files("option", texts.map(lambda text: text.encode("utf-8", "replace")))


def _use_options(folder: Path) -> None:
    text = (folder / "option").read_text("utf-8") if (folder / "option").is_file() else "remove-unused"
    sd3 = FAMILIES["sd3"]
    asked: tuple[Callable[[], Any], ...] = (
        lambda: Pipeline.parse(text),
        lambda: parse_lora(text),
        lambda: parse_profile(text, sd3, _CONFIG),
    )
    answers = [refused(call) for call in asked]
    if all(answers):
        raise DiffcError("nothing reads it")


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call refuses what it is given, as a user is told; every other error goes on."""
    try:
        call()
    except (DiffcError, PassError) as error:
        if isinstance(
            error, PassCheckError | MismatchError
        ):  # exit code 3: outputs differ. What came in is wrong
            raise
        return bool(str(error).strip())
    return False


DOORS = (
    Door("onnx: load and save", _onnx, _use_storage),
    Door("onnx: external data", _external, _use_storage),
    Door("onnx: import", _onnx, _use_import, apart=True),
    Door("onnx: passes", _onnx, _use_passes, apart=True),
    Door("safetensors", _safetensors, _use_safetensors),
    Door("LoRA", _lora, _use_lora),
    Door("LoRA settings of PEFT", _peft, _use_peft),
    Door("GGUF", _gguf, _use_gguf),
    Door("torch.save", _torch, _use_torch),
    Door("model folder", _model, _use_model),
    Door("manifest", _manifest, _use_manifest),
    Door("checkpoint", _checkpoint, _use_checkpoint),
    Door("cache plan", _plan, _use_plan),
    Door("options", _options, _use_options),
)


class Place:
    """A folder with a valid file, in which a lie takes the place of one file, and is taken back after."""

    def __init__(self, door: Door, folder: Path):
        self.door, self.folder = door, folder
        self.lies = door.make(folder)
        self._kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def open(self, lie: tuple[str, bytes]) -> bool:
        """Whether the door refuses the lie. Raises what no user should see."""
        name, data = lie
        (self.folder / name).write_bytes(data)
        try:
            return refused(lambda: self.door.use(self.folder))
        finally:
            self._restore()

    def valid(self) -> bool:
        """Whether the door opens for what is valid, where the valid file is there."""
        return not refused(lambda: self.door.use(self.folder))

    def _restore(self) -> None:
        for path in [p for p in self.folder.rglob("*") if p.is_file() and p not in self._kept]:
            path.unlink()
        for path, data in self._kept.items():
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
