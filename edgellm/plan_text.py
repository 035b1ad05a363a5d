"""A plan in words, as `edgellm show --plan` prints it."""

from __future__ import annotations

from itertools import groupby

from edgellm.plan import (
    Angles,
    Apply,
    Attention,
    Buffer,
    Combine,
    Embed,
    ExpertMatmul,
    Matmul,
    Normed,
    Op,
    Plan,
    RopeAppend,
    Route,
    ShortConv,
    Source,
    Turned,
    kind_of,
    last_name,
)
from edgellm.tensor import Tensor


def describe(plan: Plan) -> list[str]:
    """The plan in words, a line an op; layers that are alike are told once."""
    lines: list[str] = []
    groups = [(layer, [_line(op) for op in ops]) for layer, ops in groupby(plan.ops, key=_Layers())]
    for told, alike in groupby(groups, key=lambda group: group[1]):
        layers = [layer for layer, _ in alike]
        if layers[0] is not None:
            lines.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}, each")
        lines += told if layers[0] is None else [f"  {line}" for line in told]
    return [*lines, f"{len(plan.ops)} ops; {plan.bytes_read() / 1e6:.1f} MB of weights are read for each step"]


class _Layers:
    """The layer of each op in turn: of its weights, or for an op that has none, of the one before it."""

    def __init__(self) -> None:
        self._layer: int | None = None

    def __call__(self, op: Op) -> int | None:
        weights = op.weights[:1] if isinstance(op, ExpertMatmul) else [getattr(op, "weight", None)]
        if isinstance(op, (Embed, Angles)):
            self._layer = None
        elif weights[0] is not None:
            name = weights[0].name
            self._layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        return self._layer


def _line(op: Op) -> str:
    if isinstance(op, Embed):
        made = f"{op.out.name} {'+=' if op.by_position else '='} row of {last_name(op.table)} for each "
        made += "position" if op.by_position else "token"
        return f"{_times(made, op.scale):<52}{_matrix(op.table)}"
    if isinstance(op, Angles):
        made = f"{op.out.name} = cos, sin of each position times {len(op.frequencies)} frequencies"
        return _times(made, op.scale)
    if isinstance(op, RopeAppend):
        return f"{_head(op.q)}, {_head(op.k)} -> key cache, {op.v.name} -> value cache   {op.q.head_dim} to a head"
    if isinstance(op, Attention):
        cap = f", scores capped at {op.softcap:g}" if op.softcap else ""
        return f"{op.out.name} = attention({op.q.name}, caches{cap})"
    if isinstance(op, ShortConv):
        return f"{f'{op.out.name} = short_conv({op.source.name}, cache)':<52}{_matrix(op.weight)}"
    if isinstance(op, Route):
        shares = ", shares that sum to 1" if op.normalize else ""
        return f"experts, shares = the {op.n_used} best of softmax({op.source.name}){shares}"
    if isinstance(op, Combine):
        return _made(op, f"sum of shares * {op.source.name}")
    if isinstance(op, Apply):
        return _made(op, _source(op.source))
    if isinstance(op, ExpertMatmul):
        made = f"{op.out.name} = {_source(op.source)} @ {last_name(op.weights[0])}.T of each expert"
        return f"{made:<52}{_matrix(op.weights[0])}  {op.route.n_used} of {len(op.weights)} experts"
    made = _made(op, f"{'(the same)' if op.same_input else _source(op.source)} @ {last_name(op.weight)}.T")
    made = f"{made} + {last_name(op.bias)}" if op.bias else made
    made = _times(f"{made} + {op.low.x.name} @ b.T" if op.low else made, op.scale)
    return f"{made:<52}{_matrix(op.weight)}{'  wanted rows, or the best token of each' if op.logits else ''}"


def _made(op: Matmul | Apply | Combine, value: str) -> str:
    if not op.adds:
        return f"{op.out.name} = {value}"
    return f"{op.out.name} += {value}" if op.adds == 1 else f"{op.out.name} += {op.adds:g} * {value}"


def _times(made: str, scale: float) -> str:
    return made if scale == 1 else f"{made}, times {scale:g}"


def _head(x: Turned) -> str:
    inner = f"rms_norm({x.x.name})" if x.norm else x.x.name
    turned = f"rope({inner})" if x.frequencies is not None else inner
    return f"rms_norm({turned})" if x.turned_norm else turned


def _source(source: Source) -> str:
    if isinstance(source, Buffer):
        return source.name
    if isinstance(source, Normed):
        return f"{kind_of(source)}({source.x.name}{' by head' if source.per_head else ''})"
    return (
        f"{source.activation}({source.x.name} left) * right" if source.gates else f"{kind_of(source)}({source.x.name})"
    )


def _matrix(weight: Tensor) -> str:
    rows, cols = weight.shape
    return f"{rows:>7} x {cols:<6}{weight.format:<4}{weight.data.nbytes / 1e6:>8.2f} MB"
