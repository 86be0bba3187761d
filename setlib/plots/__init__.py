"""Figures, tables and boards of pictures: data in, drawing out."""
