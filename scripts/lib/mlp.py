"""Writes an ONNX model of a usual size, whose weights mean nothing: what is measured is how long it takes."""
import array, random

# Field numbers of onnx.proto.
FLOAT = 1


def number(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(tag, value):
    """A field of a message: a whole number, a text, or bytes."""
    if isinstance(value, int):
        return number(tag << 3) + number(value)
    value = value.encode() if isinstance(value, str) else value
    return number(tag << 3 | 2) + number(len(value)) + value


def tensor(name, dims, values):
    data = array.array("f", values)
    return b"".join(field(1, dim) for dim in dims) + field(2, FLOAT) + field(8, name) + field(9, data.tobytes())


def node(kind, inputs, output):
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)


def value_info(name, width):
    shape = field(1, field(2, "batch")) + field(1, field(1, width))
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, shape)))


def write(path, widths, seed):
    """Layers of these widths, the first the input's, with Relu between them and Softmax at the end; ends named as the digits' are."""
    draw, graph, last = random.Random(seed), field(2, "mlp"), "pixels"
    for at, (width, following) in enumerate(zip(widths, widths[1:])):
        scale = (2 / width) ** 0.5
        graph += field(5, tensor(f"w{at}", (width, following), (draw.gauss(0, scale) for _ in range(width * following))))
        graph += field(5, tensor(f"b{at}", (following,), [0.0] * following))
        graph += field(1, node("MatMul", [last, f"w{at}"], f"m{at}")) + field(1, node("Add", [f"m{at}", f"b{at}"], f"a{at}"))
        is_last = at == len(widths) - 2
        last = "probabilities" if is_last else f"r{at}"
        graph += field(1, node("Softmax" if is_last else "Relu", [f"a{at}"], last))
    graph += field(11, value_info("pixels", widths[0])) + field(12, value_info("probabilities", widths[-1]))
    with open(path, "wb") as file:
        file.write(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
