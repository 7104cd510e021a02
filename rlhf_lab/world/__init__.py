"""The bundled world: its stories, the gold reward that scores them, the text to learn from."""
