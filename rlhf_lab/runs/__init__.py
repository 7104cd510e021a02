"""A run on disk, the ledger of its costs, and how far it is."""
