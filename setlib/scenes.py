"""Rendered street scenes: images with exact labels and depth, the same streets in eight styles.

Holds the renderer (plan of a street -> planar faces -> visibility -> texture, light, weather, camera) and the cache of
PNG files. A scene's content (what is where) depends on (seed, index) alone, its style on (seed, index, style): labels
and depth are the same bits in all styles. No data set reading here.

Coordinates are metres. Road: s along, lat to the right of the centre line. Camera: x right, y up from the ground, z
along the optical axis. A face is the parallelogram P + u U + v V, u and v in 0..1, narrowed by tapers towards v = 1;
1/z, u/z and v/z are linear in the pixel, so faces need no clipping. Colours are gamma-2 values: light is their square.
Only + - * / and sqrt decide geometry, and no BLAS is used: the same bytes on every run.
"""

# Filled lines throughout: one argument a line would make the geometry half as long again.
# fmt: off
import difflib
import json
import math
import multiprocessing
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

STYLES = ("game", "clear", "overcast", "dusk", "night", "fog", "rain", "snow")
VERSION = 1  # of the rendered content; a cache of another version is refused
MIN_SIDE = 32  # pixels
NEAR = 0.4  # metres; nothing closer is drawn
POOL_FROM = 16  # missing scenes above which a process pool pays
(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR,
 TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(19)  # Cityscapes train ids
(PLAIN, ROUND, LEAF, FACADE, ROOF, CABIN, END, COACH, CARGO, WHEEL, MASONRY, SIGN, SIGNAL) = range(13)  # materials
SOLID, DISC, RING, LEAVES, BARS, PLANKS = range(6)  # outlines of faces
LANE, KERB, CROSS = 3.3, 0.2, 4.5  # lane and kerb width, half width of a crossing street
GREY, DARK, STEEL = (0.6, 0.6, 0.6), (0.1, 0.1, 0.11), (0.5, 0.52, 0.53)
PAINTS = ((0.75, 0.1, 0.1), (0.9, 0.9, 0.9), (0.12, 0.12, 0.14), (0.55, 0.57, 0.6), (0.12, 0.25, 0.55),
    (0.8, 0.8, 0.82), (0.3, 0.32, 0.35), (0.95, 0.75, 0.1), (0.1, 0.4, 0.3), (0.5, 0.25, 0.15), (0.35, 0.55, 0.75),
    (0.7, 0.68, 0.6))
PLASTERS = ((0.85, 0.78, 0.62), (0.8, 0.76, 0.7), (0.72, 0.55, 0.42), (0.88, 0.85, 0.8), (0.66, 0.7, 0.7),
    (0.85, 0.68, 0.5))
BRICKS = ((0.6, 0.33, 0.25), (0.68, 0.48, 0.34), (0.5, 0.3, 0.26), (0.72, 0.6, 0.46))
TROUSERS = ((0.16, 0.18, 0.26), (0.12, 0.12, 0.13), (0.3, 0.36, 0.5), (0.42, 0.38, 0.3))
CLOTHES = ((0.15, 0.18, 0.3), (0.7, 0.15, 0.15), (0.85, 0.85, 0.8), (0.2, 0.2, 0.2), (0.2, 0.4, 0.6), (0.8, 0.65, 0.2),
    (0.3, 0.45, 0.3))


@dataclass(frozen=True)
class Scene:
    """One rendered street: image uint8 (h, w, 3), label uint8 (h, w) Cityscapes train ids 0..18, depth float32 (h, w).

    Depth is in metres along the optical axis, infinite for sky.
    """

    image: ndarray
    label: ndarray
    depth: ndarray


@dataclass(frozen=True)
class _Look:
    """Light, weather and camera of one style; lights in linear units, lengths in metres or in 1/224 of the height."""

    sun: tuple = (0.0, 0.0, 0.0)
    ambient: tuple = (0.6, 0.62, 0.66)
    zenith: tuple = (0.3, 0.45, 0.8)  # linear
    horizon: tuple = (0.75, 0.82, 0.9)  # linear; also what glass and wet roads mirror
    cloud: tuple = (1.0, 1.0, 1.0)
    clouds: float = 0.5  # share of the sky
    haze: float = 0.001  # Koschmieder's beta, 1/m
    lights: float = 0.0  # lamps, headlights, windows
    wet: float = 0.0
    snow: float = 0.0
    saturation: float = 1.0
    grain: float = 1.0  # contrast of the surface textures
    exposure: float = 1.0
    tint: tuple = (1.0, 1.0, 1.0)
    blur: int = 0  # passes of a 1-2-1 filter
    noise: float = 0.0
    vignette: float = 0.0


LOOKS = {
    "game": _Look(sun=(1.15, 1.08, 0.9), ambient=(0.42, 0.46, 0.56), zenith=(0.08, 0.25, 0.72),
        horizon=(0.5, 0.72, 0.95), saturation=1.3, clouds=0.42, grain=0.8, haze=0.0008),
    "clear": _Look(sun=(1.3, 1.2, 1.0), ambient=(0.3, 0.32, 0.36), zenith=(0.26, 0.44, 0.74), horizon=(0.85, 0.9, 0.94),
        saturation=0.9, clouds=0.32, grain=1.3, haze=0.0014, exposure=1.0, blur=1, noise=0.012, vignette=0.3,
        tint=(1.03, 1.0, 0.95)),
    "overcast": _Look(ambient=(0.66, 0.69, 0.72), zenith=(0.5, 0.53, 0.57), horizon=(0.8, 0.82, 0.83),
        cloud=(0.62, 0.64, 0.67), clouds=0.95, saturation=0.66, haze=0.002, exposure=0.85, blur=1, noise=0.015,
        vignette=0.25, grain=1.1),
    "dusk": _Look(sun=(0.45, 0.22, 0.09), ambient=(0.2, 0.18, 0.26), zenith=(0.07, 0.1, 0.26),
        horizon=(0.85, 0.42, 0.2), cloud=(0.5, 0.26, 0.26), clouds=0.5, lights=0.45, saturation=0.95, haze=0.0012,
        exposure=1.1, blur=1, noise=0.025, vignette=0.4),
    "night": _Look(ambient=(0.014, 0.017, 0.03), zenith=(0.003, 0.004, 0.012), horizon=(0.05, 0.035, 0.03),
        cloud=(0.03, 0.024, 0.025), clouds=0.5, lights=1.0, saturation=0.85, haze=0.0008, exposure=1.0, blur=1,
        noise=0.03, vignette=0.4, tint=(1.08, 0.98, 0.86)),
    "fog": _Look(ambient=(0.66, 0.68, 0.7), zenith=(0.66, 0.69, 0.72), horizon=(0.66, 0.69, 0.72),
        cloud=(0.66, 0.69, 0.72), clouds=0.0, haze=0.03, saturation=0.6, exposure=0.95, blur=1, noise=0.012,
        lights=0.15, vignette=0.2),
    "rain": _Look(ambient=(0.4, 0.44, 0.5), zenith=(0.26, 0.3, 0.35), horizon=(0.36, 0.4, 0.45),
        cloud=(0.25, 0.28, 0.33), clouds=0.85, haze=0.009, lights=0.3, wet=1.0, saturation=0.7, exposure=0.85, blur=1,
        noise=0.02, vignette=0.3, tint=(0.95, 1.0, 1.06)),
    "snow": _Look(ambient=(0.62, 0.66, 0.73), zenith=(0.62, 0.65, 0.69), horizon=(0.74, 0.76, 0.79),
        cloud=(0.58, 0.61, 0.66), clouds=0.8, haze=0.0075, snow=1.0, saturation=0.6, exposure=0.9, blur=1, noise=0.015,
        vignette=0.2, tint=(0.98, 1.0, 1.04)),
}
KINDS = {  # weight, lanes per direction, chance of parking, widths of verge and sidewalk, fronts of both sides
    "canyon": (0.26, (1, 1, 2), 0.8, (0.0, 0.0), (2.6, 4.5), ("blocks",), ("blocks",)),
    "suburb": (0.2, (1,), 0.5, (0.0, 1.5), (1.8, 2.6), ("houses",), ("houses",)),
    "avenue": (0.2, (1, 2), 0.4, (1.5, 3.5), (2.2, 3.5), ("park", "blocks"), ("park", "houses", "blocks")),
    "works": (0.14, (1, 2), 0.3, (0.0, 2.0), (1.8, 2.5), ("works",), ("works", "park", "blocks")),
    "railway": (0.2, (1,), 0.3, (0.5, 2.0), (1.8, 2.8), ("rail",), ("blocks", "houses", "works")),
}


def _stream(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@dataclass
class _Street:
    """Plan of one street and the camera in it."""

    kind: str
    bend: float  # curvature, 1/m: the centre line is x = bend s^2 / 2
    yaw: float
    ego: float  # lat of the camera
    height: float
    focal: float  # in image heights
    horizon: float  # row, in image heights
    lanes: int
    edge: float  # half width of the road
    parking: bool
    verge: list[float]  # left, right
    walk: list[float]
    fronts: list[str]
    crossing: float  # s of the crossing street's centre line, or -1000
    tram: bool

    @classmethod
    def draw(cls, rng) -> "_Street":
        names = list(KINDS)
        kind = names[rng.choice(len(names), p=[KINDS[name][0] for name in names])]
        _, lanes, parked, verge, walk, left, right = KINDS[kind]
        num_lanes = int(rng.choice(lanes))
        parking = rng.random() < parked
        bend = rng.choice([-1, 1]) * rng.uniform(0.0008, 0.0045) if rng.random() < 0.55 else 0.0
        fronts = [str(rng.choice(left)), str(rng.choice(right))]
        if rng.random() < 0.5:
            fronts.reverse()
        return cls(kind, bend, rng.uniform(-0.07, 0.07), LANE * (0.5 + rng.integers(num_lanes))
            + rng.uniform(-0.3, 0.3), rng.uniform(1.3, 1.9), rng.uniform(1.1, 1.5), rng.uniform(0.4, 0.5), num_lanes,
            num_lanes * LANE + 0.3 + 2.1 * parking, parking, list(rng.uniform(*verge, 2)), list(rng.uniform(*walk, 2)),
            fronts, rng.uniform(17, 55) if rng.random() < 0.7 else -1000.0, kind in ("canyon", "avenue")
            and rng.random() < 0.3)

    def base(self, right: bool) -> float:
        """Distance of the outer edge of one side's sidewalk from the centre line."""
        return self.edge + self.verge[right] + self.walk[right]

    def clear(self, start: float, stop: float) -> bool:
        """Whether the stretch start..stop of s keeps clear of the crossing street and its sidewalks."""
        return stop < self.crossing - CROSS - 2.5 or start > self.crossing + CROSS + 2.5


class _Stage:
    """Faces, contact shadows and lights of a street, added in local frames: a to the right, b up, c forward."""

    def __init__(self, street: _Street, rng):
        self.street, self.rng = street, rng
        self.faces, self.blots, self.lights = [], [], []
        self.frame, self.facing, self.seed = (0.0, 0.0, 1.0, 0.0), False, 0.0

    def at(self, s: float, lat: float, turn: float = 0.0, facing: bool = False) -> "_Stage":
        """Starts an object at (s, lat): heading along the road plus `turn` radians, or facing the camera."""
        street = self.street
        slope = street.bend * s
        norm = math.sqrt(1 + slope * slope)
        x, z = slope * s / 2 + lat / norm - street.ego, s - lat * slope / norm
        cos, sin = math.cos(street.yaw), math.sin(street.yaw)
        angle = 0.0 if facing else math.atan(slope) + turn - street.yaw
        self.frame = (x * cos - z * sin, x * sin + z * cos, math.cos(angle), math.sin(angle))
        self.facing, self.seed = facing, self.rng.random()
        return self

    def thin(self, width: float) -> float:
        """`width`, or what is needed to stay visible at the frame's distance."""
        return max(width, 0.0032 * self.frame[1])

    def quad(self, p, u, v, label, material, colour, taper=(0.0, 0.0), outline=SOLID, values=(), cull=False):
        """Adds the face p + u U + v V; with `cull` it is seen from outside only (u right, v up)."""
        values = (*values, 0.0, 0.0, 0.0, 0.0)[:4]
        self.faces.append((*self.frame, *p, *u, *v, *taper, label, material, outline, *colour, *values, self.seed, cull,
            self.facing))

    def card(self, x, y, width, height, label, colour, lean=0.0, taper=0.0, outline=SOLID, material=ROUND, values=()):
        """Adds an upright face in the plane c = 0, centred at x, from y upwards (downwards where height < 0)."""
        self.quad((x - width / 2, y, 0), (width, 0, 0), (lean, height, 0), label, material, colour, (taper, taper),
            outline, values)

    def box(self, a, b, c, label, materials, colour, inset=(0.0, 0.0, 0.0), top=None, sides=None, values=()):
        """Adds a box over the ranges a, b, c; `inset` narrows its top at the sides, the rear and the front.

        materials: of the rear, the sides and the front; `sides` and `top`: their own colours.
        """
        (x0, x1), (y0, y1), (z0, z1) = a, b, c
        width, high, length, (side, rear, front) = x1 - x0, y1 - y0, z1 - z0, inset
        add = partial(self.quad, label=label, cull=True)
        across, along, back = side / width, rear / length, front / length
        add((x0, y0, z0), (width, 0, 0), (0, high, rear), material=materials[0], colour=colour, taper=(across, across),
            values=values)
        values_front = (1.0, *values[1:]) if materials[2] == END else values
        add((x1, y0, z1), (-width, 0, 0), (0, high, -front), material=materials[2], colour=colour,
            taper=(across, across), values=values_front)
        add((x0, y0, z1), (0, 0, -length), (side, high, 0), material=materials[1], colour=sides or colour,
            taper=(back, along), values=values)
        add((x1, y0, z0), (0, 0, length), (-side, high, 0), material=materials[1], colour=sides or colour,
            taper=(along, back), values=values)
        if width > 2 * side:
            self.quad((x0 + side, y1, z0 + rear), (width - 2 * side, 0, 0), (0, 0, length - rear - front), label, PLAIN,
                top or colour, cull=True)

    def blot(self, width: float, length: float):
        """Adds the soft contact shadow under an object."""
        self.blots.append((*self.frame, -width / 2, 0, -length / 2, width, 0, 0, 0, 0, length))

    def light(self, a: float, b: float, c: float, colour: tuple, size: float, reach: float = 0.0):
        """Adds a light: glow `size` metres wide; with `reach` > 0 it also lights the street."""
        x, z, cos, sin = self.frame
        self.lights.append((x + a * cos + c * sin, b - self.street.height, z - a * sin + c * cos, *colour, size, reach))


CARS = {  # length, width, top of body and roof, start and end of the cabin, slope of its rear and front window
    "saloon": (4.6, 1.8, 0.86, 1.43, 0.6, 3.4, 0.65, 0.8),
    "hatch": (3.9, 1.72, 0.88, 1.5, 0.04, 2.9, 0.35, 0.75),
    "estate": (4.7, 1.82, 0.86, 1.48, 0.05, 3.5, 0.45, 0.8),
    "suv": (4.7, 1.92, 1.02, 1.78, 0.05, 3.5, 0.3, 0.65),
    "van": (5.3, 1.95, 1.15, 2.15, 0.03, 4.5, 0.08, 0.75),
}


def _wheels(stage, label, width, length, radius, spots):
    """Wheels at the places `spots` along a vehicle (c of their axles), and the tyres seen from its end."""
    for side in (-1, 1):
        for c in spots:
            stage.quad((side * (width / 2 + 0.01), 0, c - radius), (0, 0, 2 * radius), (0, 2 * radius, 0), label, WHEEL,
                DARK, outline=DISC)
        for c in (spots[0] - radius * 0.7, spots[-1] + radius * 0.7):
            stage.quad((side * (width / 2 - 0.16) - 0.12, 0, c), (0.24, 0, 0), (0, radius * 1.3, 0), label, PLAIN, DARK)
    stage.blot(width + 0.5, length + 0.5)


def _car_lights(stage, width, length, low, shift=0.7):
    for side in (-shift, shift):
        stage.light(side * width / 2, low, -length / 2 - 0.1, (1.0, 0.06, 0.03), 0.16)
        stage.light(side * width / 2, low, length / 2 + 0.1, (1.0, 0.95, 0.8), 0.34)


def _car(stage, s, lat, turn, moving):
    rng = stage.rng
    stage.at(s, lat, turn)
    kind = str(rng.choice(list(CARS), p=[0.25, 0.25, 0.15, 0.22, 0.13]))
    length, width, body, top, start, end, rear, front = CARS[kind]
    colour = PAINTS[rng.integers(len(PAINTS))]
    half, back = width / 2, -length / 2
    stage.box((-half, half), (0.2, body), (back, -back), CAR, (END, PLAIN, END), colour, (0.05, 0.05, 0.12),
        values=(0, moving, 0, 0))
    stage.box((-half + 0.05, half - 0.05), (body, top), (back + start, back + end), CAR, (CABIN, CABIN, CABIN), colour,
        (0.2, rear, front))
    _wheels(stage, CAR, width, length, 0.33, (back + 0.8, -back - 0.85))
    if moving:
        _car_lights(stage, width, length, 0.66)


def _truck(stage, s, lat, turn, moving):
    rng = stage.rng
    stage.at(s, lat, turn)
    length, top, colour = rng.uniform(6.5, 9.5), rng.uniform(3.0, 3.7), PAINTS[rng.integers(len(PAINTS))]
    back, cargo = -length / 2, PAINTS[rng.integers(len(PAINTS))]
    stage.box((-1.2, 1.2), (1.0, top), (back, -back - 2.1), TRUCK, (CARGO, CARGO, PLAIN), cargo)
    stage.box((-1.1, 1.1), (0.5, 1.0), (back, -back - 1.9), TRUCK, (END, PLAIN, PLAIN), (0.2, 0.2, 0.22),
        values=(0, moving, 0, 0))
    stage.box((-1.15, 1.15), (0.45, 1.5), (-back - 1.9, -back), TRUCK, (PLAIN, PLAIN, END), colour,
        values=(0, moving, 0, 0))
    stage.box((-1.15, 1.15), (1.5, 2.75), (-back - 1.9, -back), TRUCK, (PLAIN, CABIN, CABIN), colour, (0.06, 0, 0.25))
    _wheels(stage, TRUCK, 2.4, length, 0.5, (back + 1.2, back + 2.4, -back - 1.2))
    if moving:
        _car_lights(stage, 2.2, length, 0.8)


def _bus(stage, s, lat, turn, moving):
    rng = stage.rng
    stage.at(s, lat, turn)
    length, top, colour = rng.uniform(9.5, 12.0), rng.uniform(2.9, 3.3), PAINTS[(0, 4, 7, 8, 1, 10)[rng.integers(6)]]
    back = -length / 2
    stage.box((-1.25, 1.25), (0.32, top), (back, -back), BUS, (END, COACH, END), colour, (0.08, 0.1, 0.15),
        values=(0, moving, 0.5, 0), top=(0.8, 0.8, 0.8))
    _wheels(stage, BUS, 2.5, length, 0.48, (back + 2.4, -back - 2.6))
    if moving:
        _car_lights(stage, 2.3, length, 0.75)


def _train(stage, s, lat, colour, num_cars, car=13.0, width=2.7):
    """A train or tram whose nearest end is at s."""
    for k in range(num_cars):
        stage.at(s + (k + 0.5) * car, lat)
        stage.box((-width / 2, width / 2), (0.3, 3.5), (-car / 2 + 0.2, car / 2 - 0.2), TRAIN, (END, COACH, END),
            colour, (0.15, 0.1, 0.1), values=(0, 1, 0.5, 0), top=(0.45, 0.46, 0.48))
        stage.box((-width / 2 + 0.3, width / 2 - 0.3), (0, 0.3), (-car / 2 + 0.6, car / 2 - 0.6), TRAIN, (PLAIN,) * 3,
            (0.12, 0.12, 0.12))
        stage.box((-0.7, 0.7), (3.5, 3.8), (-2, 2), TRAIN, (PLAIN,) * 3, (0.3, 0.3, 0.32))
        stage.blot(width + 0.6, car + 0.5)


def _person(stage, s, lat, label=PERSON, seat=0.0, scale=None):
    """A walker, or with seat > 0 (metres) somebody who sits at that height on a vehicle."""
    rng = stage.rng
    stage.at(s, lat, facing=True)
    k = scale or rng.uniform(0.86, 1.06)
    coat, trousers = CLOTHES[rng.integers(len(CLOTHES))], TROUSERS[rng.integers(len(TROUSERS))]
    skin = (0.85, 0.66, 0.54) if rng.random() < 0.65 else (0.45, 0.3, 0.22)
    hip, stride = (seat + 0.12 if seat else 0.84 * k), (0.05 if seat else rng.uniform(0.04, 0.2))
    foot = seat - 0.5 if seat else 0.0
    for side in (-1, 1):
        stage.card(side * 0.085, hip + 0.08, 0.2 * k, foot - hip - 0.05, label, trousers, lean=side * stride,
            taper=0.22)
        stage.card(side * 0.215 * k, hip + 0.59 * k, 0.13 * k, -0.55 * k, label, coat, lean=side * 0.05, taper=0.2)
        stage.card(side * 0.265 * k, hip + 0.06 * k, 0.08 * k, -0.1 * k, label, skin, outline=DISC)
    stage.card(0, hip, 0.36 * k, 0.62 * k, label, coat, taper=-0.08)
    stage.card(0, hip + 0.56 * k, 0.12 * k, 0.16 * k, label, skin)
    stage.card(0, hip + 0.66 * k, 0.21 * k, 0.27 * k, label, skin, outline=DISC)
    hair = (0.8, 0.2, 0.15) if seat else ((0.12, 0.09, 0.07), (0.4, 0.28, 0.16), (0.7, 0.68, 0.65))[rng.integers(3)]
    stage.card(0, hip + 0.77 * k, 0.24 * k, 0.19 * k, label, hair, outline=DISC)
    if not seat:
        stage.blot(0.8, 0.6)


def _cycle(stage, s, lat, turn, label, ridden):
    """A bicycle or motorcycle, with a rider where `ridden`."""
    stage.at(s, lat, turn)
    paint, radius, reach = PAINTS[stage.rng.integers(len(PAINTS))], 0.34, (0.54 if label == BICYCLE else 0.7)
    tyre = stage.thin(0.08 if label == BICYCLE else 0.2)
    for c in (-reach, reach):
        stage.quad((0, 0, c - radius), (0, 0, 2 * radius), (0, 2 * radius, 0), label, WHEEL, DARK, outline=RING)
        stage.box((-tyre / 2, tyre / 2), (0.02, 0.64), (c - tyre / 2, c + tyre / 2), label, (PLAIN,) * 3, DARK)
    bar = stage.thin(0.06)
    for (c0, b0), (c1, b1) in (((-0.54, 0.34), (0.4, 0.85)), ((-0.1, 0.34), (-0.2, 0.92)), ((-0.1, 0.34), (0.42, 0.8)),
            ((0.54, 0.34), (0.4, 1.02))):
        stage.quad((0, b0, c0), (0, b1 - b0, c1 - c0), (0, bar, bar / 2), label, PLAIN, paint)
    stage.box((-0.28, 0.28), (1.0, 1.0 + bar), (0.34, 0.34 + bar), label, (PLAIN,) * 3, DARK)
    if label == MOTORCYCLE:
        stage.box((-0.16, 0.16), (0.42, 0.86), (-0.75, 0.5), label, (END, PLAIN, END), paint, (0.05, 0.0, 0.2),
            values=(0, ridden, 0, 0))
        stage.box((-0.2, 0.2), (0.2, 0.45), (-0.25, 0.3), label, (PLAIN,) * 3, (0.25, 0.25, 0.27))
        stage.box((-0.2, 0.2), (0.85, 1.2), (0.35, 0.55), label, (PLAIN,) * 3, paint, (0.05, 0.0, 0.1))
        if ridden:
            stage.light(0, 0.75, 0.8, (1.0, 0.95, 0.8), 0.3)
    stage.light(0, 0.7, -0.85, (1.0, 0.06, 0.03), 0.1 * ridden)
    stage.blot(0.7, 1.9)
    if ridden:
        _person(stage, s - 0.1, lat, RIDER, seat=0.82, scale=1.0)


def _tree(stage, s, lat, size=1.0):
    """A tree of one of four kinds: a trunk, and a crown of leafy discs at several depths."""
    rng = stage.rng
    kind = ("broad", "broad", "poplar", "conifer")[rng.integers(4)]
    stage.at(s, lat, facing=True)
    green = (rng.uniform(0.32, 0.5), rng.uniform(0.52, 0.64), rng.uniform(0.18, 0.3))
    trunk, spread = rng.uniform(1.8, 2.8) * size, rng.uniform(1.6, 2.4) * size
    stage.card(0, 0, 0.34 * size, trunk + spread * 0.8, VEGETATION, (0.34, 0.27, 0.2), taper=0.2)
    if kind == "conifer":
        for k in range(4):
            low, width = trunk * 0.5 + 1.35 * size * k, (3.6 - 0.75 * k) * size
            stage.quad((-width / 2, low, -0.1 * k), (width, 0, 0), (0, 2.3 * size, 0), VEGETATION, LEAF,
                (0.25, 0.44, 0.28), (0.5, 0.5), LEAVES, (1, width, 0.5 + 0.12 * k))
    else:
        tall = 2.0 if kind == "poplar" else 0.8
        for k in range(9):
            r = spread * rng.uniform(0.5, 0.75)
            height = (k / 4 - 1.0) * 0.95
            x = (k * 0.618 % 1 * 2 - 1) * spread * 0.8 * math.sqrt(max(1.1 - height * height, 0.05)) / tall
            y = trunk + spread * tall * (1 + 0.8 * height)
            stage.quad((x - r, y - r, rng.uniform(-0.8, 0.8) * spread), (2 * r, 0, 0), (0, 2 * r, 0), VEGETATION, LEAF,
                green, outline=LEAVES, values=(0, 2 * r, 0.75 + 0.25 * height))
            stage.seed = rng.random()
    stage.blot(spread * 1.6, spread * 1.2)


def _post(stage, s, lat, height, width=0.1):
    stage.at(s, lat, facing=True)
    stage.card(0, 0, stage.thin(width), height, POLE, STEEL)
    stage.blot(0.4, 0.4)


def _lamp(stage, s, lat):
    """A street lamp whose arm reaches over the road."""
    reach = -1.8 if lat > 0 else 1.8
    _post(stage, s, lat, 6.9, 0.16)
    bar = stage.thin(0.1)
    stage.quad((0, 6.8, 0), (reach, 0.25, 0), (0, bar, 0), POLE, PLAIN, STEEL)
    stage.quad((reach * 0.8, 6.98, 0), (reach * 0.45, 0.08, 0), (0, bar * 1.6, 0), POLE, PLAIN, (0.75, 0.75, 0.7))
    stage.light(reach, 6.9, 0, (1.0, 0.72, 0.38), 0.5, reach=26.0)


def _sign(stage, s, lat):
    """A traffic sign of one of six kinds on its post: warning, ban, order, square, direction board, stop."""
    rng = stage.rng
    kind = int(rng.integers(6))
    colour = ((0.95, 0.93, 0.88), (0.95, 0.95, 0.93), (0.1, 0.3, 0.72), (0.1, 0.32, 0.7), (0.95, 0.78, 0.12),
        (0.8, 0.1, 0.1))[kind]
    width, high = ((0.95, 0.85), (0.75, 0.75), (0.75, 0.75), (0.75, 0.75), (2.0, 1.1), (0.8, 0.8))[kind]
    low = rng.uniform(2.0, 2.5)
    _post(stage, s, lat, low + high * 0.7, 0.09)
    stage.quad((-width / 2, low, -0.05), (width, 0, 0), (0, high, 0), TRAFFIC_SIGN, SIGN, colour,
        (0.5, 0.5) if kind == 0 else (0, 0), DISC if kind in (1, 2, 5) else SOLID, (kind,))


def _signals(stage, s, lat, arm=0.0):
    """A traffic light; with an arm it also hangs over the road."""
    state = int(stage.rng.integers(3))
    for x, low in ((0.0, 2.3), (arm, 4.9))[: 2 if arm else 1]:
        _post(stage, s, lat, 5.9 if arm else 3.2, 0.14)
        if x:
            bar = stage.thin(0.1)
            stage.quad((0, 5.7, 0), (x, 0.1, 0), (0, bar, 0), POLE, PLAIN, STEEL)
        stage.quad((x - 0.2, low, -0.1), (0.4, 0, 0), (0, 1.1, 0), TRAFFIC_LIGHT, SIGNAL, (0.07, 0.08, 0.07),
            values=(state,))
        stage.light(x, low + 1.1 * (5 - 2 * state) / 6, -0.12,
            ((1.0, 0.1, 0.05), (1.0, 0.6, 0.1), (0.1, 1.0, 0.4))[state], 0.2)


def _building(stage, s, lat, length, depth, floors, house=False):
    """A block or house from `lat` outwards; houses and some blocks have pitched roofs."""
    rng, right = stage.rng, lat > 0
    stage.at(s, lat)
    kind = int(rng.choice(4, p=[0.3, 0.4, 0.18, 0.12]))
    colour = (BRICKS[rng.integers(4)], PLASTERS[rng.integers(6)], PLASTERS[rng.integers(4)], (0.55, 0.6, 0.64))[kind]
    if house:
        kind = kind % 2
    floor, bay = rng.uniform(2.8, 3.4), rng.uniform(2.1, 3.2)
    a, c, high = (((0, depth) if right else (-depth, 0)), (-length / 2, length / 2),
        floors * floor + (0.0 if house else 1.0))
    values = (floor, bay, kind, float(not house and rng.random() < 0.6))
    stage.box(a, (0, high), c, BUILDING, (FACADE,) * 3, colour, values=values, top=(0.4, 0.38, 0.37))
    tile = ((0.52, 0.24, 0.17), (0.36, 0.3, 0.29), (0.3, 0.32, 0.36))[rng.integers(3)]
    if house:
        gable = rng.random() < 0.6
        stage.box((a[0] - 0.3, a[1] + 0.3), (high - 0.35, high + depth * 0.36), (c[0] - 0.3, c[1] + 0.3), BUILDING,
            (FACADE if gable else ROOF, ROOF, FACADE if gable else ROOF), colour if gable else tile,
            (depth / 2 + 0.29, 0 if gable else length * 0.3, 0 if gable else length * 0.3), values=(9, bay, kind, 0),
            sides=tile)
        stage.box((a[0] + depth * 0.35, a[0] + depth * 0.45), (high, high + depth * 0.45), (c[0] + 1, c[0] + 1.8),
            BUILDING, (MASONRY,) * 3, BRICKS[2])
    elif kind < 3 and rng.random() < 0.45:
        stage.box(a, (high, high + 2.4), c, BUILDING, (ROOF,) * 3, tile, (2.0, 0.8, 0.8))


def _run(stage, right, lat, add, start=-8.0, stop=150.0, step=6.0):
    """Calls add(s, length) for the pieces of a fence, wall or hedge along one side, straight pieces of a curve."""
    side = 1 if right else -1
    for s in np.arange(start, stop, step):
        if stage.street.clear(s, s + step):
            stage.at(s + step / 2, side * lat)
            add(step * (1 + abs(stage.street.bend) * lat) + 0.02)


def _barrier(stage, right, lat, kind, stop=150.0):
    """A fence of bars or planks, a wall or a hedge along one side."""
    rng = stage.rng
    high = rng.uniform(*{"bars": (1.1, 1.9), "planks": (1.3, 2.0), "wall": (1.2, 2.8), "hedge": (0.9, 1.8)}[kind])
    colour = {"bars": ((0.16, 0.2, 0.18), (0.75, 0.76, 0.76))[rng.integers(2)],
        "planks": ((0.5, 0.36, 0.24), (0.62, 0.6, 0.56))[rng.integers(2)],
        "wall": (*BRICKS, GREY, (0.72, 0.7, 0.66))[rng.integers(6)], "hedge": (0.36, 0.52, 0.24)}[kind]
    material = rng.integers(2)

    def piece(length):
        if kind == "wall":
            stage.box((-0.15, 0.15), (0, high), (-length / 2, length / 2), WALL, (MASONRY,) * 3, colour,
                values=(material,), top=GREY)
        elif kind == "hedge":
            for depth, top in ((0.0, high), (0.7, high + 0.15)):
                stage.quad((depth if right else -depth, 0, -length / 2), (0, 0, length), (0, top, 0), VEGETATION, LEAF,
                    colour, outline=LEAVES, values=(2, length, 0.8))
        else:
            stage.quad((0, 0, -length / 2), (0, 0, length), (0, high, 0), FENCE, PLAIN, colour,
                outline=BARS if kind == "bars" else PLANKS, values=(length, high))

    _run(stage, right, lat, piece, stop=stop)


def _blocks(stage, right, base):
    rng, street, side, s = stage.rng, stage.street, (1 if right else -1), -14.0
    tall = rng.integers(3, 7)
    while s < 170:
        length = rng.uniform(10, 22)
        if street.clear(s, s + length):
            floors, depth = max(2, int(tall + rng.integers(-1, 2))), rng.uniform(10, 14)
            _building(stage, s + length / 2, side * (base + 0.05), length, depth, floors)
            if abs(s + length / 2 - street.crossing) < 32:
                _building(stage, s + length / 2, side * (base + depth + rng.uniform(0, 4)), length, 16, floors + 1)
            s += length + (rng.uniform(2, 6) if rng.random() < 0.15 else 0.0)
        else:
            s += 2.0


def _houses(stage, right, base):
    rng, street, side, s = stage.rng, stage.street, (1 if right else -1), -10.0
    setback = rng.uniform(3.5, 7)
    while s < 150:
        length, gap = rng.uniform(8, 14), rng.uniform(3, 9)
        if street.clear(s, s + length):
            _building(stage, s + length / 2, side * (base + setback + rng.uniform(0, 1.5)), length, rng.uniform(8, 10),
                int(rng.integers(1, 4)), house=True)
            if rng.random() < 0.7:
                _tree(stage, s + length + gap / 2, side * (base + rng.uniform(1.5, 7)), rng.uniform(0.7, 1.0))
        s += length + gap
    _barrier(stage, right, base + 0.3, str(rng.choice(["bars", "planks", "wall", "hedge"])), stop=110)


def _park(stage, right, base):
    rng, side = stage.rng, (1 if right else -1)
    for s in np.arange(-2, 120, 7.0):
        for lat in (base + rng.uniform(2, 6), base + rng.uniform(8, 20)):
            if rng.random() < 0.62 and stage.street.clear(s, s):
                _tree(stage, s + rng.uniform(-3, 3), side * lat, rng.uniform(0.9, 1.4))
    if rng.random() < 0.75:
        _barrier(stage, right, base + 0.3, str(rng.choice(["bars", "hedge", "wall"])), stop=110)
    _barrier(stage, right, base + 30, "hedge", stop=130)


def _works(stage, right, base):
    rng, street, side, s = stage.rng, stage.street, (1 if right else -1), -10.0
    _barrier(stage, right, base + 0.3, str(rng.choice(["wall", "bars", "planks", "wall"])))
    while s < 150:
        length = rng.uniform(18, 34)
        if street.clear(s, s + length):
            stage.at(s + length / 2, side * (base + rng.uniform(4, 9)))
            high, a = rng.uniform(5.5, 10), ((0, 18) if right else (-18, 0))
            stage.box(a, (0, high), (-length / 2, length / 2), BUILDING, (FACADE,) * 3,
                ((0.62, 0.66, 0.7), (0.72, 0.7, 0.64), (0.45, 0.55, 0.62), (0.66, 0.42, 0.34))[rng.integers(4)],
                values=(high / 2, 4.5, 4, 0), top=(0.5, 0.5, 0.5))
        s += length + rng.uniform(3, 10)


def _rail(stage, right, base):
    """A railway beside the road: fence, track with a train, masts, and trees behind."""
    rng, side = stage.rng, (1 if right else -1)
    _barrier(stage, right, base + 0.4, str(rng.choice(["bars", "bars", "planks"])))
    track = side * (base + 4.2)
    if rng.random() < 0.9:
        colour = ((0.75, 0.12, 0.12), (0.85, 0.86, 0.86), (0.15, 0.3, 0.6), (0.95, 0.75, 0.15),
            (0.2, 0.5, 0.35))[rng.integers(5)]
        _train(stage, rng.uniform(2, 32), track, colour, int(rng.integers(2, 5)))
    for s in np.arange(rng.uniform(4, 14), 130, 24):
        _post(stage, s, side * (base + 6.6), 7.2, 0.2)
        bar = stage.thin(0.1)
        stage.quad((0, 6.4, 0), (-side * 3.0, 0.1, 0), (0, bar, 0), POLE, PLAIN, STEEL)
    for s in np.arange(0, 130, 8.0):
        _tree(stage, s + rng.uniform(-3, 3), side * (base + rng.uniform(9, 16)), rng.uniform(0.8, 1.3))


FRONTS = {"blocks": _blocks, "houses": _houses, "park": _park, "works": _works, "rail": _rail}
VEHICLES = (("car", 0.66), ("truck", 0.11), ("bus", 0.09), ("motorcycle", 0.07), ("bicycle", 0.07))


def _vehicle(stage, kind, s, lat, turn, moving=True):
    """Adds one vehicle and returns its length."""
    if kind in ("motorcycle", "bicycle"):
        _cycle(stage, s, lat, turn, MOTORCYCLE if kind == "motorcycle" else BICYCLE, moving)
        return 2.0
    {"car": _car, "truck": _truck, "bus": _bus}[kind](stage, s, lat, turn, moving)
    return {"car": 5.0, "truck": 9.5, "bus": 12.0}[kind]


def _traffic(stage):
    """Vehicles in the lanes (right-hand traffic), parked ones, and a tram where the street has rails."""
    rng, street = stage.rng, stage.street
    names, weights = zip(*VEHICLES, strict=True)
    density = rng.uniform(0.2, 0.75)
    for lane in range(-street.lanes, street.lanes):
        centre, oncoming = (lane + 0.5) * LANE, lane < 0
        s = 11.0 if abs(centre - street.ego) < 1.2 else rng.uniform(3, 12)
        if street.tram and lane in (-1, 0) and rng.random() < 0.75:
            start = s + rng.uniform(3, 18)
            _train(stage, start, centre, PAINTS[(0, 7, 1, 8)[rng.integers(4)]], 2, car=11.0, width=2.4)
            continue
        while s < 110:
            if rng.random() < density:
                kind = names[rng.choice(5, p=weights)]
                shift = 0.8 if kind in ("motorcycle", "bicycle") else rng.uniform(-0.2, 0.2)
                long = {"truck": 3.0, "bus": 4.0}.get(kind, 0.0)
                s += long + _vehicle(stage, kind, s + 2 + long, centre + (-shift if oncoming else shift),
                    math.pi * oncoming)
            s += rng.uniform(5, 16)
    for side in (-1, 1) if street.parking else ():
        filled = rng.uniform(0.3, 0.9)
        for s in np.arange(rng.uniform(1, 7), 90, 6.4):
            if rng.random() < filled and street.clear(s - 3, s + 8):
                _vehicle(stage, "motorcycle" if rng.random() < 0.12 else "car", s, side * (street.edge - 1.1),
                    math.pi * (side < 0), False)


def _furniture(stage):
    """Lamps, street trees, signs, traffic lights, bollards and parked cycles along the kerbs."""
    rng, street = stage.rng, stage.street
    start, trees = rng.uniform(4, 16), list(rng.random(2) < {"canyon": 0.35, "avenue": 0.95}.get(street.kind, 0.3))
    for right in (False, True):
        side, curb = (1 if right else -1), street.edge + max(street.verge[right] / 2, 0.55)
        for k, s in enumerate(np.arange(start + 11 * right, 140, 22)):
            if street.clear(s, s):
                _lamp(stage, s, side * (street.edge + 0.5))
            if trees[right] and street.clear(s + 3, s + 17):
                for shift in (5.5, 14.5):
                    _tree(stage, s + shift, side * curb, rng.uniform(0.75, 1.05))
            if k < 3 and rng.random() < 0.65:
                _sign(stage, s + rng.uniform(2, 9), side * (street.edge + 0.6))
        for s in np.arange(rng.uniform(3, 10), 60, 9.0):
            if rng.random() < 0.3:
                for k in range(int(rng.integers(1, 5))):
                    label = BICYCLE if rng.random() < 0.75 else MOTORCYCLE
                    _cycle(stage, s + 0.9 * k, side * (street.edge + street.verge[right] + 0.75), rng.uniform(0.9, 1.3),
                        label, False)
            elif rng.random() < 0.2:
                for k in range(3):
                    _post(stage, s + 1.6 * k, side * (street.edge + 0.4), 0.95, 0.14)
        if street.crossing > 0:
            _signals(stage, street.crossing - CROSS - 2.0, side * (street.edge + 0.6),
                -side * min(street.edge * 0.55, 4.5) * (rng.random() < 0.45))
    if street.crossing < 0 and rng.random() < 0.5:
        _signals(stage, rng.uniform(14, 35), street.edge + 0.6)


def _people(stage):
    """Walkers on the sidewalks and the zebra crossing, and a cyclist or two beside the lanes."""
    rng, street = stage.rng, stage.street
    for _ in range(int(rng.integers(3, 15))):
        right = rng.random() < 0.5
        lat = street.edge + street.verge[right] + rng.uniform(0.5, street.walk[right] - 0.3)
        s = rng.uniform(5, 22) if rng.random() < 0.5 else rng.uniform(15, 65)
        for k in range(1 + (rng.random() < 0.3)):
            _person(stage, s + 0.2 * k, (1 if right else -1) * (lat + 0.6 * k - 0.3))
    if street.crossing > 0:
        zebra = street.crossing - CROSS - 1.9
        for _ in range(int(rng.integers(0, 4))):
            _person(stage, zebra + rng.uniform(-1, 1), rng.uniform(-1, 1) * street.edge)
        if rng.random() < 0.3:
            _cycle(stage, street.crossing + rng.uniform(-2, 2), rng.uniform(-6, 6), 1.5, BICYCLE, True)
    if rng.random() < 0.4:
        kind = BICYCLE if rng.random() < 0.65 else MOTORCYCLE
        _cycle(stage, rng.uniform(7, 24), street.lanes * LANE - 0.4, rng.uniform(-0.08, 0.08), kind, True)


def _backdrop(stage):
    """Woods and the skyline beyond the street."""
    rng = stage.rng
    town = stage.street.kind in ("canyon", "works")
    for x in np.arange(-420, 420, 22.0):
        stage.frame, stage.seed, stage.facing = (x, rng.uniform(205, 225), 1.0, 0.0), rng.random(), True
        high = rng.uniform(9, 15)
        stage.quad((-14, 0, 0), (28, 0, 0), (0, high, 0), VEGETATION, LEAF, (0.24, 0.36, 0.2), outline=LEAVES,
            values=(2, 28, 0.8))
        if rng.random() < (0.8 if town else 0.35):
            stage.box((-9, 9), (0, rng.uniform(10, 28) * (1 + town)), (-6, 6), BUILDING, (FACADE,) * 3,
                PLASTERS[rng.integers(6)], values=(3.2, 2.8, rng.integers(4), 0))


def _compose(seed: int, index: int) -> _Stage:
    rng = _stream(seed, index, 0)
    stage = _Stage(_Street.draw(rng), rng)
    for right in (False, True):
        FRONTS[stage.street.fronts[right]](stage, right, stage.street.base(right))
    for add in (_traffic, _furniture, _people, _backdrop):
        add(stage)
    return stage


# ---------------------------------------------------------------- noise and anti-aliased patterns


@lru_cache
def _tile(slope: float) -> ndarray:
    """Periodic fractal noise (512 * 512,), float32 in 0..1; each octave is `slope` times the one before."""
    rng, tile, size = _stream(7, int(slope * 100)), np.zeros((512, 512)), 512
    for octave in range(2, 10):
        cells = 2**octave
        at = np.arange(size) * (cells / size)
        low = at.astype(np.int64)
        t = at - low
        t, high = t * t * (3 - 2 * t), (low + 1) % cells
        grid = rng.random((cells, cells))
        rows = grid[low] * (1 - t[:, None]) + grid[high] * t[:, None]
        tile += slope**octave * (rows[:, low] * (1 - t) + rows[:, high] * t)
    ordered = np.sort(tile, axis=None)
    low, high = ordered[len(ordered) // 100], ordered[-len(ordered) // 100]
    return np.clip((tile - low) / (high - low), 0, 1).astype(np.float32).ravel()


def _noise(x: ndarray, y: ndarray, slope: float = 0.8) -> ndarray:
    """Noise at (x, y), one texel a unit; steep slopes are smooth, slope 1 is rough."""
    return _tile(slope).take((np.floor(y).astype(np.int32) & 511) * 512 + (np.floor(x).astype(np.int32) & 511))


def _hash(i: ndarray, j: ndarray, seed: ndarray) -> ndarray:
    """A random number in 0..1 for each pair of whole numbers and seed in 0..1."""
    i, j, seed = (np.atleast_1d(q).astype(np.int64) for q in (i, j, np.multiply(seed, 1048576)))
    k = (i * 374761393 + j * 668265263 + seed * 1274126177).astype(np.uint32)
    k = (k ^ (k >> 13)) * np.uint32(1274126177)
    return ((k ^ (k >> 16)) & 65535).astype(np.float32) / 65536


def _stripes(x: ndarray, period, width, foot: ndarray) -> ndarray:
    """Share of the footprint around x that stripes [k period, k period + width] cover: an exact box filter."""

    def covered(at):
        cell = np.floor(at / period)
        return cell * width + np.minimum(at - cell * period, width)

    return (covered(x + foot / 2) - covered(x - foot / 2)) / foot


def _band(x: ndarray, low, high, foot: ndarray) -> ndarray:
    """Share of the footprint around x inside low..high."""
    return np.clip((np.minimum(high, x + foot / 2) - np.maximum(low, x - foot / 2)) / foot, 0, 1)


def _mix(colour: ndarray, other, share: ndarray) -> ndarray:
    return colour + (np.asarray(other, np.float32) - colour) * share[:, None]


# ---------------------------------------------------------------- visibility


def _outline(kind: int, u: ndarray, v: ndarray, row: ndarray) -> ndarray:
    """Which points (u, v) in 0..1 of a face its outline holds."""
    x, y = 2 * u - 1, 2 * v - 1
    if kind == DISC:
        return x * x + y * y <= 1
    if kind == RING:
        r = x * x + y * y
        spoke = np.abs(np.abs(x) - np.abs(y)) < 0.06
        return (r <= 1) & ((r > 0.62) | spoke | (np.abs(x) < 0.04) | (np.abs(y) < 0.04))
    if kind == LEAVES:
        shape, size, _ = row[21:24]
        leaf = _noise(u * size * 11 + row[25] * 512, v * 22 * (1 if shape == 2 else size / 2) + row[25] * 99, 0.9)
        if shape == 2:
            return v < 0.72 + 0.5 * (leaf - 0.3)
        return (x * x + y * y if shape == 0 else np.abs(x) * 0.8 + 0.2) < 0.35 + 1.0 * leaf
    length, high = row[21:23]
    if kind == BARS:
        bar = (u * length * 6) % 1 < 0.24
        return bar & (v < 0.97) | (np.abs(v - 0.12) < 0.03) | (np.abs(v - 0.9) < 0.035) | ((u * length / 3) % 1 < 0.035)
    return ((u * length * 5.5) % 1 < 0.93) & (v < 0.93 + 0.07 * (np.abs((u * length * 5.5) % 1 - 0.5) < 0.3))


def _forms(p: ndarray, u: ndarray, v: ndarray) -> tuple[ndarray, ndarray]:
    """Linear forms (n, 3, 3) of 1/z, u/z and v/z over rays (x, y, 1), and (n,) > 0 where a face shows its outside."""
    rows = np.stack([np.cross(u, v), np.cross(v, p), np.cross(p, u)], axis=1)
    det = (p * rows[:, 0]).sum(1)
    safe = np.where(np.abs(det) < 1e-9, np.inf, det)
    return rows / safe[:, None, None], det


def _placed(rows: ndarray, height: float) -> list[ndarray]:
    """P, U and V (n, 3) in camera coordinates of rows that start with frame, P, U, V."""
    x, z, cos, sin = rows[:, :4].T
    p, u, v = (np.stack([q[:, 0] * cos + q[:, 2] * sin, q[:, 1], q[:, 2] * cos - q[:, 0] * sin], axis=1)
        for q in (rows[:, 4:7], rows[:, 7:10], rows[:, 10:13]))
    return [p + np.stack([x, np.full_like(x, -height), z], axis=1), u, v]


class _View:
    """What a camera sees of a stage: for each pixel the face, and from it label, depth and face coordinates."""

    def __init__(self, stage: _Stage, size: tuple[int, int]):
        street, (h, w) = stage.street, size
        self.street, self.size, self.focal = street, size, street.focal * h
        self.dx = ((np.arange(w) + 0.5 - w / 2) / self.focal).astype(np.float32)
        self.dy = ((street.horizon * h - np.arange(h) - 0.5) / self.focal).astype(np.float32)
        self.rows, self.lights = np.array(stage.faces), np.array(stage.lights).reshape(-1, 8)
        self.p, self.u, self.v = _placed(self.rows, street.height)
        self.blots = _placed(np.array(stage.blots), street.height)
        self.forms, det = _forms(self.p, self.u, self.v)
        self._resolve((det > 0) | (self.rows[:, 26] == 0))
        self._ground()

    def windows(self, p, u, v):
        """Pixel ranges (n, 4) x0 x1 y0 y1 that hold each face; empty where it is out of sight."""
        h, w = self.size
        corners = np.stack([p, p + u, p + u + v, p + v], axis=1)  # (n, 4, 3)
        z = corners[..., 2:]
        step = np.roll(corners, -1, axis=1) - corners
        share = (NEAR - z) / np.where(
            step[..., 2:] == 0, np.inf, step[..., 2:]
        )  # of the edge, where it meets the near plane
        points = np.concatenate([corners, corners + share * step], axis=1)  # (n, 8, 3)
        seen = np.concatenate([z >= NEAR, (share > 0) & (share < 1)], axis=1)[..., 0]
        depth = np.where(seen, points[..., 2], 1)
        col = points[..., 0] / depth * self.focal + w / 2
        row = self.street.horizon * h - points[..., 1] / depth * self.focal
        sides = [np.where(seen, q, far).min(1) if far > 0 else np.where(seen, q, far).max(1) + 1 for q in (col, row)
            for far in (1e6, -1e6)]
        box = np.stack(sides, axis=1)
        return np.clip(box, 0, [w, w, h, h]).astype(np.int64)

    def cover(self, form, box, row, limit=0.0):
        """Where in its window a face lies with 1/z above `limit` (bool), its 1/z, u/z and v/z; None if nowhere."""
        x0, x1, y0, y1 = box
        dx, dy = self.dx[None, x0:x1], self.dy[y0:y1, None]
        (a, b, c), (d, e, f), (g, k, m) = form
        near = a * dx + (b * dy + c)
        inside = near > limit
        if not inside.any():
            return None
        u, v = d * dx + (e * dy + f), g * dx + (k * dy + m)
        inside &= (v >= 0) & (v <= near) & (near < 1 / NEAR)
        inside &= (u >= row[13] * v) & (u <= near - row[14] * v)
        if row[17]:
            with np.errstate(all="ignore"):
                inside &= _outline(int(row[17]), u / near, v / near, row)
        return inside, near, u, v

    def _resolve(self, shown):
        h, w = self.size
        best = np.repeat(np.maximum(self.dy / -self.street.height, 0)[:, None], w, axis=1)  # 1/z of the ground
        self.face = np.where(best > 0, -1, -2).astype(np.int32)
        boxes = self.windows(self.p, self.u, self.v)
        shown = shown & (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
        order = np.flatnonzero(shown)
        order = order[np.argsort(self.p[order, 2], kind="stable")]
        forms = self.forms.astype(np.float32).tolist()
        for k in order.tolist():
            x0, x1, y0, y1 = boxes[k].tolist()
            window = best[y0:y1, x0:x1]
            covered = self.cover(forms[k], (x0, x1, y0, y1), self.rows[k], window)
            if covered:
                np.copyto(window, covered[1], where=covered[0])
                self.face[y0:y1, x0:x1][covered[0]] = k
        with np.errstate(divide="ignore"):
            self.depth = np.where(best > 0, 1 / best, np.float32(np.inf))

    def _ground(self):
        """Labels; of the ground's pixels also road coordinates, footprints and distance beyond the road's edge."""
        street = self.street
        self.ground = np.flatnonzero(self.face == -1)
        i, j = np.divmod(self.ground, self.size[1])
        z = self.depth.ravel()[self.ground]
        x = z * self.dx[j]
        cos, sin = math.cos(street.yaw), math.sin(street.yaw)
        x, s = x * cos + z * sin + street.ego, z * cos - x * sin
        slope = street.bend * s
        norm = np.sqrt(1 + slope * slope)
        self.lat = (x - slope * s / 2) / norm
        self.s = s + self.lat * slope / norm
        self.foot_lat, self.foot_s = z / self.focal, z * z / (self.focal * street.height)
        right = self.lat > 0
        self.beyond = np.abs(self.lat) - street.edge
        verge, walk = (np.where(right, pair[1], pair[0]) for pair in (street.verge, street.walk))
        paved = street.kind == "canyon"
        zone = np.where((self.beyond < KERB) | (self.beyond >= verge) & (self.beyond < verge + walk) | paved, SIDEWALK,
            TERRAIN)
        across = np.abs(self.s - street.crossing)
        zone = np.where((across < CROSS + 2.2) & (self.beyond > 0), SIDEWALK, zone)
        zone = np.where((self.beyond < 0) | (across < CROSS), ROAD, zone)
        table = np.concatenate([self.rows[:, 15], [SKY, ROAD]]).astype(np.uint8)
        self.label = table[self.face]
        self.label.ravel()[self.ground] = zone
        self.zone = zone


# ---------------------------------------------------------------- textures of one material: colour, gloss, glow


def _facade(px, look):
    floor, bay, kind, shop = px.values
    bay = px.width / np.maximum(np.rint(px.width / bay), 1)
    kind = kind.astype(np.int64)
    wide, high, sill = (np.array(t, np.float32)[kind] for t in ((0.44, 0.5, 0.4, 0.86, 0.5),
        (0.52, 0.56, 0.5, 0.6, 0.3), (0.26, 0.24, 0.28, 0.22, 0.5)))
    row, col = np.floor(px.v / floor), np.floor(px.u / bay)
    street_floor = (px.v < 3.3) & (shop > 0)
    key = _hash(col, row, px.seed)
    body = (px.height - px.v > 0.5) & ~street_floor & (px.v < np.floor(px.height / floor) * floor)
    u, v = px.u - bay * (1 - wide) / 2, px.v - floor * sill
    pane = _stripes(u, bay, bay * wide, px.foot_u) * _stripes(v, floor, floor * high, px.foot_v) * body
    frame = (_stripes(u + 0.12, bay, bay * wide + 0.24, px.foot_u) * _stripes(v + 0.14, floor, floor * high + 0.24,
        px.foot_v) * body)
    grain = look.grain * (_noise(px.u * 24 + px.seed * 512, px.v * 24) - 0.5) / (1 + 6 * px.foot_v)
    stain = look.grain * (_noise(px.u * 3 + px.seed * 300, px.v * 5, 0.6) - 0.5)
    tone = 1 + 0.22 * grain + 0.22 * stain - 0.25 * np.clip(1 - px.v / 1.2, 0, 1) - 0.12 * (px.height - px.v < 0.45)
    brick = (kind == 0) * _stripes(px.v, 0.24, 0.05, px.foot_v)
    course = _stripes(px.v + 0.1, floor, 0.16, px.foot_v) * (kind < 3) * ~street_floor
    steel = (kind == 4) * (_stripes(px.u, 0.7, 0.25, px.foot_u) - 0.3)
    tone = (tone + 0.2 * brick + 0.12 * course - 0.2 * steel + 0.1 * (kind == 0)
        * (_hash(px.u * 4, px.v * 4.2, px.seed) - 0.5) / (1 + 9 * px.foot_v))
    colour = px.colour * tone[:, None]
    colour = _mix(colour, (0.86, 0.85, 0.82), np.maximum(frame - pane, 0) * 0.75 * (kind < 3))
    depth = np.clip((px.v / floor - row - sill) / high, 0, 1)  # 0 at the sill of a window, 1 at its top
    curtain = (_hash(row, col, px.seed * 0.7) < 0.35) & (depth > 0.35)
    cross = _stripes(u - bay * wide / 2 + 0.04, bay, 0.08, px.foot_u) * (kind < 3)
    glass = np.where(curtain, 0.5, 0.13 + 0.12 * key) * (1 - 0.5 * (depth > 0.88))
    glass = glass[:, None] * np.array((0.85, 1.0, 1.12), np.float32)
    balcony = (_hash(col, 5, px.seed) < 0.3) & (kind < 3) & (row > 0) & body
    rail = (balcony * _band(px.v / floor - row, 0.0, 0.34, px.foot_v / floor)
        * (0.35 + 0.65 * _stripes(px.u, 0.16, 0.05, px.foot_u)))
    colour = _mix(colour, _mix(glass, (0.75, 0.74, 0.72), cross), pane)
    colour = _mix(colour, (0.2, 0.2, 0.22), rail)
    lit = pane * (1 - rail) * (_hash(col * 3 + 1, row, px.seed) < 0.36) * (0.35 + 0.65 * key)
    gloss = pane * (1 - rail) * ~curtain * (0.25 + 0.5 * key) * (0.35 + 0.65 * depth)
    return _shops(px, street_floor, colour, gloss, lit)


def _shops(px, where, colour, gloss, lit):
    """Shop fronts in the lowest 3.3 m: windows on a plinth, doors and a coloured fascia with lettering."""
    unit = px.width / np.maximum(np.rint(px.width / 5.5), 1)
    cell = np.floor(px.u / unit)
    key = _hash(cell, 9, px.seed)
    pane = (where * _stripes(px.u - 0.3, unit, unit - 0.6, px.foot_u) * _band(px.v, 0.5, 2.5, px.foot_v)
        * (1 - 0.8 * _stripes(px.u, unit / 3, 0.1, px.foot_u)))
    fascia = where * _band(px.v, 2.6, 3.25, px.foot_v) * _stripes(px.u - 0.15, unit, unit - 0.3, px.foot_u)
    paint = np.array(PAINTS, np.float32)[(key * 11.99).astype(np.int64)]
    colour = colour * (1 - 0.2 * where)[:, None]
    colour = colour + (paint * 0.9 - colour) * fascia[:, None]
    letters = (fascia * _band(px.v, 2.78, 3.07, px.foot_v) * _stripes(px.u, 0.31, 0.19, px.foot_u)
        * (np.abs(px.u / unit - cell - 0.5) < 0.3))
    colour = _mix(colour, (0.92, 0.9, 0.82), letters)
    goods = 0.12 + 0.25 * _noise(px.u * 9 + px.seed * 99, px.v * 9, 0.8)
    colour = colour + (goods[:, None] * np.array((1.0, 0.95, 0.9), np.float32) - colour) * pane[:, None]
    return colour, gloss * ~where + 0.4 * pane * (px.v / 3.3), lit * ~where + (pane * 0.9 + letters * 0.8) * (key > 0.3)


def _end(px, look):
    """Front or rear of a vehicle: bumper, lamps, number plate; on buses a window above."""
    front, moving, window, _ = px.values
    q, t = np.abs(2 * px.u / px.width - 1), px.v / px.height
    tall = window > 0
    low, high = np.where(tall, 0.12, 0.5), np.where(tall, 0.22, 0.8)
    lamp = (q > 0.62) & (q < 0.94) & (t > low) & (t < high)
    glass = tall & (q < 0.9) & (t > np.where(front > 0, 0.36, 0.45)) & (t < 0.84)
    board = tall & (q < 0.6) & (t > 0.88) & (t < 0.97)
    bumper = t < np.where(tall, 0.08, 0.3)
    plate = (q < 0.28) & (t > np.where(tall, 0.1, 0.34)) & (t < np.where(tall, 0.17, 0.56))
    grille = (front > 0) & (q < 0.55) & (t > np.where(tall, 0.2, 0.6)) & (t < np.where(tall, 0.28, 0.84))
    colour = px.colour * (1.04 - 0.12 * (t < 0.5))[:, None]
    lamp_colour = np.where(front[:, None] > 0, (0.92, 0.92, 0.88), (0.72, 0.06, 0.05)).astype(np.float32)
    for where, paint in ((bumper, (0.16, 0.16, 0.17)), (grille, (0.1, 0.1, 0.1)), (plate, (0.85, 0.82, 0.6)),
            (glass, (0.1, 0.12, 0.14)), (board, (0.08, 0.08, 0.05))):
        colour = _mix(colour, paint, where)
    colour = colour + (lamp_colour - colour) * lamp[:, None]
    colour = _mix(colour, (1.0, 0.6, 0.15), board & (_hash(px.u * 9, px.v * 9, px.seed) > 0.45))
    return colour, 0.06 + 0.25 * glass * t, (lamp * 1.5 + glass * 0.25 + board) * moving


def _coach(px, look):
    """Side of a bus or train: a band of windows, doors, skirt and stripe."""
    t = px.v / px.height
    pillar = _stripes(px.u, 1.7, 0.16, px.foot_u)
    glass = _band(t, 0.46, 0.84, px.foot_v / px.height) * (1 - pillar)
    door = (np.abs((px.u + 1.5) % 5.1 - 1.0) < 0.62) & (t > 0.04) & (t < 0.84)
    glass = np.where(door, 0.8 * (t > 0.12) * (np.abs((px.u + 1.5) % 5.1 - 1.0) > 0.06), glass)
    colour = px.colour * (1 - 0.45 * (t < 0.1))[:, None]
    colour = _mix(colour, (0.88, 0.88, 0.88), ((t > 0.2) & (t < 0.3)) * (px.seed > 0.5) * 0.85)
    colour = _mix(colour, (0.1, 0.12, 0.14), glass)
    return colour, 0.1 + glass * (0.2 + 0.3 * t), glass * 0.8 * px.values[1]


def _cabin(px, look):
    """Greenhouse of a car: glass in a frame of body colour; coordinates are 0..1 between the slanted edges."""
    t = px.v / px.height
    q = (px.u / px.width - px.taper[0] * t) / np.maximum(1 - (px.taper[0] + px.taper[1]) * t, 0.05)
    glass = (t > 0.1) & (t < 0.9) & (np.abs(q - 0.5) < 0.46) & ((np.abs(q - 0.5) > 0.025) | (px.width < 1.8))
    colour = _mix(px.colour, (0.09, 0.11, 0.13), glass)
    return colour, 0.05 + 0.24 * glass * t, 0


def _leaf(px, look):
    """Leaves: clumps of light and dark; shape 0 and 1 are crowns, 2 a hedge."""
    shape, size, shade, _ = px.values
    clump = _noise(px.u * 6 + px.seed * 512, px.v * 6, 0.7)
    leaf = _noise(px.u * 22 + px.seed * 512, px.v * 22, 1.0)
    tone = shade * (0.5 + 0.65 * clump + look.grain * 0.95 * (leaf - 0.5) / (1 + 2 * px.foot_v))
    tone = tone * np.where(shape == 2, 0.6 + 0.4 * px.v / px.height, 0.72 + 0.35 * px.v / np.maximum(px.height, 0.1))
    warm = 1 + 0.25 * (clump - 0.5)
    return px.colour * tone[:, None] * np.stack([warm, np.ones_like(warm), 2 - 1.2 * warm], axis=1), 0, 0


def _masonry(px, look):
    """Brick or concrete of walls, with a coping on top."""
    stone = px.values[0] > 0
    joints = np.where(stone, _stripes(px.v, 0.9, 0.03, px.foot_v) + _stripes(px.u, 2.2, 0.05, px.foot_u),
        _stripes(px.v, 0.2, 0.04, px.foot_v))
    block = _hash(px.u * np.where(stone, 0.45, 3.0), px.v * np.where(stone, 1.1, 5.0), px.seed) - 0.5
    tone = (1 + 0.2 * block / (1 + 6 * px.foot_v) + look.grain * 0.35 * (_noise(px.u * 7 + px.seed * 99, px.v * 7, 0.8)
        - 0.5))
    tone = (tone - 0.22 * np.clip(1 - px.v / 0.5, 0, 1) + np.where(stone, -0.3, 0.12) * joints + 0.25
        * (px.height - px.v < 0.14))
    return px.colour * tone[:, None], 0, 0


def _sign_face(px, look):
    """Face of a traffic sign: border, ground and symbol."""
    kind, x, y = px.values[0].astype(np.int64), 2 * px.u / px.width - 1, 2 * px.v / px.height - 1
    disc, square = np.sqrt(x * x + y * y), np.maximum(np.abs(x), np.abs(y))
    slant = np.maximum(-y, 1 - 1.6 * ((1 - y) / 2 - np.abs(x)))
    edge = np.choose(kind, [slant, disc, disc, square, square, disc])
    red, white = (0.82, 0.08, 0.08), (0.95, 0.95, 0.93)
    border = np.array((red, red, white, white, (0.1, 0.1, 0.1), white), np.float32)[kind]
    symbol = np.array(((0.1, 0.1, 0.1), (0.1, 0.1, 0.1), white, white, (0.1, 0.1, 0.1), white), np.float32)[kind]
    rim = edge > np.array((0.7, 0.68, 0.88, 0.88, 0.93, 0.86), np.float32)[kind]
    glyph = np.where(kind == 4, (np.abs(np.abs(y) - 0.4) < 0.16) & (np.abs(x) < 0.7)
        & (_hash(x * 9, y * 2, px.seed) > 0.3), np.where(kind == 5, (np.abs(y) < 0.2) & (np.abs(x) < 0.65),
        (np.abs(x) < 0.16) & (np.abs(y + 0.2 * (kind == 0)) < 0.42)))
    colour = np.where(rim[:, None], border, np.where(glyph[:, None], symbol, px.colour))
    return colour, 0.05, 0.12


def _signal(px, look):
    """Housing of a traffic light and its three lamps, one of them lit."""
    x, t = 2 * px.u / px.width - 1, px.v / px.height * 3
    k = np.clip(np.floor(t), 0, 2)
    inside = (x / 0.75) ** 2 + ((t - k - 0.5) / 0.4) ** 2 < 1
    on = inside & (k == 2 - px.values[0])
    lamp = np.array(((0.2, 1.0, 0.5), (1.0, 0.7, 0.15), (1.0, 0.15, 0.1)), np.float32)[k.astype(np.int64)]
    colour = _mix(px.colour, (0.03, 0.03, 0.03), inside) * (1 - on[:, None]) + lamp * on[:, None]
    return colour, 0, 3.0 * on


def _plain(px, look):
    tone = 1 + look.grain * 0.12 * (_noise(px.u * 9 + px.seed * 99, px.v * 9) - 0.5)
    return px.colour * tone[:, None], 0.06, 0


def _cargo(px, look):
    """Side of a truck's box: panels and a coloured field."""
    t, q = px.v / px.height, px.u / px.width
    field = (np.abs(t - 0.55) < 0.2) & (np.abs(q - 0.5) < 0.34) & (px.seed > 0.4)
    other = np.array(PAINTS, np.float32)[(px.seed * 11.9).astype(np.int64)]
    colour = px.colour * (1 - 0.25 * _stripes(px.u, 1.2, 0.05, px.foot_u) - 0.2 * (t < 0.05))[:, None]
    return colour + (other - colour) * (0.8 * field)[:, None], 0.06, 0


def _wheel(px, look):
    r = (2 * px.u / px.width - 1) ** 2 + (2 * px.v / px.height - 1) ** 2
    return _mix(px.colour, (0.55, 0.56, 0.58), (r < 0.36) * 0.9), 0.05, 0


def _roof(px, look):
    tone = (1 - 0.3 * _stripes(px.v, 0.4, 0.1, px.foot_v) + 0.3 * look.grain
        * (_noise(px.u * 6 + px.seed * 99, px.v * 6) - 0.5))
    return px.colour * tone[:, None], 0, 0


TEXTURES = {PLAIN: _plain, ROUND: _plain, LEAF: _leaf, FACADE: _facade, ROOF: _roof, CABIN: _cabin, END: _end,
    COACH: _coach, CARGO: _cargo, WHEEL: _wheel, MASONRY: _masonry, SIGN: _sign_face, SIGNAL: _signal}


def _markings(view) -> ndarray:
    """Coverage 0..1 of the ground's pixels by white paint."""
    street, lat, s, foot_lat, foot_s = view.street, view.lat, view.s, view.foot_lat, view.foot_s
    dashes = _stripes(s, 9.0, 3.2, foot_s)
    if street.lanes == 1:
        paint = _band(lat, -0.07, 0.07, foot_lat) * (dashes if street.bend == 0 else 1.0)
    else:
        paint = _band(np.abs(lat), 0.09, 0.21, foot_lat)
        paint = paint + _band(np.abs(lat), LANE - 0.07, LANE + 0.07, foot_lat) * dashes
    line = street.lanes * LANE + 0.15
    paint = paint + _band(np.abs(lat), line - 0.06, line + 0.06, foot_lat) * (_stripes(s, 2.0, 1.0, foot_s)
        if street.parking else 1.0)
    inside, ahead = np.abs(lat) < street.edge, street.crossing - CROSS
    junction = _band(np.abs(s - street.crossing), -1.0, CROSS + 5.2, foot_s)
    bars = _stripes(lat + 0.25, 1.0, 0.5, foot_lat) * inside
    zebra = bars * (_band(s, ahead - 3.4, ahead - 0.6, foot_s) + _band(s, street.crossing + CROSS + 0.6,
        street.crossing + CROSS + 3.4, foot_s))
    stop = _band(s, ahead - 4.9, ahead - 4.4, foot_s) * (lat > 0) * inside
    return np.clip(paint * inside * (1 - junction) + zebra + stop, 0, 1)


def _ground_colour(view, look) -> ndarray:
    """Colour (n, 3) of the ground's pixels: asphalt with markings, slabs with kerbs, grass, gravel and rails."""
    street, lat, s, foot, zone = view.street, view.lat, view.s, view.foot_s, view.zone
    fine = look.grain * (_noise(s * 40, lat * 40, 1.0) - 0.5) / (1 + 12 * foot)
    mid = look.grain * (_noise(s * 9 + 77, lat * 9, 0.9) - 0.5) / (1 + 1.5 * foot)
    broad = _noise(s * 1.3, lat * 4, 0.65) - 0.5
    lane = np.abs((np.abs(lat) % LANE) - LANE / 2)
    patch = _hash(np.floor(s / 7.3), np.floor(lat / 2.3), 0.3)
    tone = (1 + 0.5 * fine + 0.25 * mid + 0.25 * broad + 0.06 * (np.abs(lane - 0.8) < 0.3) - 0.12 * (patch < 0.12)
        + 0.08 * (patch > 0.92))
    tone = tone - 0.2 * _band(view.beyond, -0.35, 0.0, view.foot_lat)
    asphalt = np.array((0.345, 0.345, 0.355), np.float32) * tone[:, None]
    asphalt = _mix(asphalt, (0.86, 0.86, 0.83), _markings(view) * np.clip(0.9 + 0.6 * mid + 0.4 * broad, 0.4, 1.0))
    if street.tram:
        rails = _band(np.abs(np.abs(np.abs(lat) - LANE / 2) - 0.72), -0.1, 0.05, view.foot_lat)
        asphalt = _mix(asphalt, (0.5, 0.52, 0.55), rails * (view.beyond < 0) * (np.abs(lat) < LANE))
    joint = np.maximum(_stripes(s, 0.9, 0.035, foot), _stripes(lat, 0.6, 0.035, view.foot_lat))
    slab = _hash(np.floor(s / 0.9), np.floor(lat / 0.6), 0.6) - 0.5
    tone = 1 + 0.13 * slab / (1 + foot) + 0.25 * mid + 0.3 * fine + 0.2 * broad - 0.25 * joint
    slabs = np.array((0.6, 0.585, 0.56), np.float32) * tone[:, None]
    slabs = _mix(slabs, (0.72, 0.71, 0.69), (view.beyond < KERB) * 0.8)
    clump = _noise(s * 3, lat * 7, 0.75)
    grass = np.array((0.36, 0.52, 0.2), np.float32) * (0.7 + 0.55 * clump + 0.7 * fine + 0.4 * mid)[:, None]
    bare = 0.55 if street.kind in ("works", "railway") else 0.2
    grass = _mix(grass, (0.46, 0.4, 0.3), np.clip((broad + 0.5) * 2.2 - 1.5 + bare, 0, 1) * 0.8)
    if "rail" in street.fronts:
        grass = _track(view, grass, fine, street.fronts.index("rail"))
    return np.where((zone == ROAD)[:, None], asphalt, np.where((zone == SIDEWALK)[:, None], slabs, grass))


def _track(view, colour, fine, right):
    """Gravel bed, sleepers and rails of a railway on one side."""
    off = np.abs(view.lat - (1 if right else -1) * (view.street.base(bool(right)) + 4.2))
    colour = _mix(colour, (0.42, 0.4, 0.38), (off < 2.4) * np.clip(0.85 + fine, 0, 1))
    colour = _mix(colour, (0.3, 0.26, 0.23), (off < 1.25) * _stripes(view.s, 0.65, 0.26, view.foot_s))
    return _mix(colour, (0.66, 0.64, 0.62), _band(np.abs(off - 0.72), -0.1, 0.06, view.foot_lat))


class _Surface:
    """Colour, gloss, glow (n, ...) and normals of every pixel of a view in one style's textures."""

    def __init__(self, view: _View, look: _Look):
        h, w = view.size
        self.colour = np.zeros((h * w, 3), np.float32)
        self.gloss, self.glow = np.zeros(h * w, np.float32), np.zeros(h * w, np.float32)
        self.normal = np.zeros((h * w, 3), np.float32)
        self.normal[:, 1] = 1.0
        self.colour[view.ground] = _ground_colour(view, look)
        face = view.face.ravel()
        material = np.where(face >= 0, view.rows[:, 16].astype(np.int8)[face], -1)
        width, height = (np.sqrt((q * q).sum(1)) for q in (view.u, view.v))
        normals = view.forms[:, 0] / np.sqrt((view.forms[:, 0] ** 2).sum(1))[:, None].clip(1e-12)
        normals = normals * -np.sign((normals * view.p).sum(1))[:, None]
        rows, forms = view.rows.astype(np.float32), view.forms.astype(np.float32)
        for kind in np.unique(material[material >= 0]):
            where = np.flatnonzero(material == kind)
            px = self._pixels(view, where, face[where], rows, forms, width, height)
            colour, gloss, glow = TEXTURES[kind](px, look)
            self.colour[where], self.gloss[where], self.glow[where] = colour, gloss, glow
            normal = normals[face[where]].astype(np.float32)
            if kind in (ROUND, LEAF):
                normal = self._rounded(px, normal, kind == LEAF)
            self.normal[where] = normal

    @staticmethod
    def _pixels(view, where, face, rows, forms, width, height):
        """Face coordinates in metres, footprints and parameters of the pixels `where`."""
        i, j = np.divmod(where, view.size[1])
        form, row, z = forms[face], rows[face], view.depth.ravel()[where]
        dx, dy = view.dx[j], view.dy[i]
        u = (form[:, 1, 0] * dx + form[:, 1, 1] * dy + form[:, 1, 2]) * z
        v = (form[:, 2, 0] * dx + form[:, 2, 1] * dy + form[:, 2, 2]) * z
        size_u, size_v = width.astype(np.float32)[face], height.astype(np.float32)[face]
        foot = [(np.abs(form[:, k, 0] - q * form[:, 0, 0]) + np.abs(form[:, k, 1] - q * form[:, 0, 1])) * z
            / view.focal for k, q in ((1, u), (2, v))]
        return SimpleNamespace(u=u * size_u, v=v * size_v, width=size_u, height=size_v, foot_u=foot[0] * size_u + 1e-4,
            foot_v=foot[1] * size_v + 1e-4, colour=row[:, 18:21], values=row[:, 21:25].T, seed=row[:, 25],
            taper=row[:, 13:15].T)

    @staticmethod
    def _rounded(px, normal, ball):
        """Normals of a cylinder or ball painted on a flat face that looks at the camera."""
        x = np.clip(2 * px.u / px.width - 1, -0.95, 0.95)
        y = np.clip(2 * px.v / px.height - 1, -0.95, 0.95) if ball else np.zeros_like(x)
        z = np.sqrt(np.maximum(1 - x * x - y * y, 0.05))
        if ball:
            y = np.where(px.values[0] == 2, 0.3, y)
            x = np.where(px.values[0] == 2, 0, x)
        bent = normal * z[:, None]
        bent[:, 0] += x
        bent[:, 1] += y
        return bent / np.sqrt((bent * bent).sum(1))[:, None]


# ---------------------------------------------------------------- light, weather, camera


def _sun_shadow(view: _View, sun: ndarray) -> ndarray:
    """Ground pixels (h, w) in the sun's shadow: every face projected on the ground along the light."""
    lean = np.array((sun[0], 0.0, sun[2])) / sun[1]
    flat = -view.street.height
    use = np.flatnonzero((view.p[:, 2] < 75) & (view.rows[:, 16] != WHEEL)
        & ((view.rows[:, 26] == 0) | ((view.forms[:, 0] * sun).sum(1) < 0)))
    p, u, v = view.p[use], view.u[use].copy(), view.v[use]
    card = view.rows[use, 27] > 0
    length = np.sqrt((u * u).sum(1))
    across = np.array((sun[2], 0.0, -sun[0])) / math.sqrt(sun[0] ** 2 + sun[2] ** 2)
    middle = p + u / 2
    u[card] = across * length[card, None]
    p = np.where(card[:, None], middle - u / 2, p)
    p = p - lean * (p[:, 1:2] - flat)
    p[:, 1] = flat
    u, v = (q - lean * q[:, 1:2] - np.array((0, 1, 0)) * q[:, 1:2] for q in (u, v))
    forms, det = _forms(p, u, v)
    boxes = view.windows(p, u, v)
    good = (np.abs(det) > 1e-6) & (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    shadow = np.zeros(view.size, bool)
    for k in np.flatnonzero(good).tolist():
        x0, x1, y0, y1 = boxes[k].tolist()
        covered = view.cover(forms[k].astype(np.float32).tolist(), (x0, x1, y0, y1), view.rows[use[k]])
        if covered:
            shadow[y0:y1, x0:x1] |= covered[0]
    return shadow


def _contact(view: _View) -> ndarray:
    """Share of the sky's light (h, w) that reaches the ground beside and under objects."""
    light = np.ones(view.size, np.float32)
    p, u, v = view.blots
    forms, _ = _forms(p, u, v)
    boxes = view.windows(p, u, v)
    for form, box in zip(forms.astype(np.float32).tolist(), boxes.tolist(), strict=True):
        x0, x1, y0, y1 = box
        covered = view.cover(form, box, [0.0] * 18) if x1 > x0 and y1 > y0 else None
        if covered:
            inside, near, a, b = covered
            near = np.where(inside, near, 1)
            a, b = np.abs(2 * a / near - 1), np.abs(2 * b / near - 1)
            light[y0:y1, x0:x1] *= 1 - 0.72 * np.clip((1 - a) * 2.5, 0, 1) * np.clip((1 - b) * 3.5, 0, 1) * inside
    return light


def _sky(view: _View, look: _Look, sun, rng) -> ndarray:
    """Linear colour (h, w, 3) of the sky: gradient, clouds on a plane, and the sun's halo."""
    h, w = view.size
    rows = max(int(view.street.horizon * h) + 1, 1)
    dx, dy = view.dx[None, :], np.maximum(view.dy[:rows, None], 0.0)
    rise = np.sqrt(np.clip(dy / np.sqrt(dx * dx + dy * dy + 1) * 1.7, 0, 1))[..., None]
    sky = np.array(look.horizon, np.float32) * (1 - rise) + np.array(look.zenith, np.float32) * rise
    if look.clouds:
        x, y = dx / (dy + 0.13) * 42 + rng.uniform(0, 512), 62 / (dy + 0.13) + rng.uniform(0, 512)
        x = np.broadcast_to(x, (rows, w))
        y = np.broadcast_to(y, (rows, w))
        thick, lit = _noise(x, y, 0.55), _noise(x + 5, y + 9, 0.55)
        cover = np.clip((thick - 1 + look.clouds) * 3.0 / max(look.clouds, 0.4), 0, 1) * np.clip(dy * 9 + 0.15, 0, 1)
        shade = np.clip(0.86 + 0.9 * (lit - thick) + 0.25 * (0.6 - thick), 0.55, 1.15)[..., None]
        sky = sky + (np.array(look.cloud, np.float32) * shade - sky) * cover[..., None] * 0.92
    if sum(look.sun):
        norm = np.sqrt(dx * dx + dy * dy + 1)
        near = np.clip((dx * sun[0] + dy * sun[1] + sun[2]) / norm, 0, 1) ** 8
        sky = sky + near[..., None] * np.array(look.sun, np.float32) * 0.35
    out = np.broadcast_to(np.array(look.horizon, np.float32), (h, w, 3)).copy()
    out[:rows] = sky
    return out


def _lamp_light(view: _View, look: _Look, where, normal) -> ndarray:
    """Light (n, 3) of the street lamps and the camera's own headlights on the pixels `where`."""
    i, j = np.divmod(where, view.size[1])
    z = view.depth.ravel()[where]
    x, y = view.dx[j] * z, view.dy[i] * z
    lamps = view.lights[(view.lights[:, 7] > 0) & (view.lights[:, 2] > -8)]
    lamps = lamps[np.argsort(lamps[:, 2], kind="stable")][:9].astype(np.float32)
    total = np.zeros((len(where), 3), np.float32)
    power = np.zeros(len(where), np.float32)
    for lamp in lamps:
        a, b, c = lamp[0] - x, lamp[1] - y, lamp[2] - z
        square = a * a + b * b + c * c
        facing = np.maximum(normal[:, 0] * a + normal[:, 1] * b + normal[:, 2] * c, 0) / np.sqrt(square)
        power += lamp[7] * (0.25 + facing) * np.clip(b * 0.6, 0, 1) / (square + 6)
    total += power[:, None] * np.array((1.0, 0.72, 0.4), np.float32)
    low = np.clip(1 - (view.dy[i] + 0.03) * 9, 0.03, 1)
    beam = low / (1 + (view.dx[j] * 2.2) ** 4) * 42 / (z * z + 60)
    return (total + beam[:, None] * np.array((1.0, 0.95, 0.85), np.float32)) * look.lights


def _glows(view: _View, look: _Look, image: ndarray):
    """Adds the halo of each light in sight to the linear image (h, w, 3)."""
    h, w = view.size
    strength = look.lights + 0.06
    for x, y, z, *rest in view.lights:
        if z < 1.5 or z > 130:
            continue
        col, row = x / z * view.focal + w / 2, view.street.horizon * h - y / z * view.focal
        j, i = int(col), int(row)
        if not (0 <= col < w and 0 <= row < h) or view.depth[i, j] < z - 1.2:
            continue
        radius = max(rest[3] / z * view.focal * 0.6, 0.0035 * h)
        reach = int(radius * 9) + 2
        window = np.s_[max(i - reach, 0) : min(i + reach + 1, h), max(j - reach, 0) : min(j + reach + 1, w)]
        dy, dx = np.ogrid[window]
        r = ((dx + 0.5 - col) ** 2 + (dy + 0.5 - row) ** 2) / (radius * radius)
        glow = strength * (1.6 / (1 + r) ** 1 * np.clip(1 - r / 81, 0, 1) ** 2) * min(1.0, 0.5 + rest[3])
        image[window] += glow[..., None].astype(np.float32) * np.array(rest[:3], np.float32)


def _mirror(view: _View, image: ndarray) -> tuple[int, ndarray]:
    """First row below the horizon, and from there what a wet road mirrors: what stands above it in its column."""
    h, w = view.size
    top = int(view.street.horizon * h)
    rows = np.arange(h)[:, None]
    foot = np.maximum.accumulate(np.where(view.face == -1, -1, rows), axis=0)
    jitter = (_noise(np.arange(w)[None, :] * 3.0, rows * 9.0, 0.9) - 0.5) * h * 0.03
    source = np.clip(2 * foot + 1 - rows + jitter.astype(np.int64), 0, h - 1)[top:]
    seen = image[source, np.arange(w)]
    for shift in (2, 4):
        shift = max(shift * h // 224, 1)
        seen = (seen + np.roll(seen, shift, 0) + np.roll(seen, -shift, 0)) / 3
    return top, seen


def _soften(image: ndarray) -> ndarray:
    """One pass of a 1-2-1 filter in both directions."""
    padded = np.pad(image, ((1, 1), (0, 0), (0, 0)), mode="edge")
    image = (padded[:-2] + padded[2:]) * 0.25 + image * 0.5
    padded = np.pad(image, ((0, 0), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :-2] + padded[:, 2:]) * 0.25 + image * 0.5


def _smooth_edges(view: _View, image: ndarray) -> ndarray:
    """Softens the steps where two faces meet."""
    face = view.face
    edge = np.zeros(view.size, bool)
    across, down = face[:, 1:] != face[:, :-1], face[1:] != face[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    where = np.flatnonzero(edge)
    image.reshape(-1, 3)[where] = _soften(image).reshape(-1, 3)[where]
    return image


def _shade(view: _View, look: _Look, rng) -> ndarray:
    """Linear image (h, w, 3) of a view in the light and weather of a style."""
    h, w = view.size
    surface = _Surface(view, look)
    side = rng.choice([-1.0, 1.0])
    sun = np.array((side * rng.uniform(0.35, 0.8), rng.uniform(0.5, 0.8), rng.uniform(-0.5, 0.15)))
    if look.lights:
        sun = np.array((side * rng.uniform(0.1, 0.4), 0.25, 0.9))
    sun = sun / math.sqrt((sun * sun).sum())
    solid = np.flatnonzero(view.face.ravel() != -2)
    normal, colour = surface.normal[solid], np.clip(surface.colour[solid], 0.01, 1.0)
    upright = normal[:, 1]
    contact = np.where(view.face == -1, _contact(view), 1).ravel()[solid]
    if look.snow:
        colour = _snow_cover(view, solid, colour, upright)
    colour = colour * colour
    if look.wet:
        colour = colour * np.where(view.face.ravel()[solid] == -1, 0.5, 0.8)[:, None]
    light = np.array(look.ambient, np.float32) * ((0.72 + 0.28 * upright + 0.06 * normal[:, 0]) * contact)[:, None]
    if sum(look.sun):
        facing = np.maximum((normal * sun.astype(np.float32)).sum(1), 0) * (0.4 + 0.6 * contact)
        if not look.lights:
            facing = facing * ~(_sun_shadow(view, sun) & (view.face == -1)).ravel()[solid]
        light = light + facing[:, None] * np.array(look.sun, np.float32)
    if look.lights > 0.2:
        light = light + _lamp_light(view, look, solid, normal) * (0.3 + 0.7 * contact)[:, None]
    mirrored = np.array(look.horizon, np.float32)
    glow = surface.glow[solid] * np.where(surface.glow[solid] > 2, 0.5, look.lights * 0.9)
    dark = (surface.colour[solid].max(1) < 0.6)[:, None]  # glass: lit from inside
    glow_colour = np.where(dark, np.array((1.0, 0.78, 0.45), np.float32), colour)
    image = _sky(view, look, sun, rng)
    flat = image.reshape(-1, 3)
    flat[solid] = colour * light + surface.gloss[solid, None] * mirrored * 0.7 + glow[:, None] * glow_colour
    if look.wet:
        top, mirrored = _mirror(view, image)
        puddles = np.zeros(view.size, np.float32)
        puddles.ravel()[view.ground] = np.clip(0.15 + 0.75 * _noise(view.s * 4, view.lat * 9, 0.6), 0, 0.7)
        wet = puddles[top:] * np.clip(1 + view.dy[top:, None] * 1.1, 0.15, 1)
        image[top:] += (mirrored * 0.85 - image[top:]) * wet[..., None]
    return image


def _snow_cover(view: _View, solid, colour, upright) -> ndarray:
    """Whitens what lies open to the sky; wheels keep two tracks a lane darker."""
    cover = np.clip(upright * 1.5 - 0.35, 0, 1)
    patch = np.zeros(view.face.size, np.float32)
    lane = np.abs(np.abs(view.lat) % LANE - LANE / 2)
    track = (view.zone == ROAD) * np.clip(1.6 - np.abs(lane - 0.8) * 2.2, 0.3, 1)
    patch[view.ground] = 1 - track * (0.45 + 0.5 * _noise(view.s * 2, view.lat * 22, 0.75))
    ground = view.face.ravel()[solid] == -1
    leaves = view.rows[:, 16][view.face.ravel()[solid]] == LEAF
    i, j = np.divmod(solid, view.size[1])
    speck = _noise(j * 2.0, i * 2.0, 0.9)
    cover = np.where(ground, patch[solid] * 0.95,
        np.where(leaves & ~ground, np.clip(upright * 1.1 + speck - 0.55, 0, 0.9), cover * 0.95))
    white = np.array((0.9, 0.92, 0.95), np.float32) * (0.93 + 0.12 * speck)[:, None]
    return colour + (white - colour) * cover[:, None]


def _fog(view: _View, look: _Look, image: ndarray, rng) -> ndarray:
    """Koschmieder: I = J t + A (1 - t) with t = exp(-beta d)."""
    beta = look.haze * (rng.uniform(0.75, 1.5) if look.haze > 0.005 else 1.0)
    t = np.exp(-beta * np.minimum(view.depth, 1e4).astype(np.float64)).astype(np.float32)
    t = np.where(np.isinf(view.depth), 0.0 if look.haze > 0.02 else 1.0, t)[..., None]
    return image * t + np.array(look.horizon, np.float32) * (1 - t)


def _falling(look: _Look, image: ndarray, rng) -> ndarray:
    """Rain streaks or snow flakes in front of the scene."""
    h, w = image.shape[:2]
    veil = np.zeros((h, w), np.float32)
    if look.wet:
        drops = (rng.random((h, w), np.float32) < 0.0035).astype(np.float32)
        slant = rng.uniform(-0.25, 0.25)
        for k in range(max(h // 16, 3)):
            veil += np.roll(drops, (k, int(slant * k)), (0, 1))
        veil = np.minimum(veil, 1.5) * 0.1
    if look.snow:
        for share, size in ((0.004, 1), (0.0012, 2), (0.0003, 3)):
            size = max(round(size * h / 224), 1)
            flakes = (rng.random((h, w), np.float32) < share).astype(np.float32)
            for k in range(size * size):
                veil = np.maximum(veil, np.roll(flakes, (k // size, k % size), (0, 1)) * 0.75)
    return image + (np.array(look.horizon, np.float32) * 1.15 - image) * veil[..., None]


def _expose(view, look: _Look, image: ndarray, rng) -> ndarray:
    """The camera: vignette, exposure, tone curve, colour, blur, noise; uint8 (h, w, 3)."""
    h, w = view.size
    gain = look.exposure * rng.uniform(0.92, 1.1) * np.array(look.tint, np.float32)
    y, x = np.ogrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    image = image * (gain * (1 - look.vignette * 0.5 * (x * x + y * y)[..., None])).astype(np.float32)
    image = np.sqrt(image * 1.25 / (1 + 0.25 * image))
    grey = image[..., 0] * 0.3 + image[..., 1] * 0.59 + image[..., 2] * 0.11
    image = grey[..., None] + (image - grey[..., None]) * look.saturation
    for _ in range(look.blur):
        image = _soften(image) * 0.6 + image * 0.4
    if look.noise:
        image = image + look.noise * rng.uniform(0.7, 1.3) * rng.standard_normal((h, w, 3), np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def render(seed: int, index: int, style: str, size: tuple[int, int] = (224, 448)) -> Scene:
    """Renders street `index` of the set `seed` in one of STYLES.

    size: (h, w) in pixels, both at least 32; another size shows the same street.
    Raises ValueError for an unknown style or a size too small.
    """
    _check(style, size)
    view = _View(_compose(seed, index), size)
    look, rng = LOOKS[style], _stream(seed, index, 1, STYLES.index(style))
    image = _shade(view, look, rng)
    image = _fog(view, look, image, rng)
    _glows(view, look, image)
    image = _smooth_edges(view, image)
    if look.wet or look.snow:
        image = _falling(look, image, rng)
    return Scene(_expose(view, look, image, rng), view.label, view.depth)


def _check(style: str, size: tuple[int, int]):
    if style not in STYLES:
        near = difflib.get_close_matches(str(style), STYLES, 1, 0.0)[0]
        raise ValueError(f"style is one of {', '.join(STYLES)}; got {style!r}, nearest: {near}")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size (h, w) needs at least {MIN_SIDE} pixels a side; got {tuple(size)}")


# ---------------------------------------------------------------- cache


def cache(folder: Path, style: str, indices: Sequence[int], seed: int, size: tuple[int, int],
        progress: bool = True) -> list[tuple[Path, Path, str]]:
    """Renders the missing scenes of one style to PNG files; safe to kill and to call again.

    Files: images/<style>/<index:05d>.png, labels/<index:05d>.png (shared by the styles), scenes.json (seed, size).
    Returns (image path, label path, name) per index.
    Raises ValueError if the folder holds scenes of another seed or size, OSError if it cannot be written.
    """
    _check(style, size)
    folder, size = Path(folder), (int(size[0]), int(size[1]))
    found = [(*_paths(folder, style, int(index)), f"{style}/{int(index):05d}") for index in indices]
    missing = [int(index) for index, (image, label, _) in zip(indices, found, strict=True)
        if not (image.exists() and label.exists())]
    try:
        _claim(folder, {"seed": int(seed), "size": list(size), "version": VERSION})
        (folder / "images" / style).mkdir(parents=True, exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        _render_all(partial(_store, folder, style, int(seed), size), list(dict.fromkeys(missing)), style, progress)
    except OSError as error:
        raise OSError(
            f"cannot write rendered scenes to {folder}: {error.strerror or error}; free space or name another folder"
        ) from error
    return found


def _paths(folder: Path, style: str, index: int) -> tuple[Path, Path]:
    return folder / "images" / style / f"{index:05d}.png", folder / "labels" / f"{index:05d}.png"


def _claim(folder: Path, content: dict):
    """Writes scenes.json, or checks that it names the same content."""
    path = folder / "scenes.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write(path, lambda file: file.write(json.dumps(content).encode()))
    try:
        held = json.loads(path.read_text())
    except ValueError:
        held = "an unreadable scenes.json"
    if held != content:
        raise ValueError(
            f"{folder} holds rendered scenes of {held}, asked for {content}; name another folder or delete this one"
        )


def _write(path: Path, save):
    """Whole or not at all: save(file) fills a temporary file beside `path`, which then takes its name."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _store(folder: Path, style: str, seed: int, size: tuple[int, int], index: int):
    """Renders one scene into the cache."""
    scene = render(seed, index, style, size)
    for path, picture in zip(_paths(folder, style, index), (scene.image, scene.label), strict=True):
        if not path.exists():
            _write(path, partial(Image.fromarray(picture).save, format="PNG", compress_level=4))


def _render_all(store, indices: list[int], style: str, progress: bool):
    """Runs store(index) for all, in a process pool where it pays."""
    with tqdm(total=len(indices), desc=f"render {style}", unit="scene", disable=not progress or not indices) as bar:
        workers = min(os.cpu_count() or 1, len(indices) // 8)
        if len(indices) > POOL_FROM and workers > 1:
            method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            try:
                with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
                    for _ in pool.map(store, indices, chunksize=4):
                        bar.update()
                return
            except BrokenProcessPool:  # a main script without a guard cannot be imported by workers
                bar.reset()
        for index in indices:
            store(index)
            bar.update()
