"""The small models that diffc makes itself, known by name, without a download."""

from diffc.models.embedded.catalogue import EMBEDDED, materialize

__all__ = ["EMBEDDED", "materialize"]
