"""Short names of released models: ids on the hub, found in its cache or refused with what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.embedded.real import REAL
from diffc.models.sources.locate import locate
from diffc.models.sources.released_name import RELEASED, id_of
from diffc.models.sources.source import HubOptions
from tests.models.sources.test_hub import COMMITS, NAME, in_cache


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_names_are_ids_and_no_embedded_model() -> None:
    assert not RELEASED.keys() & EMBEDDED.keys()
    assert set(REAL) <= RELEASED.keys()
    assert all(identity.count("/") == 1 for identity in RELEASED.values())
    assert id_of("FLUX-dev") == "black-forest-labs/FLUX.1-dev"
    assert id_of("flux-de") is None


def test_a_name_that_is_not_in_the_cache_says_what_it_stands_for(tmp_path: Path) -> None:
    with pytest.raises(
        DiffcError, match=r"sdxl-1.0 stands for stabilityai/stable-diffusion-xl-base-1.0[\s\S]*--token"
    ):
        locate("sdxl-1.0", HubOptions(cache_dir=tmp_path))


def test_a_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_cache(tmp_path, COMMITS[0])
    monkeypatch.setitem(RELEASED, "sd3.5-medium", NAME)  # type: ignore[arg-type]
    source = locate("SD3.5-medium", HubOptions(cache_dir=tmp_path))
    assert (source.name, source.revision) == (NAME, COMMITS[0])


def test_a_misspelt_name_is_guessed() -> None:
    with pytest.raises(DiffcError, match=r"nothing reads the model 'flux_dev'\. Did you mean flux-dev\?"):
        locate("flux_dev")
