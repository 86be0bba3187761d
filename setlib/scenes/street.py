"""Streets: what stands where in a rendered scene, drawn from (seed, index) alone. No pixels and no light here.

A street is a list of planar faces with class, material and colour, seen from a camera in one of its lanes, its lights,
and the plan of the ground itself.

Coordinates are metres. Road: s along, lat to the right of the centre line. Objects: a to the right, b up, c forward.
Camera: x right, y up from the camera, z along the optical axis. A face is the parallelogram p + u U + v V with u and v
in 0..1, narrowed by its tapers towards v = 1. The order of the random draws is part of the content.
"""

import math

import numpy as np
from numpy import ndarray

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN) = range(10)
(SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(10, 19)  # Cityscapes train ids
PLAIN, ROUND, LEAF, FACADE, COURSES, GLOW = range(6)  # materials
CABIN, SCREEN, REAR, HEAD, COACH, COACH_REAR, COACH_HEAD, DOOR = range(6, 14)  # of vehicles
SOLID, DISC, RING, LEAVES, BARS = range(5)  # outlines of faces
CROWN, HEDGE = range(2)  # values[0] of LEAF
BRICK, PLASTER, OFFICE, GLASS, SHOP = range(5)  # values[0] of FACADE
LEAFY = {"material": LEAF, "outline": LEAVES}
LANE, KERB, CROSS = 3.3, 0.2, 4.5  # lane and kerb width, half width of a crossing street
RED, WHITE, AMBER = (1.0, 0.06, 0.03), (1.0, 0.95, 0.8), (1.0, 0.72, 0.38)  # lights

# Columns of faces: colour is 0..1, gamma 2; values of the material; closed ones are seen from outside only
FACE = "p,u,v,taper,label,material,outline,colour,values,seed,closed,facing"
FORMATS = "3f8,3f8,3f8,2f4,i8,i8,i8,3f4,3f4,f4,?,?"


def palette(text: str) -> list[tuple]:
    """Colours in 0..1 of words such as 'ff8000'."""
    return [tuple(value / 255 for value in bytes.fromhex(word)) for word in text.split()]


DARK, STEEL, GREY = palette("191a1c 808587 807d7a")
PAINTS = palette("bf1a1a e6e6e6 1f1f24 8c9199 1f408c ccccd1 4d5259 f2bf1a 1a664d 804026 598cbf b3ad99")
PLASTERS, BRICKS = palette("d9c79e ccc2b3 b88c6b e0d9cc a8b3b3"), palette("995440 ad7a57 804d42 b89975")
TILES, FENCES = palette("853d2b 5c4d4a 4d525c"), palette("29332e bfc2c2 805c3d 9e9985")
COATS, TROUSERS = palette("262e4d b32626 d9d9cc 336699 cca633 4d734d"), palette("292e42 1f1f21 4d5c80 6b614d")
SKINS, HAIR = palette("d9a88a 734d38"), palette("1f1712 664729 b3ada6")
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
BICYCLE_FRAME = ((-0.5, 0.34, 0.9, 0.5), (-0.1, 0.34, -0.1, 0.58), (0.54, 0.34, -0.14, 0.68))  # c, b and their steps


class Thing:
    """An object at (x, z) of the camera's metres, turned by `angle` radians; its faces and lights go to its street."""

    def __init__(self, street: "Street", label: int, x: float, z: float, angle: float = 0.0, facing: bool = True):
        self.street, self.label, self.x, self.z, self.facing = street, label, x, z, facing
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.seed = street.rng.random()  # of its textures

    def thin(self, width: float) -> float:
        """`width`, or the metres that stay visible at this distance."""
        return max(width, 0.0032 * self.z)

    def turned(self, a: float, b: float, c: float) -> tuple[float, float, float]:
        """A direction of the object as one of the camera."""
        return a * self.cos + c * self.sin, b, c * self.cos - a * self.sin

    def quad(self, p, u, v, colour, material=PLAIN, taper=(0, 0), outline=SOLID, values=(), closed=False):
        """Adds the face p + u U + v V; a closed one is seen from outside only (u right, v up)."""
        x, y, z = self.turned(*p)
        place = (x + self.x, y - self.street.height, z + self.z)
        kind, values = (self.label, material, outline), (*values, 0, 0, 0)[:3]
        own = (colour, values, self.seed, closed, self.facing)
        self.street.rows.append((place, self.turned(*u), self.turned(*v), taper, *kind, *own))

    def card(self, a, b, width, height, colour, c=0.0, lean=0.0, material=PLAIN, taper=0.0, outline=SOLID, values=()):
        """Adds an upright face across the object, centred at a, from b upwards (downwards where height < 0)."""
        u, v = (width, 0, 0), (lean, height, 0)
        self.quad((a - width / 2, b, c), u, v, colour, material, (taper, taper), outline, values)

    def box(self, a, b, c, colour, materials=(FACADE,) * 3, inset=(0, 0, 0), top=None, sides=None, values=()):
        """Adds a box over the ranges a, b, c; `inset` narrows its top at the sides, the rear and the front.

        materials: of the rear, the sides and the front; `sides` and `top`: their own colours.
        """
        (x0, x1), (y0, y1), (z0, z1) = a, b, c
        width, high, length = x1 - x0, y1 - y0, z1 - z0
        side, rear, front = inset
        across, back, ahead = side / width, rear / length, front / length
        for p, u, v, material, paint, taper in (
            ((x0, y0, z0), (width, 0, 0), (0, high, rear), materials[0], colour, (across, across)),
            ((x1, y0, z1), (-width, 0, 0), (0, high, -front), materials[2], colour, (across, across)),
            ((x0, y0, z1), (0, 0, -length), (side, high, 0), materials[1], sides or colour, (ahead, back)),
            ((x1, y0, z0), (0, 0, length), (-side, high, 0), materials[1], sides or colour, (back, ahead)),
        ):
            self.quad(p, u, v, paint, material, taper, values=values, closed=True)
        p, u, v = (x0 + side, y1, z0 + rear), (width - 2 * side, 0, 0), (0, 0, length - rear - front)
        self.quad(p, u, v, top or colour, closed=True)

    def light(self, a: float, b: float, c: float, colour: tuple, width: float, power: float = 0.0):
        """Adds a light: a glow `width` metres wide; with `power` > 0 it lights the street."""
        x, z = self.x + a * self.cos + c * self.sin, self.z - a * self.sin + c * self.cos
        self.street.spots.append((x, b - self.street.height, z, *colour, width, power))


class Street:
    """Plan of one street, the camera in it, and its objects.

    Ground: `edge` is half the road's width; verge, walk (widths) and base (distance of the sidewalk's outer edge from
    the centre line) hold left and right; `crossing` is s of the crossing street. All in metres.
    Camera: yaw in radians, height in metres, focal length and horizon in image heights, `ego` its lat.
    Objects: `faces` is a record array (n,) of FACE with p, u and v in camera metres; `lights` is (n, 8): place,
    colour, width of the glow in metres, power.
    """

    def __init__(self, seed: int, index: int):
        self.rng = rng = np.random.default_rng((seed, index, 0))
        self.kind = str(rng.choice(list(KINDS), p=[row[0] for row in KINDS.values()]))
        _, lanes, parked, verge, walk, left, right = KINDS[self.kind]
        self.lanes, self.has_parking = int(rng.choice(lanes)), rng.random() < parked
        self.bend = float(rng.choice([-1, 0, 1]) * rng.uniform(0.0008, 0.0045))  # x = bend s^2 / 2
        self.yaw, self.height = rng.uniform(-0.07, 0.07), rng.uniform(1.3, 1.9)
        self.focal, self.horizon = rng.uniform(1.1, 1.5), rng.uniform(0.4, 0.5)
        self.ego = LANE * (0.5 + int(rng.integers(self.lanes))) + rng.uniform(-0.3, 0.3)
        self.edge = self.lanes * LANE + 0.3 + (2.1 if self.has_parking else 0.0)
        self.verge, self.walk = rng.uniform(*verge, 2), rng.uniform(*walk, 2)
        self.base = (self.edge + self.verge + self.walk).tolist()
        self.fronts = [str(rng.choice(left)), str(rng.choice(right))][:: rng.choice([-1, 1])]
        self.crossing = rng.uniform(17, 55) if rng.random() < 0.7 else -1000.0  # far behind: there is none
        self.rows, self.spots = [], []  # of faces and lights
        for side, base, front in zip((-1, 1), self.base, self.fronts, strict=True):
            self._front(side, base, front)
        for add in (self._traffic, self._furniture, self._people, self._backdrop):
            add()
        self.faces = np.rec.fromrecords(self.rows, formats=FORMATS, names=FACE)
        self.lights = np.array(self.spots).reshape(-1, 8)

    def is_clear(self, start: float, stop: float) -> bool:
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
        verge, base = (np.where(lat > 0, right, left) for left, right in (self.verge, self.verge + self.walk))
        walk = (beyond < KERB) | (beyond >= verge) & (beyond < base) | (self.kind == "canyon") | (across < CROSS + 2.2)
        return np.where((beyond < 0) | (across < CROSS), ROAD, np.where(walk, SIDEWALK, TERRAIN))

    def pick(self, choices):
        """One of `choices`, drawn from the street's random numbers."""
        return choices[self.rng.integers(len(choices))]

    def place(self, label: int, s: float, lat: float, turn: float = 0.0, facing: bool = False) -> Thing:
        """Starts an object at (s, lat): heading along the road plus `turn` radians, or facing the camera."""
        slope = self.bend * s
        norm = math.sqrt(1 + slope * slope)
        x, z = slope * s / 2 + lat / norm - self.ego, s - lat * slope / norm
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        angle = 0.0 if facing else math.atan(slope) + turn - self.yaw
        return Thing(self, label, x * cos - z * sin, x * sin + z * cos, angle, facing)

    def _vehicle(self, kind: str, s: float, lat: float, turn: float, moving: bool, paint: tuple | None = None):
        """A car, truck, bus or train: a body, a cabin and a cargo box where it has them, and wheels."""
        label, _, length, width, low, top, cabin, cargo = VEHICLES[kind]
        vehicle = self.place(label, s, lat, turn)
        paint, half, rear, front = paint or self.pick(PAINTS), width / 2, -length / 2, length / 2
        body = (-half, half), (low, top), (rear, front)
        if cabin:
            start, end, high, back, ahead = cabin
            vehicle.box(*body, paint, (REAR, PLAIN, HEAD), (0.05, 0.05, 0.12), values=(moving,))
            a, c, inset = (0.05 - half, half - 0.05), (rear + start, rear + end), (0.06 if cargo else 0.2, back, ahead)
            vehicle.box(a, (top, high), c, paint, (SCREEN, CABIN, SCREEN), inset)
        else:
            for c in np.arange(rear + 1.5, front - 2, 4.5):
                vehicle.quad((half, 0.4, c), (0, 0, 1.2), (-0.06, 2.3, 0), paint, DOOR, values=(moving,))
            coach, inset = (COACH_REAR, COACH, COACH_HEAD), (0.08, 0.1, 0.15)
            vehicle.box(*body, paint, coach, inset, top=(0.75, 0.75, 0.75), values=(moving,))
        if cargo:
            a, c = (-half - 0.07, half + 0.07), (rear - 0.05, front - 2.1)
            vehicle.box(a, (1.2, cargo), c, self.pick(PAINTS), (COURSES,) * 3, values=(1.7, -0.25))
        radius, overhang = (0.33, 0.19 * length) if label == CAR else (0.48, 1.2)
        for side in (-1, 1):
            for c in (rear + 0.18 * length, front - overhang):
                wheel, hub = 2 * radius, 2 * radius - 0.4
                p, q = (side * (half + 0.01), 0, c - radius), (side * (half + 0.02), 0.2, c - radius + 0.2)
                vehicle.quad(p, (0, 0, wheel), (0, wheel, 0), DARK, outline=DISC)
                vehicle.quad(q, (0, 0, hub), (0, hub, 0), GREY, outline=DISC)
                tread = c + math.copysign(radius * 0.7, c)
                vehicle.card(side * (half - 0.16), 0, 0.24, radius * 1.3, DARK, tread)
            if moving and label != TRAIN:
                vehicle.light(side * half * 0.75, 0.66, rear - 0.1, RED, 0.16)
                vehicle.light(side * half * 0.75, 0.66, front + 0.1, WHITE, 0.34)

    def _person(self, s: float, lat: float, rides: bool = False):
        """A walker, or somebody who sits on a cycle."""
        person = self.place(RIDER if rides else PERSON, s, lat, facing=True)
        size = 1.0 if rides else self.rng.uniform(0.86, 1.06)
        colours = {"coat": self.pick(COATS), "trousers": self.pick(TROUSERS), "skin": self.pick(SKINS)}
        colours["hair"] = (0.8, 0.2, 0.15) if rides else self.pick(HAIR)
        stride = 0.5 if rides else self.rng.uniform(0.4, 2.0)
        for x, y, width, height, lean, taper, outline, part in BODY:
            y, height = (y + 0.1, max(height, -0.66)) if rides else (y * size, height * size)
            look = {"material": ROUND, "taper": taper, "outline": outline}
            for side in (-1, 1) if x else (1,):
                person.card(side * x * size, y, width * size, height, colours[part], lean=side * lean * stride, **look)

    def _cycle(self, label: int, s: float, lat: float, turn: float, ridden: bool):
        """A bicycle or motorcycle, with a rider where `ridden`."""
        cycle, is_motor = self.place(label, s, lat, turn), label == MOTORCYCLE
        paint, radius, bar = self.pick(PAINTS), 0.34, cycle.thin(0.06)
        tyre, reach, lamp = (0.2, 0.7, 0.3) if is_motor else (0.08, 0.54, 0.12)
        for c in (-reach, reach):
            cycle.quad((0, 0, c - radius), (0, 0, 2 * radius), (0, 2 * radius, 0), DARK, outline=RING)
            cycle.card(0, 0.02, cycle.thin(tyre), 0.62, DARK, c)
        for c, b, ahead, up in BICYCLE_FRAME:
            cycle.quad((0, b, c), (0, up, ahead), (0, bar, bar / 2), paint)
        cycle.card(0, 1.0, 0.56, bar, DARK, 0.37)
        if is_motor:
            a, b, c = (-0.16, 0.16), (0.42, 0.86), (-0.75, 0.5)
            cycle.box(a, b, c, paint, (REAR, PLAIN, HEAD), (0.05, 0, 0.2), values=(ridden,))
        if ridden:
            cycle.light(0, 0.7, -0.85, RED, 0.1)
            cycle.light(0, 0.75, 0.8, WHITE, lamp)
            self._person(s - 0.1, lat, rides=True)

    def _tree(self, s: float, lat: float, size: float):
        """A round or tall tree: a trunk, and a crown of leafy discs at several depths."""
        rng, tree = self.rng, self.place(VEGETATION, s, lat, facing=True)
        green = (rng.uniform(0.32, 0.5), rng.uniform(0.52, 0.64), rng.uniform(0.18, 0.3))
        trunk, spread, tall = rng.uniform(1.8, 2.8) * size, rng.uniform(1.6, 2.4) * size, self.pick((0.8, 0.8, 2.0))
        tree.card(0, 0, 0.34 * size, trunk + spread * 0.8, (0.34, 0.27, 0.2), material=ROUND, taper=0.2)
        for k in range(8):
            r, height = spread * rng.uniform(0.5, 0.75), (k / 3.5 - 1.0) * 0.95
            a = (k * 0.618 % 1 * 2 - 1) * spread * 0.8 * math.sqrt(max(1.1 - height * height, 0.05)) / tall
            b, c = trunk + spread * tall * (1 + 0.8 * height) - r, rng.uniform(-0.8, 0.8) * spread
            values, tree.seed = (CROWN, 2 * r, 0.75 + 0.25 * height), rng.random()
            tree.card(a, b, 2 * r, 2 * r, green, c, values=values, **LEAFY)

    def _post(self, s: float, lat: float, height: float, width: float, arm: float = 0.0, at: float = 0.0) -> Thing:
        """A post, with an arm of `arm` metres to the right at the height `at`."""
        post = self.place(POLE, s, lat, facing=True)
        post.card(0, 0, post.thin(width), height, STEEL, material=ROUND)
        if arm:
            post.quad((0, at, 0), (arm, 0.2, 0), (0, post.thin(0.1), 0), STEEL)
        return post

    def _lamp(self, s: float, lat: float):
        """A street lamp whose arm reaches over the road."""
        reach = math.copysign(1.8, -lat)
        lamp = self._post(s, lat, 6.9, 0.16, reach, 6.8)
        lamp.quad((reach * 0.8, 6.98, 0), (reach * 0.45, 0.08, 0), (0, lamp.thin(0.16), 0), GREY)
        lamp.light(reach, 6.9, 0, AMBER, 0.5, power=26.0)

    def _sign(self, s: float, lat: float):
        """A traffic sign: warning, ban, order or direction board."""
        width, high, taper, outline, inner, symbol, colours = self.pick(PLATES)
        low = self.rng.uniform(2.0, 2.5)
        sign = self._post(s, lat, low + 0.6, 0.09)
        sign.label, middle = TRAFFIC_SIGN, 0.42 if taper else 0.5
        for k, size in enumerate((1, inner)):
            b, c = low + middle * (high - high * size), -0.05 - 0.02 * k
            sign.card(0, b, width * size, high * size, colours[k], c, taper=taper, outline=outline)
        sign.card(0, low + middle * (high - 0.3 * high), symbol, 0.3 * high, colours[2], -0.09)

    def _signals(self, s: float, lat: float, arm: float):
        """A traffic light; with an arm it also hangs over the road."""
        state = int(self.rng.integers(3))
        colour = (RED, (1.0, 0.6, 0.1), (0.1, 1.0, 0.4))[state]
        post = self._post(s, lat, 5.9 if arm else 3.2, 0.14, arm, 5.7)
        post.label = TRAFFIC_LIGHT
        for a, low in ((0.0, 2.3), (arm, 4.9)) if arm else ((0.0, 2.3),):
            post.card(a, low, 0.4, 1.1, (0.07, 0.08, 0.07), -0.1)
            for k in range(3):
                lit, b = (colour, GLOW) if k == state else (DARK, PLAIN), low + 0.78 - 0.36 * k
                post.card(a, b, 0.28, 0.28, lit[0], -0.12, material=lit[1], outline=DISC)
            post.light(a, low + 0.92 - 0.36 * state, -0.15, colour, 0.2)

    def _building(self, s: float, lat: float, length: float, depth: float, floors: int, house: bool = False):
        """A block or house from `lat` outwards; houses have gables, some blocks pitched roofs."""
        rng, building = self.rng, self.place(BUILDING, s, lat)
        kind = int(rng.choice((BRICK, PLASTER, OFFICE, GLASS), p=(0.5, 0.5, 0, 0) if house else (0.3, 0.4, 0.18, 0.12)))
        colour = (0.55, 0.6, 0.64) if kind == GLASS else self.pick(BRICKS if kind == BRICK else PLASTERS)
        a, c, high = (0, depth) if lat > 0 else (-depth, 0), (-length / 2, length / 2), floors * rng.uniform(2.8, 3.4)
        has_shops = not house and rng.random() < 0.6
        tile, courses = self.pick(TILES), (0.4, -0.3)
        building.box(a, (0, high), c, colour, top=GREY, values=(kind, has_shops))
        if house:
            gable, inset = (high, high + depth * 0.4), (depth / 2 - 0.01, 0, 0)
            building.box(a, gable, c, colour, (PLAIN, COURSES, PLAIN), inset, sides=tile, values=courses)
        elif kind != GLASS and rng.random() < 0.45:
            building.box(a, (high, high + 2.4), c, tile, (COURSES,) * 3, (2.0, 0.8, 0.8), values=courses)

    def _barrier(self, side: int, lat: float, kind: str):
        """A fence, wall or hedge along one side, in straight pieces of 6 m."""
        high, share = self.rng.uniform(1.1, 2.0), self.pick((0.24, 0.24, 0.9))  # bars or planks
        stone, paint = self.pick([*BRICKS, (0.6, 0.6, 0.6)]), self.pick(FENCES)
        length = 6 * (1 + abs(self.bend) * lat) + 0.02
        courses = (0.2, 0.12) if stone in BRICKS else (0.9, -0.3)
        label, colour, material, outline, values = {
            "fence": (FENCE, paint, PLAIN, BARS, (length, high, share)),
            "wall": (WALL, stone, COURSES, SOLID, courses),
            "hedge": (VEGETATION, (0.36, 0.52, 0.24), LEAF, LEAVES, (HEDGE, length, 0.8)),
        }[kind]
        for s in np.arange(-8.0, 110.0, 6.0):
            if self.is_clear(s, s + 6):
                piece, u, v = self.place(label, s + 3, side * lat), (0, 0, length), (0, high, 0)
                piece.quad((0, 0, -length / 2), u, v, colour, material, outline=outline, values=values)

    def _front(self, side: int, base: float, kind: str):
        """What stands beyond one sidewalk: blocks, houses in gardens, a park, or a railway."""
        rng, s, tall = self.rng, -14.0, self.rng.integers(3, 7)
        is_block, is_built = kind == "blocks", kind in ("blocks", "houses")
        setback = 0.05 if is_block else rng.uniform(3.5, 7)
        if not is_block:
            self._barrier(side, base + 0.3, self.pick(("fence", "fence", "wall", "hedge")))
        start, paint = rng.uniform(8, 38), self.pick(PAINTS)
        if kind == "rail":
            for k in range(rng.choice((0, 2, 3, 4), p=(0.1, 0.3, 0.3, 0.3))):
                self._vehicle("train", start + 13.2 * k, side * (base + 4.2), 0.0, True, paint)
        while s < 150:
            length, depth = rng.uniform(8, 15) * (1.5 if is_block else 1.0), rng.uniform(9, 12)
            if not self.is_clear(s, s + length):
                s += 2.0
                continue
            middle, gap = s + length / 2, 0 if is_block else rng.uniform(3, 9)
            if is_built:
                floors = tall + rng.integers(-1, 2) if is_block else rng.integers(1, 4)
                self._building(middle, side * (base + setback), length, depth, floors, house=not is_block)
            if is_block and abs(middle - self.crossing) < 32:  # the crossing street's own
                self._building(middle, side * (base + depth + rng.uniform(0, 4)), length, 16, floors + 1)
            for lat in TREES[kind]:
                if rng.random() < 0.65:
                    at = s + length + gap / 2 if is_built else s + length * rng.random()
                    self._tree(at, side * (base + lat + rng.uniform(0, 5)), rng.uniform(0.75, 1.3))
            s += length + gap

    def _traffic(self):
        """Vehicles in the lanes (right-hand traffic) and parked ones."""
        rng, weights = self.rng, np.array([row[1] for row in VEHICLES.values()])
        density = rng.uniform(0.2, 0.75)
        for lane in range(-self.lanes, self.lanes):
            lat, right, turn = (lane + 0.5) * LANE, *((-1, math.pi) if lane < 0 else (1, 0.0))
            s = 13.0 if abs(lat - self.ego) < 1.2 else rng.uniform(5, 14)  # where the next rear stands
            while s < 110:
                kind = str(rng.choice(list(VEHICLES), p=weights / weights.sum()))
                label, _, length, *_ = VEHICLES[kind]
                is_cycle = label in (MOTORCYCLE, BICYCLE)
                at = lat + right * (0.8 if is_cycle else rng.uniform(-0.2, 0.2))
                if rng.random() < density:
                    if is_cycle:
                        self._cycle(label, s + length / 2, at, turn, ridden=True)
                    else:
                        self._vehicle(kind, s + length / 2, at, turn, moving=True)
                    s += length
                s += rng.uniform(5, 16)
        for side in (-1, 1) if self.has_parking else ():
            filled = rng.uniform(0.3, 0.9)
            for s in np.arange(rng.uniform(1, 7), 90, 6.4):
                if rng.random() < filled and self.is_clear(s - 3, s + 8):
                    kind, turn = self.pick(("saloon", "hatch", "suv", "van")), math.pi if side < 0 else 0.0
                    self._vehicle(kind, s, side * (self.edge - 1.1), turn, moving=False)

    def _furniture(self):
        """Lamps, street trees, signs, traffic lights and parked cycles along the kerbs."""
        rng, edge = self.rng, self.edge
        start, has_trees = rng.uniform(4, 16), rng.random(2) < {"canyon": 0.35, "avenue": 0.95}.get(self.kind, 0.3)
        for side, first, trees, verge in zip((-1, 1), (start, start + 11), has_trees, self.verge, strict=True):
            for k, s in enumerate(np.arange(first, 140, 22)):
                if self.is_clear(s, s):
                    self._lamp(s, side * (edge + 0.5))
                if trees and self.is_clear(s + 3, s + 17):
                    for shift in (5.5, 14.5):
                        self._tree(s + shift, side * (edge + max(verge / 2, 0.55)), rng.uniform(0.75, 1.05))
                if k < 3 and rng.random() < 0.65:
                    self._sign(s + rng.uniform(2, 9), side * (edge + 0.6))
            for s in np.arange(rng.uniform(3, 10), 60, 9.0):
                for k in range(rng.integers(1, 5) if rng.random() < 0.3 else 0):
                    label = BICYCLE if rng.random() < 0.7 else MOTORCYCLE
                    self._cycle(label, s + 0.9 * k, side * (edge + verge + 0.75), rng.uniform(0.9, 1.3), ridden=False)
            arm = -side * min(edge * 0.55, 4.5) if rng.random() < 0.45 else 0.0
            if self.crossing > 0:
                self._signals(self.crossing - CROSS - 2.0, side * (edge + 0.6), arm)

    def _people(self):
        """Walkers on the sidewalks and the zebra crossing, and somebody on a cycle beside the lanes."""
        rng = self.rng
        for _ in range(rng.integers(3, 14)):
            right = int(rng.integers(2))
            lat = self.base[right] - rng.uniform(0.3, self.walk[right] - 0.5)
            s = rng.uniform(5, 22) if rng.random() < 0.5 else rng.uniform(15, 65)
            for k in range(2 if rng.random() < 0.3 else 1):
                self._person(s + 0.2 * k, (1 if right else -1) * (lat + 0.6 * k - 0.3))
        for _ in range(rng.integers(0, 4) if self.crossing > 0 else 0):
            self._person(self.crossing - CROSS - 1.9 + rng.uniform(-1, 1), rng.uniform(-1, 1) * self.edge)
        if rng.random() < 0.45:
            label, turn = self.pick((BICYCLE, BICYCLE, MOTORCYCLE)), rng.uniform(-0.08, 0.08)
            self._cycle(label, rng.uniform(7, 24), self.lanes * LANE - 0.4, turn, ridden=True)

    def _backdrop(self):
        """Woods and the skyline beyond the street."""
        rng = self.rng
        chance, rise = (0.8, 2) if self.kind == "canyon" else (0.35, 1)
        for x in np.arange(-420, 420, 28.0):
            far = Thing(self, VEGETATION, x, rng.uniform(205, 225))
            values = (HEDGE, 28, 0.8)
            far.card(0, 0, 34, rng.uniform(9, 15), (0.24, 0.36, 0.2), values=values, **LEAFY)
            if rng.random() < chance:
                far.label, high = BUILDING, rng.uniform(10, 28) * rise
                far.box((-9, 9), (0, high), (-6, 6), self.pick(PLASTERS), values=(rng.integers(4),))
