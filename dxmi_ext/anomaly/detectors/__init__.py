"""Detectors on feature maps: plain ones, and the networks of DxMI."""
