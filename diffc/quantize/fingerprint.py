"""What a checkpoint remembers of its model: the backbone's config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def backbone_config(backbone: nn.Module) -> dict[str, Any]:
    """The config of a diffusers backbone as plain JSON values, defaults included, with its class name.

    What diffusers notes for itself (paths, versions: names with an underscore) is left out.
    """
    config: Any = backbone.config
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(own))
    return {"_class_name": type(backbone).__name__, **plain}


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, the same for any order of its entries."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
