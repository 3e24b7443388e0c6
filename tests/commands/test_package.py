"""`diffc package`: what the folder holds, by name and type, and that every graph of it computes what torch does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from diffc.artifact.folder import Artifact
from diffc.cli.main import run
from diffc.commands.package.graphs import component_graphs
from diffc.commands.package.optimum import backbone, backbone_types
from diffc.commands.package.parts import find_parts
from diffc.commands.package.request import PackageRequest, check_place, external_files, model_file
from diffc.commands.package.run import package
from diffc.commands.package.tokenizers import loadable_class, rewrite_config
from diffc.errors import DiffcError, MismatchError
from diffc.models.registry import FAMILIES
from tests.conftest import Cells

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
RNG = np.random.default_rng(17)


def interface(file: Path) -> dict[str, tuple[int, list[Any]]]:
    model = onnx.load(file, load_external_data=False)
    return {
        v.name: (
            v.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in (*model.graph.input, *model.graph.output)
    }


@pytest.fixture(scope="module")
def sd3(compiled: Cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sd3 in FP8, its CLIP, T5 and VAE exported and held against torch."""
    folder = tmp_path_factory.mktemp("package") / "sd3"
    assert run(["package", str(compiled("tiny-sd3", "fp8").folder), "-o", str(folder)]) == 0
    return folder


def test_the_folder_is_what_optimum_reads(sd3: Path) -> None:
    index = json.loads((sd3 / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizerFast"]
    assert (sd3 / "scheduler" / "scheduler_config.json").is_file()
    graphs = {p.parent.name for p in sd3.glob("*/model.onnx")}
    assert graphs == {
        *("transformer", "vae_encoder", "vae_decoder"),
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
    }
    assert all((sd3 / name / "config.json").is_file() for name in graphs)
    assert "extra_special_tokens" not in json.loads((sd3 / "tokenizer_3/tokenizer_config.json").read_text())


def test_components_have_the_contracts_names_types_and_dimensions(sd3: Path) -> None:
    clip = interface(sd3 / "text_encoder" / "model.onnx")
    assert clip["input_ids"] == (INT64, ["batch", "text"])
    assert list(clip)[1:] == ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(3))]
    assert clip["hidden_states.2"] == (HALF, ["batch", "text", 64])
    t5 = interface(sd3 / "text_encoder_3" / "model.onnx")
    assert {k: v[0] for k, v in t5.items()} == {"input_ids": INT64, "last_hidden_state": HALF}
    assert interface(sd3 / "vae_decoder" / "model.onnx") == {
        "latent_sample": (HALF, ["batch", 16, "height", "width"]),
        "sample": (HALF, ["batch", 3, "8 * height", "8 * width"]),
    }
    assert interface(sd3 / "vae_encoder" / "model.onnx") == {
        "sample": (HALF, ["batch", 3, "8 * height", "8 * width"]),
        "latent_parameters": (HALF, ["batch", 32, "height", "width"]),
    }


def test_every_graph_opens_and_runs_with_onnx_runtimes_defaults(sd3: Path) -> None:
    """At sizes other than those of the export; optimum opens sessions without options."""
    import onnxruntime as ort

    sizes = {"batch": 3, "text": 33, "height": 6, "width": 10, "8 * height": 48, "8 * width": 80}
    for file in sd3.glob("*/model.onnx"):
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        feeds = {}
        for value in session.get_inputs():
            shape = [sizes.get(d, d) for d in value.shape]
            kind = {"tensor(float16)": np.float16, "tensor(float)": np.float32}.get(value.type)
            drawn = RNG.standard_normal(shape) if kind else RNG.integers(0, 90, shape)
            feeds[value.name] = drawn.astype(kind or np.int64)
        for output, array in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            expected = [eval(d, {}, sizes) if isinstance(d, str) else d for d in output.shape]
            assert list(array.shape) == expected, (file.parent.name, output.name)
            assert np.isfinite(array).all()
            assert array.astype(np.float64).std() > 0


def test_the_backbone_is_the_artifacts(sd3: Path, compiled: Cells) -> None:
    from diffc.backends.onnxruntime.arrays import OrtSession
    from diffc.validate.torch_reference import validation_arrays

    cell = compiled("tiny-sd3", "fp8")
    source = cell.artifact.folder / "model.onnx_data"
    packaged = sd3 / "transformer" / "model.onnx_data"
    assert packaged.read_bytes() == source.read_bytes()
    onnx.load(sd3 / "transformer" / "model.onnx")  # which refuses weights that are linked
    drawn = validation_arrays(cell.plan.source, "float16", 3)[0]
    results = []
    for file in (cell.folder / model_file(cell.artifact, None), sd3 / "transformer" / "model.onnx"):
        with OrtSession(file, exact=True) as session:
            kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.dtype) for i in session.inputs}
            feeds = {name: array.astype(kinds[name]) for name, array in drawn.items()}
            results.append(session.run(feeds)["out_hidden_states"])
    assert results[0].astype(np.float64).std() > 0
    assert np.array_equal(results[0], results[1])


@pytest.mark.slow
def test_flux_takes_int64_ids_and_float32_for_bfloat16(compiled: Cells, tmp_path: Path) -> None:
    cell = compiled("tiny-flux", "fp8")
    file = cell.folder / model_file(cell.artifact, None)
    optimum = FAMILIES["flux"].optimum
    assert optimum is not None
    backbone(cell.artifact, file, tmp_path / "transformer", optimum.types)
    found = {name: kind for name, (kind, _) in interface(tmp_path / "transformer" / "model.onnx").items()}
    assert found["img_ids"] == found["txt_ids"] == INT64
    assert TensorProto.BFLOAT16 not in found.values()
    assert found["hidden_states"] == found["out_hidden_states"] == FLOAT  # optimum writes one over the other
    assert interface(file)["hidden_states"][0] == TensorProto.BFLOAT16
    made = onnx.load(tmp_path / "transformer" / "model.onnx", load_external_data=False)
    assert backbone_types(made, optimum.types) == ()
    assert all((tmp_path / "transformer" / name).is_file() for name in external_files(made))


@pytest.mark.slow
def test_sdxl_has_a_scalar_timestep(compiled: Cells, tmp_path: Path) -> None:
    cell = compiled("tiny-sdxl", "fp8")
    backbone(cell.artifact, cell.folder / model_file(cell.artifact, None), tmp_path / "unet", {})
    found = interface(tmp_path / "unet" / "model.onnx")
    assert found["timestep"] == (FLOAT, [])
    assert list(found) == [
        *("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "out_sample")
    ]


@pytest.mark.slow
def test_components_of_another_folder_are_taken_as_they_are(
    sd3: Path, compiled: Cells, tmp_path: Path
) -> None:
    artifact = compiled("tiny-sd3", "none").folder
    made = package(PackageRequest(artifact, tmp_path / "again", components=sd3))
    assert made.errors == {}
    graphs = {
        name: [(f / name / "model.onnx").read_bytes() for f in (sd3, tmp_path / "again")]
        for name in ("vae_decoder", "text_encoder_3", "transformer")
    }
    assert {name for name, (old, new) in graphs.items() if old == new} == {"vae_decoder", "text_encoder_3"}
    shutil.copytree(sd3, tmp_path / "broken")
    (tmp_path / "broken/text_encoder_2/model.onnx").unlink()
    with pytest.raises(DiffcError, match=r"no text_encoder_2/model\.onnx"):
        package(PackageRequest(artifact, tmp_path / "third", components=tmp_path / "broken"))
    assert not (tmp_path / "third").exists()


def test_a_component_that_differs_from_torch_is_an_error(sd3: Path, compiled: Cells, tmp_path: Path) -> None:
    from diffc.commands.package.export import check

    pipeline = compiled("tiny-sd3", "fp8").plan.source.pipeline_dir
    assert pipeline is not None
    (graph,) = component_graphs(pipeline, "text_encoder", "CLIPTextModelWithProjection", "float16")
    file = sd3 / "text_encoder" / "model.onnx"
    assert check(graph, file) < 5e-3
    model = onnx.load(file)
    weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(weight) * np.float16(1.1)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(MismatchError, match="text_encoder: output"):
        check(graph, tmp_path / "model.onnx")


def test_refusals_say_what_to_do(sd3: Path, compiled: Cells, tmp_path: Path) -> None:
    folder = compiled("tiny-sd3", "fp8").folder
    with pytest.raises(DiffcError, match="is the artifact"):
        check_place(PackageRequest(folder, folder, force=True))
    with pytest.raises(DiffcError, match="is an artifact, no package"):
        check_place(PackageRequest(sd3, folder, force=True))
    with pytest.raises(DiffcError, match="--force"):
        check_place(PackageRequest(folder, sd3))
    with pytest.raises(DiffcError, match="unknown layout 'olive'"):
        package(PackageRequest(folder, tmp_path / "x", layout="olive"))
    with pytest.raises(DiffcError, match="--target tensorrt"):
        model_file(Artifact.load(folder), "tensorrt")
    alone = Artifact(folder, {**Artifact.load(folder).manifest, "request": {"model": "/nowhere"}})
    with pytest.raises(DiffcError, match="--pipeline DIR"):
        find_parts(alone, None, None)


def test_tokenizers_of_both_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": ["<a>"], "x": 1}))
    (tmp_path / "tokenizer.json").touch()
    assert loadable_class(tmp_path, "T5Tokenizer") == "T5TokenizerFast"
    (tmp_path / "spiece.model").touch()
    assert loadable_class(tmp_path, "T5Tokenizer") == "T5Tokenizer"
    rewrite_config(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"x": 1, "additional_special_tokens": ["<a>"]}
