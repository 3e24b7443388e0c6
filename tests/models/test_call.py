"""How pipelines of diffusers are called."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import SkyReelsV2Pipeline

from diffc.models.call import plain_sizes, text_cleaner


def test_a_pipeline_that_cleans_prompts_runs_without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2 as module

    monkeypatch.delattr(module, "ftfy", raising=False)
    clean: Any = module.prompt_clean
    with pytest.raises(NameError):
        clean("a fox  in snow")
    with text_cleaner(SkyReelsV2Pipeline):
        assert clean(" a fox  in &amp; out ") == "a fox in & out"
    assert not hasattr(module, "ftfy")


def test_prompts_are_not_rewritten() -> None:
    assert plain_sizes({"enable_prompt_rewrite": None, "use_pe": None, "prompt": None}) == {
        "enable_prompt_rewrite": False,
        "use_pe": False,
    }
