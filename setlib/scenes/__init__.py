"""Rendered streets: the same content in eight styles, with exact labels and depth."""

from setlib.scenes.cache import cached_scenes
from setlib.scenes.render import STYLES, VERSION, Scene, render_scene

__all__ = ["STYLES", "VERSION", "Scene", "cached_scenes", "render_scene"]
