"""Models by name: bundled, presets, folders, the hub; in 4 bits too."""
