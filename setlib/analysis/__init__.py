"""Amplitude, phase and tokens measured, and the ablation."""
