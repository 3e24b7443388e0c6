"""The model families: one file each, with one `Family` called FAMILY; `diffc.models.registry` lists this folder."""
