"""The bundled world: its stories, the gold reward that judges them, the text to learn from."""
