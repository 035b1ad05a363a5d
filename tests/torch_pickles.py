"""Files as torch.save writes them, put together by hand: no torch needed, and hostile ones as easily as sound ones."""

import pickle
import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {"float32": "FloatStorage", "uint8": "ByteStorage"}


def value(thing):
    """What pushes a constant: a pickle of it without its frame."""
    return pickle.dumps(thing, 2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(function, *arguments):
    return function + group(*arguments) + b"R"


def dictionary(items):
    return b"}(" + b"".join(value(key) + content for key, content in items.items()) + b"u"


def program(content):
    return b"\x80\x02" + content + b"."


def storage(key, size, kind="FloatStorage", *more):
    return group(value("storage"), name("torch", kind), value(key), value("cpu"), value(size), *more) + b"Q"


def tensor(shape, strides=None, offset=0, key="0", size=None, kind="FloatStorage"):
    size = int(np.prod(shape)) if size is None else size
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape))) if strides is None else strides
    return call(
        name("torch._utils", "_rebuild_tensor_v2"), storage(key, size, kind), value(offset), value(shape),
        value(strides), value(False), call(name("collections", "OrderedDict")),
    )  # fmt: skip


def write_zip(path, content, storages, root="archive", compression=zipfile.ZIP_STORED, **more):
    """`storages` and `more` are bytes by key and by member."""
    members = {"data.pkl": program(content), "byteorder": b"little", **more}
    members |= {f"data/{key}": data for key, data in storages.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in members.items():
            archive.writestr(f"{root}/{member}", data)


def write_legacy(path, content, storages, sizes, machine=None, version=1001):
    """`sizes` are in numbers."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} if machine is None else machine
    heads = [pickle.dumps(part, 2) for part in (MAGIC, version, machine)]
    keys = pickle.dumps(list(storages), 2)
    data = b"".join(struct.pack("<q", sizes[key]) + numbers for key, numbers in storages.items())
    path.write_bytes(b"".join(heads) + program(content) + keys + data)


def save(path, arrays, legacy=False):
    """A state_dict of arrays, each in a storage of its own."""
    content = dictionary(
        {
            name: tensor(array.shape, key=str(i), kind=STORAGES[str(array.dtype)])
            for i, (name, array) in enumerate(arrays.items())
        }
    )
    storages = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}
    if legacy:
        write_legacy(path, content, storages, {str(i): array.size for i, array in enumerate(arrays.values())})
    else:
        write_zip(path, content, storages)
