"""What the kernels' table measures: shapes, with the goals of their rows, and the rows' names."""

LAYERS = {  # T, D, F, E, K: goals of forward and of forward + backward, TFLOP/s, saved MiB
    (24576, 1536, 256, 128, 8): (420, 350, 268),
    (32768, 4096, 512, 128, 8): (480, 555, 773),
    (32768, 4096, 1024, 128, 8): (560, 570, None),
    (16384, 4096, 14336, 8, 2): (655, 570, None),
    (32768, 2048, 768, 128, 8): (520, 500, None),
}
# E, K, T: microseconds
ROUTES = {(128, 8, 1): 6, (128, 8, 256): 8, (128, 8, 4096): 14, (128, 8, 32768): 30}
PERMUTES = {(128, 8, 32768, 2048): 443}  # and D
GROUPS = {(256, 8, 32768): 45}
# T, D, F, E, K: microseconds
DECODES = {
    (1, 2048, 768, 128, 8): 40,
    (256, 2048, 768, 128, 8): 440,
    (1, 4096, 14336, 8, 2): 255,
}
DRAWN = (1, 4)  # neighbours of the shapes drawn at run time, by their place in LAYERS
KINDS = ("forward", "forward_backward", "saved", "peak")


def layer_name(kind: str, shape: tuple[int, ...]) -> str:
    return "/".join([kind, *map(str, shape)])


def route_name(kind: str, shape: tuple[int, ...]) -> str:
    return f"{kind}/" + "/".join(f"{n}{size}" for n, size in zip("EKTD", shape, strict=False))


def decode_name(kind: str, shape: tuple[int, ...]) -> str:
    T, *sizes = shape
    return "/".join([kind, *map(str, sizes), f"T{T}"])


def names() -> list[str]:
    routes = [route_name(kind, shape) for shape in ROUTES for kind in ("route", "route_eager")]
    routes += [route_name("route_groups", shape) for shape in GROUPS]
    routes += [route_name("route_permute", shape) for shape in PERMUTES]
    layers = [layer_name(kind, shape) for shape in LAYERS for kind in KINDS]
    decodes = [decode_name(kind, shape) for shape in DECODES for kind in ("decode", "decode_layer")]
    return routes + layers + [f"drawn/{place}" for place in DRAWN] + decodes
