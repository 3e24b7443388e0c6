"""Files of torch.save as places in a file: what torch reads, nothing run, nothing copied."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.torch_files import torch_tensors

TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    return (torch.randn(shape, generator=generator) * 5).to(dtype)


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = evaluate(found[name])
        assert array.shape == tuple(tensor.shape)
        assert (
            array.tobytes() == tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ), name


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": random(3, 5, dtype=dtype), "b": random(7, dtype=dtype), "c": random(0, 4, dtype=dtype)}
    torch.save(tensors, tmp_path / "w.pt")
    check(tmp_path / "w.pt", tensors)


def test_views_parameters_and_shared_storage(tmp_path: Path) -> None:
    base = random(6, 8, 3, 3)
    tensors = {
        "whole": base,
        "transposed": random(5, 9).t(),
        "channels_last": base.clone().to(memory_format=torch.channels_last),
        "part": base[2:4],
        "parameter": torch.nn.Parameter(random(4, 4)),
        "scalar": torch.tensor(2.5),
        "ones": random(1, 5, 1).transpose(0, 2),
    }
    torch.save(tensors, tmp_path / "w.pt")
    check(tmp_path / "w.pt", tensors)
    torch.save({"gaps": base[:, ::2]}, tmp_path / "gaps.pt")
    with pytest.raises(PassError, match="'gaps' is a view with gaps"):
        torch_tensors(tmp_path / "gaps.pt")


def test_a_checkpoint_of_modelopt(tmp_path: Path) -> None:
    """mto.save's dict: settings with objects of its own, which stay closed, beside the state of the model."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq

    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4)).to(torch.bfloat16)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(random(2, 16, dtype=torch.bfloat16)))
    mto.save(model, tmp_path / "m.pt")
    state: dict[str, Any] = torch.load(tmp_path / "m.pt", weights_only=False)["model_state_dict"]
    found = torch_tensors(tmp_path / "m.pt")
    for name, tensor in state.items():
        array = evaluate(found[f"model_state_dict.{name}"])
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    assert any(name.endswith("input_quantizer._amax") for name in found)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def test_no_code_of_the_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"evil": Evil(), "w": random(4)}, tmp_path / "w.pt")
    check(tmp_path / "w.pt", {"w": random(4)})
    assert not (tmp_path / "was-run").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "was-run").exists()  # the file is as evil as this test says


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no such file"):
        torch_tensors(tmp_path / "none.pt")
    (tmp_path / "bytes.pt").write_bytes(np.random.default_rng(1).bytes(1000))
    with pytest.raises(PassError, match=r"no file of torch\.save"):
        torch_tensors(tmp_path / "bytes.pt")
    torch.save({"w": random(1000)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PassError, match=r"no file of torch\.save"):
        torch_tensors(tmp_path / "cut.pt")
    torch.save({"w": random(10)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(PassError, match=r"torch of 1\.6 or later"):
        torch_tensors(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as source, zipfile.ZipFile(tmp_path / "zip.pt", "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(PassError, match="compressed"):
        torch_tensors(tmp_path / "zip.pt")


def with_pickle(path: Path, content: bytes) -> Path:
    """A file of torch.save with one tensor [3] whose pickle is `content` in place of its own."""
    torch.save({"w": random(3)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            own = info.filename.endswith("data.pkl")
            target.writestr(info.filename, content if own else source.read(info), zipfile.ZIP_STORED)
    return path


def pickle_of(path: Path) -> bytes:
    torch.save({"w": random(3)}, path)
    with zipfile.ZipFile(path) as whole:
        return whole.read(next(name for name in whole.namelist() if name.endswith("data.pkl")))


def circle() -> bytes:
    inner: list[Any] = []
    inner.append({"w": inner})
    return pickle.dumps({"a": inner}, 2)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02K\x01K\x02a.",  # append to a number
        b"\x80\x02K\x01K\x02\x85R.",  # call a number
        b"\x80\x02" + REBUILD + b"(K\x01K\x00K\x03\x85K\x01\x85\x89}tR.",  # a tensor in a number
        b"\x80\x02}X\x01\x00\x00\x00w" + REBUILD + b")Rs.",  # a tensor in nothing
        b"\x80\x02h\x07.",  # what was not remembered
        b"\x80\x02K\x01Q.",  # a storage that is a number
        b"\x80\x02.",
        b"",
    ],
)
def test_pickles_that_lie(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="Fix: "):
        torch_tensors(with_pickle(tmp_path / "w.pt", content))


def test_a_shape_below_zero_and_one_beyond_the_file(tmp_path: Path) -> None:
    whole = pickle_of(tmp_path / "w.whole")
    assert whole.count(b"K\x03\x85") == 1
    for shape in (
        b"J\xfd\xff\xff\xff\x85",
        b"J\x00\x00\x00\x7f\x85",
        b"X\x01\x00\x00\x003\x85",
        b"G@\x08\0\0\0\0\0\0\x85",
    ):
        with pytest.raises(PassError, match="Fix: "):
            torch_tensors(with_pickle(tmp_path / "w.pt", whole.replace(b"K\x03\x85", shape)))


def test_what_holds_itself_is_walked_once(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="Fix: "):
        torch_tensors(with_pickle(tmp_path / "w.pt", circle()))


def test_lists_that_unfold_are_told_at_once(tmp_path: Path) -> None:
    """A hundred lists, each of which holds the one before twice: 2^100 items in a kilobyte."""
    data = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(100)) + b"."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(PassError, match="its lists hold each other"):
        torch_tensors(tmp_path / "m.pt")
