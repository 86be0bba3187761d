"""Streets: what stands where in a rendered scene, drawn from (seed, index) alone. No pixels and no light here.

A street is a list of planar faces with class, material and colour, seen from a camera in one of its lanes, its lights,
and the plan of the ground itself.

Coordinates are metres. Road: s along, lat to the right of the centre line. Objects: a to the right, b up, c forward.
Camera: x right, y up from the camera, z along the optical axis. A face is the parallelogram p + u U + v V with u and v
in 0..1, narrowed by its tapers towards v = 1.
"""

import math
from types import SimpleNamespace

import numpy as np
from numpy import ndarray

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN) = range(10)
(SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(10, 19)  # Cityscapes train ids
PLAIN, ROUND, LEAF, FACADE, COURSES, GLOW = range(6)  # materials
CABIN, SCREEN, REAR, HEAD, COACH, COACH_REAR, COACH_HEAD, DOOR = range(6, 14)  # of vehicles
SOLID, DISC, RING, LEAVES, BARS = range(5)  # outlines of faces
CROWN, HEDGE = range(2)  # values[0] of LEAF
BLANK, BRICK, PLASTER, OFFICE, GLASS = range(5)  # values[0] of FACADE
LANE, KERB, CROSS = 3.3, 0.2, 4.5  # lane and kerb width, half width of a crossing street
RED, WHITE, AMBER = (1.0, 0.06, 0.03), (1.0, 0.95, 0.8), (1.0, 0.72, 0.38)  # lights


def palette(text: str) -> list[tuple]:
    """Colours in 0..1 of words such as 'ff8000'."""
    return [tuple(value / 255 for value in bytes.fromhex(word)) for word in text.split()]


DARK, STEEL, GREY = palette("191a1c 808587 807d7a")
PAINTS = palette("bf1a1a e6e6e6 1f1f24 8c9199 1f408c ccccd1 4d5259 f2bf1a 1a664d 804026 598cbf b3ad99")
PLASTERS, BRICKS = palette("d9c79e ccc2b3 b88c6b e0d9cc a8b3b3"), palette("995440 ad7a57 804d42 b89975")
TILES, FENCES = palette("853d2b 5c4d4a 4d525c"), palette("29332e bfc2c2 805c3d 9e9985")
COATS, TROUSERS = palette("262e4d b32626 d9d9cc 336699 cca633 4d734d"), palette("292e42 1f1f21 4d5c80 6b614d")
SKINS, HAIR = palette("d9a88a 734d38"), palette("1f1712 664729 b3ada6")
FACE = np.dtype(  # frame of the object; U and V narrow by taper; colour in 0..1, gamma 2; values of the material
    [("frame", "4f8"), ("p", "3f8"), ("u", "3f8"), ("v", "3f8"), ("taper", "2f8"), ("label", "i8"), ("material", "i8")]
    + [("outline", "i8"), ("colour", "3f4"), ("values", "3f4"), ("seed", "f4"), ("closed", "?"), ("facing", "?")]
)
KINDS = {  # weight, lanes per direction, chance of parking, widths of verge and sidewalk, fronts of both sides
    "canyon": (0.28, (1, 1, 2), 0.8, (0.0, 0.0), (2.6, 4.5), ("blocks",), ("blocks",)),
    "suburb": (0.24, (1,), 0.5, (0.0, 1.5), (1.8, 2.6), ("houses",), ("houses",)),
    "avenue": (0.24, (1, 2), 0.4, (1.5, 3.5), (2.2, 3.5), ("park", "blocks"), ("park", "houses", "blocks")),
    "railway": (0.24, (1,), 0.3, (0.5, 2.0), (1.8, 2.8), ("rail",), ("blocks", "houses")),
}
VEHICLES = {  # label, share of traffic, length, width, floor, top; cabin: start, end, top, slopes; top of the cargo
    "saloon": (CAR, 0.17, 4.6, 1.8, 0.2, 0.86, (0.6, 3.4, 1.43, 0.65, 0.8), 0),
    "hatch": (CAR, 0.17, 3.9, 1.72, 0.2, 0.88, (0.04, 2.9, 1.5, 0.35, 0.75), 0),
    "suv": (CAR, 0.2, 4.7, 1.92, 0.24, 1.02, (0.05, 3.5, 1.78, 0.3, 0.65), 0),
    "van": (CAR, 0.08, 5.3, 1.95, 0.24, 1.15, (0.03, 4.5, 2.15, 0.08, 0.75), 0),
    "truck": (TRUCK, 0.12, 8.0, 2.3, 0.45, 1.45, (6.1, 7.98, 2.75, 0.0, 0.25), 3.4),
    "bus": (BUS, 0.1, 11.0, 2.5, 0.32, 3.1, None, 0),
    "motorcycle": (MOTORCYCLE, 0.07, 2.0, 0.7, 0, 0, None, 0),
    "bicycle": (BICYCLE, 0.07, 2.0, 0.7, 0, 0, None, 0),
    "train": (TRAIN, 0.0, 13.0, 2.7, 0.3, 3.5, None, 0),
}
BODY = (  # cards of a standing person: x (both sides where > 0), y, width, height, lean, taper, outline, part
    (0.085, 0.92, 0.2, -0.92, 0.1, 0.22, SOLID, "trousers"),
    (0.215, 1.43, 0.13, -0.55, 0.05, 0.2, SOLID, "coat"),
    (0.265, 0.9, 0.08, -0.1, 0.0, 0.0, DISC, "skin"),
    (0.0, 0.84, 0.36, 0.66, 0.0, -0.08, SOLID, "coat"),
    (0.0, 1.47, 0.21, 0.3, 0.0, 0.0, DISC, "skin"),
    (0.0, 1.61, 0.24, 0.19, 0.0, 0.0, DISC, "hair"),
)
PLATES = (  # traffic signs: width, height, taper, outline, share of the inner plate, width of the symbol, three colours
    (0.95, 0.85, 0.5, SOLID, 0.62, 0.1, palette("c71717 f2f0e0 1a1a1a")),
    (0.76, 0.76, 0.0, DISC, 0.68, 0.1, palette("d11414 f2f2ed 1a1a1a")),
    (0.76, 0.76, 0.0, DISC, 0.9, 0.12, palette("f2f2ed 1a4db8 f2f2ed")),
    (2.0, 1.1, 0.0, SOLID, 0.94, 1.4, palette("1a1a1a f2c71f 1a1a1a")),
)
TREES = {"blocks": (), "houses": (1.5,), "park": (2.0, 4.0, 9.0), "rail": (9.0, 9.0, 14.0)}  # metres beyond sidewalk
FRAME = ((-0.5, 0.34, 0.9, 0.5), (-0.1, 0.34, -0.1, 0.58), (0.54, 0.34, -0.14, 0.68))  # c, b and their steps


def stream(*key: int) -> np.random.Generator:
    """Random numbers that depend on the whole numbers `key` alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class Street:
    """Plan of one street, the camera in it (yaw in radians, focal length and horizon in image heights), its objects.

    faces: the columns of FACE as arrays of n rows, p, u and v (n, 3) in camera metres, `closed` ones seen from outside
    only, `facing` ones turned to the camera; lights: (n, 8), place, colour, width of the glow in metres, power.
    """

    def __init__(self, seed: int, index: int):
        self.rng = rng = stream(seed, index, 0)
        self.kind = str(rng.choice(list(KINDS), p=[row[0] for row in KINDS.values()]))
        _, lanes, parked, verge, walk, left, right = KINDS[self.kind]
        self.lanes, self.parking = int(rng.choice(lanes)), rng.random() < parked
        self.bend = float(rng.choice([-1, 0, 1]) * rng.uniform(0.0008, 0.0045))  # x = bend s^2 / 2
        self.yaw, self.height = rng.uniform(-0.07, 0.07), rng.uniform(1.3, 1.9)
        self.focal, self.horizon = rng.uniform(1.1, 1.5), rng.uniform(0.4, 0.5)
        self.ego = LANE * (0.5 + int(rng.integers(self.lanes))) + rng.uniform(-0.3, 0.3)
        self.edge = self.lanes * LANE + 0.3 + 2.1 * self.parking  # half width of the road
        self.verge, self.walk = rng.uniform(*verge, 2), rng.uniform(*walk, 2)
        self.fronts = [str(rng.choice(left)), str(rng.choice(right))][:: rng.choice([-1, 1])]
        self.crossing = rng.uniform(17, 55) if rng.random() < 0.7 else -1000.0  # s of the crossing street, if any
        self._faces, self._lights = [], []
        for side in (-1, 1):
            _front(self, side, self.base(side), self.fronts[side > 0])
        for add in (_traffic, _furniture, _people, _backdrop):
            add(self)
        rows = np.array(self._faces, FACE)
        self.faces = SimpleNamespace(**{name: np.ascontiguousarray(rows[name]) for name in FACE.names[1:]})
        x, z, cos, sin = rows["frame"].T
        for name in "puv":
            a, b, c = rows[name].T
            setattr(self.faces, name, np.stack([a * cos + c * sin, b, c * cos - a * sin], axis=1))
        self.faces.p += np.stack([x, np.full_like(x, -self.height), z], axis=1)
        self.lights = np.array(self._lights).reshape(-1, 8)

    def base(self, side: float) -> float:
        """Distance (metres) of the outer edge of one side's sidewalk from the centre line; side -1 left, 1 right."""
        return float(self.edge + self.verge[int(side > 0)] + self.walk[int(side > 0)])

    def clear(self, start: float, stop: float) -> bool:
        """Whether the stretch start..stop of s keeps clear of the crossing street and its sidewalks."""
        return stop < self.crossing - CROSS - 2.5 or start > self.crossing + CROSS + 2.5

    def locate(self, x: ndarray, z: ndarray) -> tuple[ndarray, ndarray]:
        """Road coordinates (s, lat) of points on the ground given in camera metres; all of one shape."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        x, s = x * cos + z * sin + self.ego, z * cos - x * sin
        slope = self.bend * s
        norm = np.sqrt(1 + slope * slope)
        lat = (x - slope * s / 2) / norm
        return s + lat * slope / norm, lat

    def zone(self, s: ndarray, lat: ndarray) -> ndarray:
        """Train ids of the ground at (s, lat): ROAD, SIDEWALK or TERRAIN."""
        beyond, across = np.abs(lat) - self.edge, np.abs(s - self.crossing)
        verge, base = (np.where(lat > 0, q[1], q[0]) for q in (self.verge, self.verge + self.walk))
        walk = (beyond < KERB) | (beyond >= verge) & (beyond < base) | (self.kind == "canyon") | (across < CROSS + 2.2)
        return np.where((beyond < 0) | (across < CROSS), ROAD, np.where(walk, SIDEWALK, TERRAIN))

    def pick(self, choices):
        """One of `choices`, drawn from the street's random numbers."""
        return choices[self.rng.integers(len(choices))]

    def at(self, s: float, lat: float, turn: float = 0.0, facing: bool = False):
        """Starts an object at (s, lat): heading along the road plus `turn` radians, or facing the camera."""
        slope = self.bend * s
        norm = math.sqrt(1 + slope * slope)
        x, z = slope * s / 2 + lat / norm - self.ego, s - lat * slope / norm
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        angle = 0.0 if facing else math.atan(slope) + turn - self.yaw
        self.frame = (x * cos - z * sin, x * sin + z * cos, math.cos(angle), math.sin(angle))
        self.facing, self.number = facing, self.rng.random()

    def thin(self, width: float) -> float:
        """`width`, or the metres that stay visible at the present object's distance."""
        return max(width, 0.0032 * self.frame[1])

    def quad(self, p, u, v, label, material, colour, taper=(0, 0), outline=SOLID, values=(), closed=False):
        """Adds the face p + u U + v V of the present object; a closed one is seen from outside only (u right, v up)."""
        values, kind = (*values, 0, 0, 0)[:3], (label, material, outline)
        self._faces.append((self.frame, p, u, v, taper, *kind, colour, values, self.number, closed, self.facing))

    def card(self, x, y, width, height, label, colour, lean=0.0, taper=0.0, outline=SOLID):
        """Adds an upright face in the plane c = 0, centred at x, from y upwards (downwards where height < 0)."""
        p, u, v = (x - width / 2, y, 0), (width, 0, 0), (lean, height, 0)
        self.quad(p, u, v, label, ROUND, colour, (taper, taper), outline)

    def box(self, a, b, c, label, materials, colour, inset=(0, 0, 0), top=None, sides=None, values=()):
        """Adds a box over the ranges a, b, c; `inset` narrows its top at the sides, the rear and the front.

        materials: of the rear, the sides and the front; `sides` and `top`: their own colours.
        """
        (x0, x1), (y0, y1), (z0, z1) = a, b, c
        width, high, length, (side, rear, front) = x1 - x0, y1 - y0, z1 - z0, inset
        across, back, ahead = side / width, rear / length, front / length
        for p, u, v, material, paint, taper in (
            ((x0, y0, z0), (width, 0, 0), (0, high, rear), materials[0], colour, (across, across)),
            ((x1, y0, z1), (-width, 0, 0), (0, high, -front), materials[2], colour, (across, across)),
            ((x0, y0, z1), (0, 0, -length), (side, high, 0), materials[1], sides or colour, (ahead, back)),
            ((x1, y0, z0), (0, 0, length), (-side, high, 0), materials[1], sides or colour, (back, ahead)),
        ):
            self.quad(p, u, v, label, material, paint, taper, values=values, closed=True)
        if width > 2 * side:
            p, u, v = (x0 + side, y1, z0 + rear), (width - 2 * side, 0, 0), (0, 0, length - rear - front)
            self.quad(p, u, v, label, PLAIN, top or colour, closed=True)

    def light(self, a: float, b: float, c: float, colour: tuple, width: float, power: float = 0.0):
        """Adds a light to the present object: a glow `width` metres wide; with `power` > 0 it lights the street."""
        x, z, cos, sin = self.frame
        self._lights.append((x + a * cos + c * sin, b - self.height, z - a * sin + c * cos, *colour, width, power))


def _vehicle(street, kind, s, lat, turn, moving, paint=None):
    """A car, truck, bus or train: a body, a cabin and a cargo box where it has them, and wheels."""
    label, _, length, width, low, top, cabin, cargo = VEHICLES[kind]
    street.at(s, lat, turn)
    paint, half, rear = paint or street.pick(PAINTS), width / 2, -length / 2
    body, inset, roof = (REAR, PLAIN, HEAD), (0.05, 0.05, 0.12), None
    if not cabin:
        body, inset, roof = (COACH_REAR, COACH, COACH_HEAD), (0.08, 0.1, 0.15), (0.75, 0.75, 0.75)
        for c in np.arange(rear + 1.5, -rear - 2, 4.5):
            street.quad((half, 0.4, c), (0, 0, 1.2), (-0.06, 2.3, 0), label, DOOR, paint, values=(moving,))
    street.box((-half, half), (low, top), (rear, -rear), label, body, paint, inset, roof, values=(moving,))
    if cabin:
        start, end, high, back, front = cabin
        a, c, lean = (0.05 - half, half - 0.05), (rear + start, rear + end), 0.06 if cargo else 0.2
        street.box(a, (top, high), c, label, (SCREEN, CABIN, SCREEN), paint, (lean, back, front))
    if cargo:
        a, c = (-half - 0.07, half + 0.07), (rear - 0.05, -rear - 2.1)
        street.box(a, (1.2, cargo), c, label, (COURSES,) * 3, street.pick(PAINTS), values=(1.7, -0.25))
    radius = 0.33 if label == CAR else 0.48
    axles = [rear + 0.18 * length, -rear - (0.19 * length if label == CAR else 1.2)]
    for side in (-1, 1):
        for c in axles:
            p, u, v = (side * (half + 0.01), 0, c - radius), (0, 0, 2 * radius), (0, 2 * radius, 0)
            street.quad(p, u, v, label, PLAIN, DARK, outline=DISC)
            p, u, v = (side * (half + 0.02), 0.2, c - radius + 0.2), (0, 0, 2 * radius - 0.4), (0, 2 * radius - 0.4, 0)
            street.quad(p, u, v, label, PLAIN, GREY, outline=DISC)
            p, u = (side * (half - 0.16) - 0.12, 0, c + math.copysign(radius * 0.7, c)), (0.24, 0, 0)
            street.quad(p, u, (0, radius * 1.3, 0), label, PLAIN, DARK)
        if moving and label != TRAIN:
            street.light(side * half * 0.75, 0.66, rear - 0.1, RED, 0.16)
            street.light(side * half * 0.75, 0.66, 0.1 - rear, WHITE, 0.34)


def _person(street, s, lat, label=PERSON, seat=False):
    """A walker, or somebody who sits on a cycle."""
    street.at(s, lat, facing=True)
    rng, size = street.rng, 1.0 if seat else street.rng.uniform(0.86, 1.06)
    colours = {"coat": street.pick(COATS), "trousers": street.pick(TROUSERS), "skin": street.pick(SKINS)}
    colours["hair"], stride = (0.8, 0.2, 0.15) if seat else street.pick(HAIR), 0.5 if seat else rng.uniform(0.4, 2.0)
    for x, y, width, height, lean, taper, outline, part in BODY:
        y, height = y * size + 0.1 * seat, max(height * size, -0.66) if seat else height * size
        for side in (-1, 1) if x else (1,):
            swing = side * lean * stride
            street.card(side * x * size, y, width * size, height, label, colours[part], swing, taper, outline)


def _cycle(street, label, s, lat, turn, ridden):
    """A bicycle or motorcycle, with a rider where `ridden`."""
    street.at(s, lat, turn)
    motor, paint, radius, bar = label == MOTORCYCLE, street.pick(PAINTS), 0.34, street.thin(0.06)
    tyre, reach = street.thin(0.2 if motor else 0.08), 0.7 if motor else 0.54
    for c in (-reach, reach):
        street.quad((0, 0, c - radius), (0, 0, 2 * radius), (0, 2 * radius, 0), label, PLAIN, DARK, outline=RING)
        street.quad((-tyre / 2, 0.02, c), (tyre, 0, 0), (0, 0.62, 0), label, PLAIN, DARK)
    for c, b, ahead, up in FRAME:
        street.quad((0, b, c), (0, up, ahead), (0, bar, bar / 2), label, PLAIN, paint)
    street.quad((-0.28, 1.0, 0.37), (0.56, 0, 0), (0, bar, 0), label, PLAIN, DARK)
    if motor:
        a, b, c, body = (-0.16, 0.16), (0.42, 0.86), (-0.75, 0.5), (REAR, PLAIN, HEAD)
        street.box(a, b, c, label, body, paint, (0.05, 0, 0.2), values=(ridden,))
    if ridden:
        street.light(0, 0.7, -0.85, RED, 0.1)
        street.light(0, 0.75, 0.8, WHITE, 0.3 if motor else 0.12)
        _person(street, s - 0.1, lat, RIDER, seat=True)


def _tree(street, s, lat, size):
    """A round or tall tree: a trunk, and a crown of leafy discs at several depths."""
    rng = street.rng
    street.at(s, lat, facing=True)
    green = (rng.uniform(0.32, 0.5), rng.uniform(0.52, 0.64), rng.uniform(0.18, 0.3))
    trunk, spread, tall = rng.uniform(1.8, 2.8) * size, rng.uniform(1.6, 2.4) * size, street.pick((0.8, 0.8, 2.0))
    street.card(0, 0, 0.34 * size, trunk + spread * 0.8, VEGETATION, (0.34, 0.27, 0.2), taper=0.2)
    for k in range(8):
        r, height = spread * rng.uniform(0.5, 0.75), (k / 3.5 - 1.0) * 0.95
        x = (k * 0.618 % 1 * 2 - 1) * spread * 0.8 * math.sqrt(max(1.1 - height * height, 0.05)) / tall
        p = (x - r, trunk + spread * tall * (1 + 0.8 * height) - r, rng.uniform(-0.8, 0.8) * spread)
        values, street.number = (CROWN, 2 * r, 0.75 + 0.25 * height), rng.random()
        street.quad(p, (2 * r, 0, 0), (0, 2 * r, 0), VEGETATION, LEAF, green, outline=LEAVES, values=values)


def _post(street, s, lat, height, width=0.1, arm=0.0, at=0.0):
    """A post, with an arm of `arm` metres to the right at the height `at`."""
    street.at(s, lat, facing=True)
    street.card(0, 0, street.thin(width), height, POLE, STEEL)
    if arm:
        street.quad((0, at, 0), (arm, 0.2, 0), (0, street.thin(0.1), 0), POLE, PLAIN, STEEL)


def _lamp(street, s, lat):
    """A street lamp whose arm reaches over the road."""
    reach = math.copysign(1.8, -lat)
    _post(street, s, lat, 6.9, 0.16, reach, 6.8)
    p, u, v = (reach * 0.8, 6.98, 0), (reach * 0.45, 0.08, 0), (0, street.thin(0.16), 0)
    street.quad(p, u, v, POLE, PLAIN, GREY)
    street.light(reach, 6.9, 0, AMBER, 0.5, power=26.0)


def _sign(street, s, lat):
    """A traffic sign: warning, ban, order or direction board."""
    kind, low = int(street.rng.integers(len(PLATES))), street.rng.uniform(2.0, 2.5)
    width, high, taper, outline, inner, symbol, colours = PLATES[kind]
    _post(street, s, lat, low + 0.6, 0.09)
    for k, (a, b) in enumerate(((width, high), (width * inner, high * inner), (symbol, 0.3 * high))):
        p, outlines = (-a / 2, low + (0.42 if taper else 0.5) * (high - b), -0.05 - 0.02 * k), (outline, outline, SOLID)
        street.quad(p, (a, 0, 0), (0, b, 0), TRAFFIC_SIGN, PLAIN, colours[k], (taper * (k < 2),) * 2, outlines[k])


def _signals(street, s, lat, arm=0.0):
    """A traffic light; with an arm it also hangs over the road."""
    state = int(street.rng.integers(3))
    colour = (RED, (1.0, 0.6, 0.1), (0.1, 1.0, 0.4))[state]
    _post(street, s, lat, 5.9 if arm else 3.2, 0.14, arm, 5.7)
    for x, low in ((0.0, 2.3), (arm, 4.9))[: 2 if arm else 1]:
        p, u, v = (x - 0.2, low, -0.1), (0.4, 0, 0), (0, 1.1, 0)
        street.quad(p, u, v, TRAFFIC_LIGHT, PLAIN, (0.07, 0.08, 0.07))
        for k in range(3):
            p, u, v, lit = (x - 0.14, low + 0.78 - 0.36 * k, -0.12), (0.28, 0, 0), (0, 0.28, 0), k == state
            street.quad(p, u, v, TRAFFIC_LIGHT, GLOW if lit else PLAIN, colour if lit else DARK, outline=DISC)
        street.light(x, low + 0.92 - 0.36 * state, -0.15, colour, 0.2)


def _building(street, s, lat, length, depth, floors, house):
    """A block or house from `lat` outwards; houses have gables, some blocks pitched roofs."""
    rng = street.rng
    street.at(s, lat)
    kind = int(rng.choice((BRICK, PLASTER, OFFICE, GLASS), p=(0.5, 0.5, 0, 0) if house else (0.3, 0.4, 0.18, 0.12)))
    colour = (0.55, 0.6, 0.64) if kind == GLASS else street.pick(BRICKS if kind == BRICK else PLASTERS)
    a, c, high = (0, depth) if lat > 0 else (-depth, 0), (-length / 2, length / 2), floors * rng.uniform(2.8, 3.4)
    values, tile = (kind, not house and rng.random() < 0.6), street.pick(TILES)
    street.box(a, (0, high), c, BUILDING, (FACADE,) * 3, colour, values=values, top=GREY)
    if house:
        b, inset = (high, high + depth * 0.4), (depth / 2 - 0.01, 0, 0)
        street.box(a, b, c, BUILDING, (PLAIN, COURSES, PLAIN), colour, inset, sides=tile, values=(0.4, -0.3))
    elif kind != GLASS and rng.random() < 0.45:
        b, inset = (high, high + 2.4), (2.0, 0.8, 0.8)
        street.box(a, b, c, BUILDING, (COURSES,) * 3, tile, inset, values=(0.4, -0.3))


def _barrier(street, side, lat, kind):
    """A fence, wall or hedge along one side, in straight pieces of 6 m."""
    high, share = street.rng.uniform(1.1, 2.0), street.pick((0.24, 0.24, 0.9))  # bars or planks
    stone, fence = street.pick([*BRICKS, (0.6, 0.6, 0.6)]), street.pick(FENCES)
    for s in np.arange(-8.0, 110.0, 6.0):
        if not street.clear(s, s + 6):
            continue
        street.at(s + 3, side * lat)
        length = 6 * (1 + abs(street.bend) * lat) + 0.02
        p, u, v = (0, 0, -length / 2), (0, 0, length), (0, high, 0)
        if kind == "fence":
            street.quad(p, u, v, FENCE, PLAIN, fence, outline=BARS, values=(length, high, share))
        elif kind == "wall":
            street.quad(p, u, v, WALL, COURSES, stone, values=(0.2, 0.12) if stone in BRICKS else (0.9, -0.3))
        else:
            street.quad(p, u, v, VEGETATION, LEAF, (0.36, 0.52, 0.24), outline=LEAVES, values=(HEDGE, length, 0.8))


def _front(street, side, base, kind):
    """What stands beyond one sidewalk: blocks, houses in gardens, a park, or a railway."""
    rng, s, tall, blocks = street.rng, -14.0, street.rng.integers(3, 7), kind == "blocks"
    built, setback = blocks or kind == "houses", 0.05 if blocks else rng.uniform(3.5, 7)
    if not blocks:
        _barrier(street, side, base + 0.3, street.pick(("fence", "fence", "wall", "hedge")))
    start, paint = rng.uniform(8, 38), street.pick(PAINTS)
    for k in range(int(rng.choice((0, 2, 3, 4), p=(0.1, 0.3, 0.3, 0.3))) if kind == "rail" else 0):
        _vehicle(street, "train", start + 13.2 * k, side * (base + 4.2), 0.0, True, paint)
    while s < 150:
        length, depth = rng.uniform(8, 15) * (1.5 if blocks else 1.0), rng.uniform(9, 12)
        if not street.clear(s, s + length):
            s += 2.0
            continue
        middle, gap = s + length / 2, 0 if blocks else rng.uniform(3, 9)
        if built:
            floors = tall + rng.integers(-1, 2) if blocks else rng.integers(1, 4)
            _building(street, middle, side * (base + setback), length, depth, floors, not blocks)
        if blocks and abs(middle - street.crossing) < 32:  # the crossing street's own
            _building(street, middle, side * (base + depth + rng.uniform(0, 4)), length, 16, floors + 1, False)
        for lat in TREES[kind]:
            if rng.random() < 0.65:
                at = s + length + gap / 2 if built else s + length * rng.random()
                _tree(street, at, side * (base + lat + rng.uniform(0, 5)), rng.uniform(0.75, 1.3))
        s += length + gap


def _traffic(street):
    """Vehicles in the lanes (right-hand traffic) and parked ones."""
    rng, weights = street.rng, np.array([row[1] for row in VEHICLES.values()])
    density = rng.uniform(0.2, 0.75)
    for lane in range(-street.lanes, street.lanes):
        lat, oncoming = (lane + 0.5) * LANE, lane < 0
        s = 13.0 if abs(lat - street.ego) < 1.2 else rng.uniform(5, 14)  # where the next rear stands
        while s < 110:
            kind = str(rng.choice(list(VEHICLES), p=weights / weights.sum()))
            label, _, length = VEHICLES[kind][:3]
            cycle, turn = label in (MOTORCYCLE, BICYCLE), math.pi * oncoming
            shift = (0.8 if cycle else rng.uniform(-0.2, 0.2)) * (-1 if oncoming else 1)
            if rng.random() < density:
                (_cycle if cycle else _vehicle)(
                    street, label if cycle else kind, s + length / 2, lat + shift, turn, True
                )
                s += length
            s += rng.uniform(5, 16)
    for side in (-1, 1) if street.parking else ():
        filled = rng.uniform(0.3, 0.9)
        for s in np.arange(rng.uniform(1, 7), 90, 6.4):
            if rng.random() < filled and street.clear(s - 3, s + 8):
                kind = street.pick(("saloon", "hatch", "suv", "van"))
                _vehicle(street, kind, s, side * (street.edge - 1.1), math.pi * (side < 0), False)


def _furniture(street):
    """Lamps, street trees, signs, traffic lights and parked cycles along the kerbs."""
    rng, edge = street.rng, street.edge
    start, rows = rng.uniform(4, 16), rng.random(2) < {"canyon": 0.35, "avenue": 0.95}.get(street.kind, 0.3)
    for side, trees, verge in zip((-1, 1), rows, street.verge, strict=True):
        for k, s in enumerate(np.arange(start + 11 * (side > 0), 140, 22)):
            if street.clear(s, s):
                _lamp(street, s, side * (edge + 0.5))
            for shift in (5.5, 14.5) if trees and street.clear(s + 3, s + 17) else ():
                _tree(street, s + shift, side * (edge + max(verge / 2, 0.55)), rng.uniform(0.75, 1.05))
            if k < 3 and rng.random() < 0.65:
                _sign(street, s + rng.uniform(2, 9), side * (edge + 0.6))
        for s in np.arange(rng.uniform(3, 10), 60, 9.0):
            for k in range(int(rng.integers(1, 5)) if rng.random() < 0.3 else 0):
                label = BICYCLE if rng.random() < 0.7 else MOTORCYCLE
                _cycle(street, label, s + 0.9 * k, side * (edge + verge + 0.75), rng.uniform(0.9, 1.3), False)
        arm = -side * min(edge * 0.55, 4.5) * (rng.random() < 0.45)
        if street.crossing > 0:
            _signals(street, street.crossing - CROSS - 2.0, side * (edge + 0.6), arm)


def _people(street):
    """Walkers on the sidewalks and the zebra crossing, and somebody on a cycle beside the lanes."""
    rng = street.rng
    for _ in range(int(rng.integers(3, 14))):
        right = int(rng.integers(2))
        lat = street.base(right) - rng.uniform(0.3, street.walk[right] - 0.5)
        s = rng.uniform(5, 22) if rng.random() < 0.5 else rng.uniform(15, 65)
        for k in range(1 + (rng.random() < 0.3)):
            _person(street, s + 0.2 * k, (1 if right else -1) * (lat + 0.6 * k - 0.3))
    for _ in range(int(rng.integers(0, 4)) if street.crossing > 0 else 0):
        _person(street, street.crossing - CROSS - 1.9 + rng.uniform(-1, 1), rng.uniform(-1, 1) * street.edge)
    if rng.random() < 0.45:
        label, turn = street.pick((BICYCLE, BICYCLE, MOTORCYCLE)), rng.uniform(-0.08, 0.08)
        _cycle(street, label, rng.uniform(7, 24), street.lanes * LANE - 0.4, turn, True)


def _backdrop(street):
    """Woods and the skyline beyond the street."""
    rng, town = street.rng, street.kind == "canyon"
    for x in np.arange(-420, 420, 28.0):
        street.frame, street.number, street.facing = (x, rng.uniform(205, 225), 1.0, 0.0), rng.random(), True
        p, v, values = (-17, 0, 0), (0, rng.uniform(9, 15), 0), (HEDGE, 28, 0.8)
        street.quad(p, (34, 0, 0), v, VEGETATION, LEAF, (0.24, 0.36, 0.2), outline=LEAVES, values=values)
        if rng.random() < (0.8 if town else 0.35):
            b, colour, kind = (0, rng.uniform(10, 28) * (1 + town)), street.pick(PLASTERS), rng.integers(1, 5)
            street.box((-9, 9), b, (-6, 6), BUILDING, (FACADE,) * 3, colour, values=(kind,))
