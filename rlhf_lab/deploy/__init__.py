"""After training: quantise a model, serve it, load the server, write it down for other engines."""
