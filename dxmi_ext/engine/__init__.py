"""How a run lives: settings, folders, logs, checkpoints, ranks and devices. Knows nothing of DxMI."""
