"""The settings of the application, as `serve run` gives them: texts by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffc.errors import UsageError


def replica(**given: Any) -> Any:
    """What Ray Serve is told of a replica, called as `serve run diffc.serve.app:build NAME=VALUE` calls it."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    from diffc.serve.app import build

    return call(build, given)._bound_deployment


def test_texts_become_settings() -> None:
    made = replica(artifact="x", min_replicas="3", max_replicas="2", gpus="0.5", max_batch="6", fill="true")
    (settings,) = made.init_args
    assert (settings.artifact, settings.fill) == (str(Path.cwd() / "x"), True)
    assert made.max_ongoing_requests == 12
    assert made.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 0.5}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "artifact: Field required"),
        ({"artifact": "x", "max_batch": "0"}, "max_batch: .*greater than or equal to 1"),
        ({"artifact": "x", "replicas": "2"}, r"replicas: (?s:.*)Fix: give artifact, pipeline, target"),
    ],
)
def test_what_is_no_setting_is_named(given: dict[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        replica(**given)
