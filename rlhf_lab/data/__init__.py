"""The door for data: files, the shapes of rows, tokens, rewards by name, preferences."""
