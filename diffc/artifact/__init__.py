"""The folder that a compile leaves, its manifest, and what a restart takes up."""

from diffc.artifact.folder import MANIFEST, Artifact

__all__ = ["MANIFEST", "Artifact"]
