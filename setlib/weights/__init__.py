"""Where frozen backbones come from: presets, folders, files, the hub."""
