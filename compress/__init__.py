"""Passes on torch modules: specs, recipes, quantization, calibration."""
