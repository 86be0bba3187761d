"""Surfaces of rendered scenes: colour, gloss, glow and normal of what a pixel shows. No light and no weather here.

Colours are gamma-2 values in 0..1. Patterns are filtered over the footprint of a pixel (`foot`, metres).
"""

from functools import lru_cache

import numpy as np
from numpy import ndarray

from setlib.scenes import street as streets
from setlib.scenes.street import LANE, ROAD, SIDEWALK

WINDOWS = np.float32(  # by the kind of a facade: distance in metres, share of it, share of the floor, sill
    [
        (2.6, 0.44, 0.52, 0.26),
        (2.4, 0.5, 0.56, 0.24),
        (2.8, 0.86, 0.6, 0.22),
        (2, 0.86, 0.8, 0.1),
        (3, 0.92, 0.62, 0.14),
    ]
)
BLACK, WHITE, RED, PANE, PLATE = streets.palette("242426 ebebe0 b80f0d 1a1f24 d9d199")
CARS, COACHES = (streets.REAR, streets.HEAD), (streets.COACH, streets.COACH_REAR, streets.COACH_HEAD)
DECALS = (  # materials, |q| from, to, t from, to, colour, gloss, glow: q is -1..1 between the edges, t 0..1 upwards
    (CARS, 0, 1, 0, 0.3, BLACK, 0, 0),
    ((streets.REAR,), 0.62, 0.94, 0.5, 0.8, RED, 0, 1.5),
    ((streets.HEAD,), 0.62, 0.94, 0.5, 0.8, WHITE, 0, 1.5),
    (CARS, 0, 0.28, 0.34, 0.56, PLATE, 0, 0),
    ((streets.HEAD,), 0, 0.55, 0.6, 0.84, BLACK, 0, 0),
    (COACHES, 0, 1, 0, 0.1, BLACK, 0, 0),
    ((streets.COACH_REAR,), 0.62, 0.94, 0.15, 0.25, RED, 0, 1.5),
    ((streets.COACH_HEAD,), 0.62, 0.94, 0.15, 0.25, WHITE, 0, 1.5),
    ((streets.COACH_REAR,), 0, 0.9, 0.46, 0.84, PANE, 0.25, 0.25),
    ((streets.COACH_HEAD,), 0, 0.92, 0.36, 0.84, PANE, 0.25, 0.25),
    ((streets.COACH_HEAD,), 0, 0.5, 0.89, 0.96, (0.9, 0.6, 0.2), 0, 1),
    ((streets.COACH,), 0, 1, 0.2, 0.28, WHITE, 0, 0),
    ((streets.COACH,), 0, 0.9, 0.46, 0.84, PANE, 0.35, 0.8),
    ((streets.DOOR,), 0.08, 0.94, 0.1, 0.94, PANE, 0.3, 0.7),
    ((streets.CABIN,), 0.05, 0.92, 0.1, 0.9, PANE, 0.25, 0),
    ((streets.SCREEN,), 0, 0.92, 0.1, 0.9, PANE, 0.25, 0),
)


@lru_cache
def _tile(slope: float) -> ndarray:
    """Periodic fractal noise (512 * 512,), float32 in 0..1; each octave is `slope` times the one before."""
    rng, size = np.random.default_rng((7, int(slope * 100))), 512
    rows, cols = np.fft.fftfreq(size)[:, None] * size, np.arange(size // 2 + 1)
    radius = np.sqrt(rows * rows + cols * cols)
    power = np.where(radius < 3, 0, np.maximum(radius, 1) ** (np.log2(slope) - 1))
    tile = np.fft.irfft2(power * (rng.standard_normal(power.shape) + 1j * rng.standard_normal(power.shape)))
    return np.clip(0.5 + tile / (4.6 * tile.std()), 0, 1).astype(np.float32).ravel()


def noise(x: ndarray, y: ndarray, slope: float = 0.8) -> ndarray:
    """Noise in 0..1 at (x, y), one texel a unit; small slopes are smooth, slope 1 is rough."""
    return _tile(slope).take((np.floor(y).astype(np.int32) & 511) * 512 + (np.floor(x).astype(np.int32) & 511))


def _hash(i, j, seed) -> ndarray:
    """A random number in 0..1 for each pair of whole numbers and seed in 0..1."""
    i, j, seed = (np.asarray(q).astype(np.int32).astype(np.uint32) for q in (i, j, np.multiply(seed, 1048576)))
    k = i * np.uint32(374761393) + j * np.uint32(668265263) + seed * np.uint32(1274126177)
    k = (k ^ (k >> np.uint32(13))) * np.uint32(1274126177)
    return ((k ^ (k >> np.uint32(16))) & np.uint32(65535)).astype(np.float32) / 65536


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
    """Colours (n, 3) with a share (n,) of another."""
    return colour + (np.asarray(other, np.float32) - colour) * share[:, None]


class Pixels:
    """The n pixels that show one material; its textures give colour (n, 3), gloss and glow (n,).

    On the face, metres, (n,): u and v, its width and height, the footprint foot_u and foot_v of a pixel. Of the face:
    colour (n, 3), values (3, n), taper (2, n), seed (n,). All float32.
    """

    def __init__(self, camera, material: int, where: tuple[ndarray, ndarray], contrast: float):
        faces, face, z = camera.faces, camera.face[where], camera.depth[where]
        dy, dx, forms = camera.dy[where[0]], camera.dx[where[1]], camera.forms.astype(np.float32)[face]

        def measure(row: int, edge: ndarray):
            """Place along an edge, its length and the footprint, metres."""
            length = np.sqrt((edge * edge).sum(1)).astype(np.float32)[face]
            at = (forms[:, row, 0] * dx + forms[:, row, 1] * dy + forms[:, row, 2]) * z
            slope = np.abs(forms[:, row, :2] - at[:, None] * forms[:, 0, :2]).sum(1)
            return at * length, length, slope * z * length / camera.focal + 1e-4

        self.u, self.width, self.foot_u = measure(1, faces.u)
        self.v, self.height, self.foot_v = measure(2, faces.v)
        self.material, self.contrast, self.colour, self.seed = material, contrast, faces.colour[face], faces.seed[face]
        self.values, self.taper = faces.values[face].T, faces.taper[face].T

    def noise(self, scale: float, shift: float, slope: float = 0.8) -> ndarray:
        """Noise in 0..1 (n,), `scale` texels a metre, another for each face."""
        return noise(self.u * scale + self.seed * shift, self.v * scale, slope)

    def facade(self):
        """Walls with windows, balconies and, where values[1] > 0, shops with a coloured fascia in the lowest floor."""
        kind = self.values[0].astype(np.int64)
        floor = self.height / np.maximum(np.rint(self.height / 3.1), 1)
        row = np.floor(self.v / floor)
        is_shop, rise = (self.values[1] > 0) & (row == 0), self.v / floor - row  # of its floor, 0..1
        bay, wide, high, sill = WINDOWS[np.where(is_shop, streets.SHOP, kind)].T
        bay = self.width / np.maximum(np.rint(self.width / bay), 1)
        col = np.floor(self.u / bay)
        key, u, gap = _hash(col, row, self.seed), self.u - bay * (1 - wide) / 2, 0.13
        pane = _stripes(u, bay, bay * wide, self.foot_u) * _band(rise, sill, sill + high, self.foot_v / floor)
        frame = _stripes(u + gap, bay, bay * wide + 2 * gap, self.foot_u)
        frame = frame * _band(rise, sill - gap / floor, sill + high + gap / floor, self.foot_v / floor)

        fine = (self.noise(24, 512) - 0.5) / (1 + 6 * self.foot_v)
        stain = noise(self.u * 3 + self.seed * 300, self.v * 5, 0.6) - 0.5
        joints, eaves = _stripes(self.v, 0.24, 0.05, self.foot_v), self.height - self.v < 0.45
        brick = (kind == streets.BRICK) * joints - 1.2 * eaves
        tone = 1 + self.contrast * 0.22 * (fine + stain) - 0.25 * np.clip(1 - self.v / 1.2, 0, 1) + 0.2 * brick
        colour = _mix(self.colour * tone[:, None], (0.86, 0.85, 0.82), (frame - pane).clip(0) * 0.75 * ~is_shop)
        curtain = (_hash(row, col, self.seed * 0.7) < 0.35) & (rise > 0.45) & ~is_shop
        glass = np.where(curtain, 0.5, 0.13 + 0.12 * key)[:, None] * np.array((0.85, 1.0, 1.12), np.float32)
        glass = _mix(glass, (0.75, 0.74, 0.72), _stripes(u - bay * wide / 2 + 0.04, bay, 0.08, self.foot_u))
        colour = _mix(colour, glass, pane)

        balcony = (_hash(col, 5, self.seed) < 0.3) & (row > 0) & (kind < streets.OFFICE) & (rise < 0.34)
        rail = balcony * (0.35 + 0.65 * _stripes(self.u, 0.16, 0.05, self.foot_u))
        colour, pane = _mix(colour, (0.2, 0.2, 0.22), rail), pane * (1 - rail)
        paint = np.array(streets.PAINTS, np.float32)[(_hash(self.u / 6, 9, self.seed) * 11.99).astype(np.int64)]
        colour = np.where((is_shop & (rise > 0.8))[:, None], paint, colour)
        letters = is_shop & (np.abs(rise - 0.9) < 0.04) & (np.abs(self.u % 6 - 3) < 1.6) & (self.u % 0.31 < 0.19)
        colour = _mix(colour, (0.92, 0.9, 0.82), letters)
        glow = pane * ((_hash(col * 3 + 1, row, self.seed) < 0.36) | is_shop) * (0.35 + 0.65 * key)
        return colour, pane * ~curtain * (0.25 + 0.5 * key) * (0.35 + 0.65 * rise), glow

    def decals(self):
        """Rectangles on the body of a vehicle: lamps, plates, windows, doors."""
        t, (left, right) = self.v / self.height, self.taper
        q = (self.u / self.width - left * t) / np.maximum(1 - (left + right) * t, 0.05)
        if self.material == streets.COACH:
            q = self.u / 1.7 % 1  # of one window
        q = np.abs(2 * q - 1)
        colour, gloss, glow = self.colour * (1.04 - 0.12 * (t < 0.5))[:, None], np.full_like(t, 0.06), np.zeros_like(t)
        for materials, start, stop, low, high, paint, shine, light in DECALS:
            if self.material in materials:
                where = (q >= start) & (q <= stop) & (t >= low) & (t < high)
                colour[where], gloss[where], glow[where] = paint, shine * t[where], light * self.values[0][where]
        return colour, gloss, glow

    def leaf(self):
        """Leaves: clumps of light and dark, darker below."""
        is_hedge, clump = self.values[0] == streets.HEDGE, self.noise(6, 512, 0.65)
        leaf = (self.noise(22, 512, 1.0) - 0.5) / (1 + 2 * self.foot_v)
        tone = self.values[2] * (0.5 + 0.65 * clump + self.contrast * 0.95 * leaf)
        tone = tone * (0.7 - 0.1 * is_hedge + 0.36 * self.v / self.height)
        warm = 1 + 0.25 * (clump - 0.5)
        return self.colour * tone[:, None] * np.stack([warm, np.ones_like(warm), 2 - 1.2 * warm], axis=1), 0, 0

    def courses(self):
        """Brick, tiles, slabs or panels: joints every values[0] metres, values[1] lighter."""
        period, joint, _ = self.values
        block = (_hash(self.u / (2 * period), self.v / period, self.seed) - 0.5) / (1 + 6 * self.foot_v)
        tone = 1 + 0.2 * block + joint * _stripes(self.v, period, period * 0.2, self.foot_v)
        tone = tone + self.contrast * 0.35 * (self.noise(7, 99) - 0.5) - 0.2 * np.clip(1 - self.v * 2, 0, 1)
        return self.colour * tone[:, None], 0, 0

    def plain(self):
        """Paint, cloth or metal."""
        tone = 1 + self.contrast * 0.12 * (self.noise(9, 99) - 0.5)
        return self.colour * tone[:, None], 0.06, 0


TEXTURES = {streets.PLAIN: Pixels.plain, streets.ROUND: Pixels.plain, streets.LEAF: Pixels.leaf}
TEXTURES |= {streets.FACADE: Pixels.facade, streets.COURSES: Pixels.courses}
TEXTURES |= {streets.GLOW: lambda pixels: (pixels.colour, 0, 3)}  # the others: decals


def _markings(camera) -> ndarray:
    """Coverage 0..1 of the ground's pixels by white paint."""
    street, s, lat, wide, long = camera.street, camera.s, camera.lat, camera.foot_lat, camera.foot_s
    off, line = np.abs(lat), street.lanes * LANE + 0.15
    paint = _band(off, 0.09 * (street.lanes - 1), 0.12 + 0.09 * (street.lanes - 1), wide)
    if street.lanes > 1:
        paint = paint + _band(off, LANE - 0.07, LANE + 0.07, wide) * _stripes(s, 9.0, 3.2, long)
    paint = paint + _band(off, line - 0.06, line + 0.06, wide)
    ahead, behind = street.crossing - streets.CROSS, street.crossing + streets.CROSS
    paint = paint * (1 - _band(np.abs(s - street.crossing), -1.0, streets.CROSS + 5.2, long))
    zebra = _band(s, ahead - 3.4, ahead - 0.6, long) + _band(s, behind + 0.6, behind + 3.4, long)
    stop = _band(s, ahead - 4.9, ahead - 4.4, long) * (lat > 0)
    paint = paint + _stripes(lat + 0.25, 1.0, 0.5, wide) * zebra + stop
    return np.clip(paint * (off < street.edge), 0, 1)


def _ground_colour(camera, contrast: float) -> ndarray:
    """Colour (n, 3) of the ground's pixels: asphalt with markings, slabs with kerbs, grass, and a railway's bed."""
    street, s, lat, wide, long = camera.street, camera.s, camera.lat, camera.foot_lat, camera.foot_s
    beyond = np.abs(lat) - street.edge
    fine = contrast * (noise(s * 40, lat * 40, 1.0) - 0.5) / (1 + 12 * long)
    middle = contrast * (noise(s * 9 + 77, lat * 9) - 0.5) / (1 + 1.5 * long)
    broad = noise(s * 1.3, lat * 4, 0.65) - 0.5

    tone = 1 + 0.5 * fine + 0.25 * middle + 0.25 * broad - 0.2 * _band(beyond, -0.35, 0.0, wide)
    asphalt = np.array((0.345, 0.345, 0.355), np.float32) * tone[:, None]
    asphalt = _mix(asphalt, (0.86, 0.86, 0.83), _markings(camera) * np.clip(0.9 + 0.6 * middle + 0.4 * broad, 0.4, 1.0))

    joint = np.maximum(_stripes(s, 0.9, 0.035, long), _stripes(lat, 0.6, 0.035, wide))
    slab = (_hash(np.floor(s / 0.9), np.floor(lat / 0.6), 0.6) - 0.5) / (1 + long)
    tone = 1 + 0.13 * slab + 0.25 * middle + 0.3 * fine + 0.2 * broad - 0.25 * joint
    slabs = np.array((0.6, 0.585, 0.56), np.float32) * tone[:, None]
    slabs = _mix(slabs, (0.72, 0.71, 0.69), (beyond < streets.KERB) * 0.8)

    tone = 0.7 + 0.55 * noise(s * 3, lat * 7, 0.65) + 0.7 * fine + 0.4 * middle
    grass = np.array((0.36, 0.52, 0.2), np.float32) * tone[:, None]
    grass = _mix(grass, (0.46, 0.4, 0.3), np.clip((broad + 0.5) * 2.2 - 1.2, 0, 1) * 0.8)
    if "rail" in street.fronts:
        right = street.fronts.index("rail")
        off = np.abs(lat - (1 if right else -1) * (street.base[right] + 4.2))
        grass = _mix(grass, (0.42, 0.4, 0.38), (off < 2.4) * np.clip(0.85 + fine, 0, 1))
        grass = _mix(grass, (0.3, 0.26, 0.23), (off < 1.25) * _stripes(s, 0.65, 0.26, long))
        grass = _mix(grass, (0.66, 0.64, 0.62), _band(np.abs(off - 0.72), -0.1, 0.06, wide))
    zone = camera.zone[:, None]
    return np.where(zone == ROAD, asphalt, np.where(zone == SIDEWALK, slabs, grass))


def surface(camera, contrast: float) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """What the pixels of a `render.Camera` show: colour and normal (h, w, 3), gloss and glow (h, w), float32.

    contrast: of the textures, 1 is plain. Normals are unit vectors in camera coordinates. The sky is left black.
    """
    faces, face, (h, w) = camera.faces, camera.face, camera.size
    colour, normal = np.zeros((2, h, w, 3), np.float32)
    gloss, glow = np.zeros((2, h, w), np.float32)
    normal[..., 1] = 1
    colour[camera.ground] = _ground_colour(camera, contrast)
    material = np.where(face >= 0, faces.material.astype(np.int8)[face], -1)
    normals = camera.forms[:, 0] / np.sqrt((camera.forms[:, 0] ** 2).sum(1)).clip(1e-12)[:, None]
    normals = (normals * -np.sign((normals * faces.p).sum(1))[:, None]).astype(np.float32)
    for kind in np.unique(material[material >= 0]):
        where = np.nonzero(material == kind)
        px = Pixels(camera, kind, where, contrast)
        colour[where], gloss[where], glow[where] = TEXTURES.get(kind, Pixels.decals)(px)
        toward = normals[face[where]]
        if kind in (streets.ROUND, streets.LEAF):  # a cylinder or ball painted on a flat face
            is_ball = (kind == streets.LEAF) & (px.values[0] != streets.HEDGE)
            x, y = (np.clip(2 * q - 1, -0.95, 0.95) for q in (px.u / px.width, px.v / px.height))
            bent = np.stack([x, y * is_ball, np.zeros_like(x)], axis=1)
            toward = bent + toward * np.sqrt(np.maximum(1 - (bent * bent).sum(1), 0.05))[:, None]
            toward = toward / np.sqrt((toward * toward).sum(1))[:, None]
        normal[where] = toward
    return colour, normal, gloss, glow
