"""Infrastructure of runs: settings, folders, logs, checkpoints, ranks and devices. Independent of DxMI."""
