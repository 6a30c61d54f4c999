"""Infrastructure of runs: settings, folders, logs, checkpoints, ranks and devices. Independent of DxMI.

Imports run one way: errors, arguments <- settings <- run_settings <- compute <- learning <- storage <- output
<- runs <- run <- course.
"""
