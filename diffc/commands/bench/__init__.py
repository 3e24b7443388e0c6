"""How fast a compiled backbone is beside torch, and what memory it takes."""
