"""Which reader takes a MODEL, and one error that tells why none does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffc.errors import DiffcError
from diffc.models.sources.locate import READERS, locate
from tests.models.sources.folders import backbone


def test_a_path_is_a_folder_though_the_bare_name_is_an_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone(tmp_path / "tiny-sd3")
    monkeypatch.chdir(tmp_path)
    source = locate("./tiny-sd3")
    assert (source.path, source.family.name) == (tmp_path / "tiny-sd3", "flux")


def test_the_error_lists_every_reader_and_why_it_declined(tmp_path: Path) -> None:
    with pytest.raises(DiffcError) as caught:
        locate(str(tmp_path))
    for reader in READERS:
        assert f"\n  {reader.name}: {reader.declines(str(tmp_path))}\n" in f"{caught.value}\n"
        assert reader.expects in caught.value.fix
    assert "tiny-sd3, tiny-sd35, tiny-flux, tiny-sdxl" in str(caught.value)


def test_import_is_light() -> None:
    code = (
        "import sys, diffc.models.sources.locate; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
