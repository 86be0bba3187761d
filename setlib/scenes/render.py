"""Rendered street scenes: images with exact labels and depth, the same streets in eight styles.

Turns a street into a picture: visibility, light, weather, camera. What stands where is drawn in street.py from (seed,
index) alone, surfaces are in texture.py; a style changes only the picture, so labels and depth are the same bits in
all styles. The same call gives the same bytes again, in this process and in another. No files here.

Colours of surfaces are gamma-2 values: light is their square. 1/z, u/z and v/z of a face are linear in the pixel, so
faces need no clipping; they are drawn from near to far.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from setlib.files import nearest
from setlib.scenes import street as streets
from setlib.scenes.street import LANE, ROAD, SKY, Street
from setlib.scenes.texture import noise, surface

VERSION = 2  # of the rendered content; a cache of another version is refused
MIN_SIDE = 32  # pixels
NEAR = 0.4  # metres; nothing closer is drawn
GROUND, OPEN = -1, -2  # what a pixel shows where it shows no face


class Scene(NamedTuple):
    """One rendered street: image uint8 (h, w, 3), label uint8 (h, w) Cityscapes train ids 0..18, depth float32 (h, w).

    Depth is in metres along the optical axis, infinite for sky.
    """

    image: ndarray
    label: ndarray
    depth: ndarray


def _outline(face: np.record, u: ndarray, v: ndarray) -> ndarray:
    """Which points (u, v) in 0..1 of a face its outline holds."""
    x, y = 2 * u - 1, 2 * v - 1
    r = x * x + y * y
    if face["outline"] == streets.BARS:
        length, _, share = face["values"].tolist()
        bar = (u * (length * 6)) % 1 < share
        return bar & (v < 0.97) | (np.abs(v - 0.12) < 0.03) | (np.abs(v - 0.9) < 0.035)
    if face["outline"] == streets.LEAVES:
        shape, size, _ = face["values"].tolist()
        rows = 22 if shape == streets.HEDGE else 11 * size
        leaf = noise(u * (size * 11) + face["seed"] * 512, v * rows + face["seed"] * 99, 0.9)
        return v < 0.57 + 0.5 * leaf if shape == streets.HEDGE else r < 0.35 + leaf
    spokes = (np.abs(np.abs(x) - np.abs(y)) < 0.06) | (np.abs(x) < 0.04) | (np.abs(y) < 0.04)
    return (r <= 1) & ((face["outline"] == streets.DISC) | (r > 0.62) | spokes)


def _forms(p: ndarray, u: ndarray, v: ndarray) -> tuple[ndarray, ndarray]:
    """Linear forms (n, 3, 3) of 1/z, u/z and v/z over rays (x, y, 1), and (n,) > 0 where a face shows its outside."""
    rows = np.stack([np.cross(u, v), np.cross(v, p), np.cross(p, u)], axis=1)
    det = (p * rows[:, 0]).sum(1)
    return rows / np.where(np.abs(det) < 1e-9, np.inf, det)[:, None, None], det


def _soften(image: ndarray) -> ndarray:
    """One pass of a 1-2-1 filter in both directions over (h, w, c)."""
    padded = np.pad(image, ((1, 1), (0, 0), (0, 0)), mode="edge")
    image = (padded[:-2] + padded[2:]) * 0.25 + image * 0.5
    padded = np.pad(image, ((0, 0), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :-2] + padded[:, 2:]) * 0.25 + image * 0.5


class Camera:
    """What the camera of a street sees, in images of size (h, w).

    dx (w,), dy (h,): the ray of pixel (i, j) is (dx[j], dy[i], 1); focal: pixels; forms: (n, 3, 3) of the faces.
    Per pixel (h, w): face (its index, GROUND or OPEN), depth in metres, label, ground (bool), foot (the last row above
    it that shows no ground; -1 for none). Per pixel of the ground (m,): s, lat and zone, see Street; foot_s and
    foot_lat, the footprint of the pixel in metres.
    """

    def __init__(self, street: Street, size: tuple[int, int]):
        (h, w), self.street, self.size, self.faces = size, street, size, street.faces
        self.focal = street.focal * h
        self.dx = ((np.arange(w) + 0.5 - w / 2) / self.focal).astype(np.float32)
        self.dy = ((street.horizon * h - np.arange(h) - 0.5) / self.focal).astype(np.float32)
        planes = self.faces.p, self.faces.u, self.faces.v
        self.forms, outside = _forms(*planes)
        near = np.repeat(np.maximum(self.dy / -street.height, 0)[:, None], w, axis=1)  # 1/z of the ground
        self.face = np.where(near > 0, GROUND, OPEN).astype(np.int32)
        order = np.argsort(self.faces.p[:, 2], kind="stable")
        order = order[~self.faces.closed[order] | (outside[order] > 0)]
        for k, window, inside, depth in self.cover(*planes, order, near):
            np.copyto(near[window], depth, where=inside)
            self.face[window][inside] = k
        with np.errstate(divide="ignore"):
            self.depth = np.where(near > 0, 1 / near, np.float32(np.inf))
        self.ground = self.face == GROUND
        self.foot = np.maximum.accumulate(np.where(self.ground, -1, np.arange(h)[:, None]), axis=0)
        z, (_, j) = self.depth[self.ground], np.nonzero(self.ground)
        self.s, self.lat = street.locate(z * self.dx[j], z)
        self.zone = street.zone(self.s, self.lat)
        self.foot_lat, self.foot_s = z / self.focal, z * z / (self.focal * street.height)
        self.label = np.append(self.faces.label, [SKY, ROAD]).astype(np.uint8)[self.face]
        self.label[self.ground] = self.zone

    def windows(self, p: ndarray, u: ndarray, v: ndarray) -> ndarray:
        """Pixel ranges (n, 4) x0 x1 y0 y1 whose centres a face can hold; empty where it is out of sight."""
        h, w = self.size
        x, y, z = np.stack([p, p + u, p + u + v, p + v], axis=1).transpose(2, 0, 1)  # corners, (n, 4) each
        col = x / z.clip(NEAR) * self.focal + w / 2
        row = self.street.horizon * h - y / z.clip(NEAR) * self.focal
        sides = np.stack([col.min(1), col.max(1), row.min(1), row.max(1)], axis=1)
        sides[z.min(1) < NEAR] = 0, w, 0, h  # reaches behind the camera
        sides[z.max(1) < NEAR] = 0  # lies there
        return np.clip(np.ceil(sides - (0.51, -0.51, 0.51, -0.51)), 0, (w, w, h, h)).astype(np.int64)

    def cover(self, p: ndarray, u: ndarray, v: ndarray, chosen: ndarray, limit: ndarray):
        """Yields index, window, what it covers there (bool) and its 1/z for each of the `chosen` faces in sight.

        p, u, v: (n, 3), of all faces; limit: (h, w), 1/z of what may hide them.
        """
        p, u, v, faces = p[chosen], u[chosen], v[chosen], self.faces[chosen]
        boxes, forms = self.windows(p, u, v), _forms(p, u, v)[0].astype(np.float32)
        tapers, outlined = faces.taper.tolist(), (faces.outline != streets.SOLID).tolist()
        for n in np.flatnonzero((boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])):
            x0, x1, y0, y1 = boxes[n].tolist()
            window = np.s_[y0:y1, x0:x1]
            dx, dy = self.dx[None, x0:x1], self.dy[y0:y1, None]
            (a, b, c), *others = forms[n].tolist()
            near = a * dx + (b * dy + c)
            inside = near > limit[window]
            if inside.any():
                uz, vz = (a * dx + (b * dy + c) for a, b, c in others)  # u/z, v/z
                left, right = tapers[n]
                inside &= (vz >= 0) & (vz <= near) & (near < 1 / NEAR) & (uz >= left * vz) & (uz <= near - right * vz)
                if outlined[n]:
                    with np.errstate(all="ignore"):
                        inside &= _outline(faces[n], uz / near, vz / near)
                yield chosen[n], window, inside, near

    def sun_shadow(self, sun: ndarray) -> ndarray:
        """Pixels (h, w) in the sun's shadow: the faces within 45 m projected on the ground along the light."""
        faces, lean = self.faces, np.array((sun[0], 0.0, sun[2])) / sun[1]
        cast = (faces.p[:, 2] < 45) & (~faces.closed | ((self.forms[:, 0] * sun).sum(1) < 0))
        length = np.sqrt((faces.u * faces.u).sum(1))[:, None]
        across = np.array((sun[2], 0.0, -sun[0])) / math.sqrt(sun[0] ** 2 + sun[2] ** 2)
        u = np.where(faces.facing[:, None], across * length, faces.u)  # cards turn to the sun
        p = faces.p + (faces.u - u) / 2 + (0, self.street.height, 0)
        p, u, v = ((q - lean * q[:, 1:2]) * (1, 0, 1) for q in (p, u, faces.v))
        p[:, 1] = -self.street.height
        shadow = np.zeros(self.size, bool)
        for _, window, inside, _ in self.cover(p, u, v, np.flatnonzero(cast), np.zeros(self.size)):
            shadow[window] |= inside
        return shadow

    def contact(self) -> ndarray:
        """Share of the sky's light (h, w) that reaches the ground under and just before what stands above it."""
        depth = self.depth.clip(0, 1e4)
        gap = np.take_along_axis(depth, self.foot.clip(0), axis=0) - depth
        return np.where(self.ground, np.clip(0.35 + 0.8 * np.maximum(gap, -2 - gap), 0.35, 1), 1)

    def lamp_light(self, normal: ndarray) -> ndarray:
        """Light (h, w, 3) of the nearest street lamps and the camera's own headlights on surfaces."""
        dx, dy, lights = self.dx[None, :], self.dy[:, None], self.street.lights
        z = np.where(np.isinf(self.depth), 1, self.depth)
        x, y, power = dx * z, dy * z, np.zeros(self.size, np.float32)
        lamps = lights[(lights[:, 7] > 0) & (lights[:, 2] > -8)]
        for lamp in lamps[np.argsort(lamps[:, 2], kind="stable")][:6].tolist():
            a, b, c = lamp[0] - x, lamp[1] - y, lamp[2] - z
            square = a * a + b * b + c * c
            facing = np.maximum(normal[..., 0] * a + normal[..., 1] * b + normal[..., 2] * c, 0) / np.sqrt(square)
            power += lamp[7] * (0.25 + facing) * np.clip(b * 0.6, 0, 1) / (square + 6)
        beam = np.clip(1 - (dy + 0.03) * 9, 0.03, 1) / (1 + np.square(np.square(dx * 2.2))) * 42 / (z * z + 60)
        return power[..., None] * np.float32(streets.AMBER) + beam[..., None] * np.float32((1, 0.95, 0.85))

    def wet(self, image: ndarray):
        """Mirrors in the wet ground of the linear image (h, w, 3) what stands above it in its column."""
        h, w = self.size
        rows, columns = np.arange(h)[:, None], np.arange(w)[None, :]
        jitter = (noise(columns * 3.0, rows * 9.0, 0.9) - 0.5) * h * 0.03
        source = np.clip(2 * self.foot + 1 - rows + jitter.astype(np.int64), 0, h - 1)
        wet = np.zeros(self.size, np.float32)
        wet[self.ground] = np.clip(0.15 + 0.75 * noise(self.s * 4, self.lat * 9, 0.65), 0, 0.7)
        wet = wet * np.clip(1 + self.dy[:, None] * 1.1, 0.15, 1)
        return image + (image[source, columns] * 0.85 - image) * wet[..., None]

    def snow_cover(self, colour: ndarray, upright: ndarray) -> ndarray:
        """Whitens what lies open to the sky; wheels keep two tracks a lane darker."""
        rows, columns = np.arange(self.size[0])[:, None], np.arange(self.size[1])[None, :]
        speck = noise(columns * 2.0, rows * 2.0, 0.9)
        is_leaf = (self.face >= 0) & (self.faces.material[self.face] == streets.LEAF)
        cover = np.where(is_leaf, np.clip(upright * 1.1 + speck - 0.55, 0, 0.9), np.clip(upright * 1.5 - 0.35, 0, 0.95))
        lane = np.abs(np.abs(self.lat) % LANE - LANE / 2)
        track = (self.zone == ROAD) * np.clip(1.6 - np.abs(lane - 0.8) * 2.2, 0.3, 1)
        cover[self.ground] = 0.95 - track * (0.43 + 0.48 * noise(self.s * 2, self.lat * 22, 0.8))
        white = np.float32((0.9, 0.92, 0.95)) * (0.93 + 0.12 * speck)[..., None]
        return colour + (white - colour) * cover[..., None]


class Look(NamedTuple):
    """Light, weather and camera of one style; colours are linear, float32 (3,)."""

    sun: ndarray
    ambient: ndarray
    zenith: ndarray
    horizon: ndarray  # also what fog, glass and wet roads show
    cloud: ndarray
    clouds: float  # share of the sky
    haze: float  # Koschmieder's beta, 1/m
    lights: float  # power of lamps and lit windows
    falling: str  # "rain", "snow" or ""
    saturation: float
    contrast: float  # of textures
    exposure: float
    noise: float  # standard deviation; without it the picture is sharp as well
    vignette: float
    warmth: float  # share that red gains and blue loses

    def sky(self, camera: Camera, sun: ndarray, rng: np.random.Generator) -> ndarray:
        """Linear colour (h, w, 3) of the sky: gradient, clouds on a plane, and the sun's halo."""
        dx, dy = camera.dx[None, :], np.maximum(camera.dy[:, None], 0.0)
        norm = np.sqrt(dx * dx + dy * dy + 1)
        sky = self.horizon + (self.zenith - self.horizon) * np.sqrt(np.clip(dy / norm * 1.7, 0, 1))[..., None]
        if self.clouds:
            x, y = dx / (dy + 0.13) * 42 + rng.uniform(0, 512), 62 / (dy + 0.13) + rng.uniform(0, 512)
            thick, lit = noise(x, y, 0.55), noise(x + 5, y + 9, 0.55)
            cover = np.clip((thick - 1 + self.clouds) * 3 / max(self.clouds, 0.4), 0, 1) * np.clip(dy * 9 + 0.15, 0, 1)
            shade = np.clip(1.01 + 0.9 * lit - 1.15 * thick, 0.55, 1.15)[..., None]
            sky = sky + (self.cloud * shade - sky) * cover[..., None] * 0.92
        halo = np.clip((dx * sun[0] + dy * sun[1] + sun[2]) / norm, 0, 1) ** 8
        return sky + halo[..., None] * self.sun * 0.35

    def glows(self, camera: Camera, image: ndarray):
        """Adds the halo of each light in sight to the linear image (h, w, 3)."""
        h, w = camera.size
        for x, y, z, *colour, width, _ in camera.street.lights:
            z = max(z, 0.1)
            col, row = x / z * camera.focal + w / 2, camera.street.horizon * h - y / z * camera.focal
            j, i = int(col), int(row)
            if not (1.5 < z < 130 and 0 <= col < w and 0 <= row < h and camera.depth[i, j] > z - 1.2):
                continue
            radius = max(width / z * camera.focal * 0.6, 0.0035 * h)
            reach = int(radius * 9) + 2
            window = np.s_[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            dy, dx = (np.arange(size, dtype=np.float32)[part] for size, part in zip((h, w), window, strict=True))
            r = ((dx[None, :] + 0.5 - col) ** 2 + (dy[:, None] + 0.5 - row) ** 2) / (radius * radius)
            glow = (self.lights + 0.06) * 1.6 / (1 + r) * np.clip(1 - r / 81, 0, 1) ** 2 * min(1.0, 0.5 + width)
            image[window] += glow[..., None] * np.float32(colour)

    def shade(self, camera: Camera, rng: np.random.Generator) -> ndarray:
        """Linear image (h, w, 3) of what a camera sees in the light and weather of a style."""
        side = rng.choice([-1.0, 1.0])
        sun = np.array((side * rng.uniform(0.35, 0.8), rng.uniform(0.5, 0.8), rng.uniform(-0.5, 0.15)))
        if self.lights:
            sun = np.array((side * 0.25, 0.25, 0.9))  # low and ahead
        sun = (sun / math.sqrt((sun * sun).sum())).astype(np.float32)

        colour, normal, gloss, glow = surface(camera, self.contrast)
        colour = np.clip(colour, 0.01, 1.0)
        is_dark, upright, contact = colour.max(-1) < 0.6, normal[..., 1], camera.contact()
        if self.falling == "snow":
            colour = camera.snow_cover(colour, upright)
        colour = colour * colour
        if self.falling == "rain":
            colour = colour * np.where(camera.ground, np.float32(0.5), np.float32(0.8))[..., None]

        light = self.ambient * ((0.72 + 0.28 * upright + 0.06 * normal[..., 0]) * contact)[..., None]
        if self.sun.any():
            facing = np.maximum((normal * sun).sum(-1), 0) * (0.4 + 0.6 * contact)
            if not self.lights:
                facing = facing * ~(camera.sun_shadow(sun.astype(np.float64)) & camera.ground)
            light = light + facing[..., None] * self.sun
        if self.lights > 0.2:
            light = light + camera.lamp_light(normal) * (self.lights * (0.3 + 0.7 * contact))[..., None]
        shown = np.where(is_dark[..., None], np.float32((1.0, 0.78, 0.45)), colour)  # dark glass is lit from inside
        glow = glow * np.where(glow > 2, 0.5, self.lights * 0.9)
        lit = colour * light + gloss[..., None] * self.horizon * 0.7 + glow[..., None] * shown
        image = np.where((camera.face == OPEN)[..., None], self.sky(camera, sun, rng), lit.astype(np.float32))
        return camera.wet(image) if self.falling == "rain" else image

    def fog(self, camera: Camera, image: ndarray, rng: np.random.Generator) -> ndarray:
        """Koschmieder: I = J t + A (1 - t) with t = exp(-beta d)."""
        beta = self.haze * (rng.uniform(0.75, 1.5) if self.haze > 0.005 else 1.0)
        t = np.exp(np.float32(-beta) * np.minimum(camera.depth, np.float32(1e4)))
        t = np.where(np.isinf(camera.depth), np.float32(self.haze < 0.02), t)[..., None]
        return image * t + self.horizon * (1 - t)

    def precipitation(self, image: ndarray, rng: np.random.Generator) -> ndarray:
        """Rain streaks or snow flakes in front of the scene."""
        h, w = image.shape[:2]
        veil = np.zeros((h, w), np.float32)
        if self.falling == "rain":
            drops, slant = (rng.random((h, w), np.float32) < 0.0035).astype(np.float32), rng.uniform(-0.25, 0.25)
            for k in range(max(h // 16, 3)):
                veil += np.roll(drops, (k, int(slant * k)), (0, 1))
            veil = np.minimum(veil, 1.5) * 0.1
        else:
            for share, size in ((0.004, 1), (0.0012, 2), (0.0003, 3)):
                size = max(round(size * h / 224), 1)
                flakes = (rng.random((h, w), np.float32) < share).astype(np.float32) * 0.75
                for k in range(size * size):
                    veil = np.maximum(veil, np.roll(flakes, (k // size, k % size), (0, 1)))
        return image + (self.horizon * 1.15 - image) * veil[..., None]

    def expose(self, image: ndarray, rng: np.random.Generator) -> ndarray:
        """The camera: vignette, exposure, tone curve, colour, blur, noise; uint8 (h, w, 3)."""
        h, w = image.shape[:2]
        gain = self.exposure * rng.uniform(0.92, 1.1) * np.array((1 + self.warmth, 1.0, 1 - self.warmth))
        y, x = np.linspace(-1, 1, h)[:, None, None], np.linspace(-1, 1, w)[None, :, None]
        image = image * (gain * (1 - self.vignette * 0.5 * (x * x + y * y))).astype(np.float32)
        image = np.sqrt(image * 1.25 / (1 + 0.25 * image))
        grey = (image[..., 0] * 0.3 + image[..., 1] * 0.59 + image[..., 2] * 0.11)[..., None]
        image = grey + (image - grey) * self.saturation
        if self.noise:
            image = image + (_soften(image) - image) * 0.6
            image += np.float32(self.noise * rng.uniform(0.7, 1.3)) * rng.standard_normal((h, w, 3), np.float32)
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


COLOURS = {  # sun, ambient, zenith, horizon, cloud
    "game": ((1.15, 1.08, 0.9), (0.42, 0.46, 0.56), (0.08, 0.25, 0.72), (0.5, 0.72, 0.95), (1.0, 1.0, 1.0)),
    "clear": ((1.3, 1.2, 1.0), (0.3, 0.32, 0.36), (0.26, 0.44, 0.74), (0.85, 0.9, 0.94), (1.0, 1.0, 1.0)),
    "overcast": ((0, 0, 0), (0.66, 0.69, 0.72), (0.5, 0.53, 0.57), (0.8, 0.82, 0.83), (0.62, 0.64, 0.67)),
    "dusk": ((0.45, 0.22, 0.09), (0.2, 0.18, 0.26), (0.07, 0.1, 0.26), (0.85, 0.42, 0.2), (0.5, 0.26, 0.26)),
    "night": ((0, 0, 0), (0.014, 0.017, 0.03), (0.003, 0.004, 0.012), (0.05, 0.035, 0.03), (0.03, 0.024, 0.025)),
    "fog": ((0, 0, 0), (0.66, 0.68, 0.7), (0.66, 0.69, 0.72), (0.66, 0.69, 0.72), (0.66, 0.69, 0.72)),
    "rain": ((0, 0, 0), (0.4, 0.44, 0.5), (0.26, 0.3, 0.35), (0.36, 0.4, 0.45), (0.25, 0.28, 0.33)),
    "snow": ((0, 0, 0), (0.62, 0.66, 0.73), (0.62, 0.65, 0.69), (0.74, 0.76, 0.79), (0.58, 0.61, 0.66)),
}
NUMBERS = {  # the other fields of Look
    "game": (0.42, 0.0008, 0.0, "", 1.3, 0.8, 1.0, 0.0, 0.0, 0.0),
    "clear": (0.32, 0.0014, 0.0, "", 0.9, 1.3, 1.0, 0.012, 0.3, 0.04),
    "overcast": (0.95, 0.002, 0.0, "", 0.66, 1.1, 0.85, 0.015, 0.25, 0.0),
    "dusk": (0.5, 0.0012, 0.45, "", 0.95, 1.0, 1.1, 0.025, 0.4, 0.0),
    "night": (0.5, 0.0008, 1.0, "", 0.85, 1.0, 0.9, 0.03, 0.4, 0.11),
    "fog": (0.0, 0.03, 0.15, "", 0.6, 1.0, 0.95, 0.012, 0.2, 0.0),
    "rain": (0.85, 0.009, 0.3, "rain", 0.7, 1.0, 0.85, 0.02, 0.3, -0.055),
    "snow": (0.8, 0.0075, 0.0, "snow", 0.6, 1.0, 0.9, 0.015, 0.2, -0.03),
}
STYLES = tuple(COLOURS)


def render_scene(seed: int, index: int, style: str, size: tuple[int, int] = (224, 448)) -> Scene:
    """Renders street `index` of the set `seed` in one of STYLES.

    size: (h, w) in pixels, both at least 32; another size shows the same street.
    Raises ValueError for an unknown style or a size too small.
    """
    if style not in STYLES:
        raise ValueError(f"style is one of {', '.join(STYLES)}; got {style!r}, {nearest(str(style), STYLES)}")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size (h, w) needs at least {MIN_SIDE} pixels a side; got {tuple(size)}")
    camera, look = Camera(Street(seed, index), size), Look(*np.float32(COLOURS[style]), *NUMBERS[style])
    rng = np.random.default_rng((seed, index, 1, STYLES.index(style)))
    image = look.fog(camera, look.shade(camera, rng), rng)
    look.glows(camera, image)
    faces = camera.face[..., None].astype(np.float32)
    image = np.where(_soften(faces) != faces, _soften(image), image)  # softens the steps where two faces meet
    if look.falling:
        image = look.precipitation(image, rng)
    return Scene(look.expose(image, rng), camera.label, camera.depth)
