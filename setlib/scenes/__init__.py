"""Rendered streets: the same content in eight styles, with exact labels and depth."""
