"""Anomaly detection on the feature maps of a frozen backbone (DxMI, sec. 5.3)."""
