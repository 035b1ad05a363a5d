"""Numba and LLVM: a body -> the bytes of an object file with the one symbol that `SYMBOL` names.

Numba types the body and all that it calls, and writes LLVM's language; it optimizes nothing. What a kernel consists of
is linked and optimized once, when it is whole: Numba would do that for every function on the way, and make machine
code of each. The symbol is a plain C function of int64, which calls the body past Numba's own wrappers: kernels raise
nothing, and so nothing of Python or Numba is left in the object.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import FunctionType, SimpleNamespace
from typing import Any

from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.core import codegen, compiler, registry
from numba.core.compiler_lock import global_compiler_lock

from edgellm.isa import Isa, host
from edgellm.isa._vectors import primitives, row_primitives
from edgellm.kernels import SYMBOL, Body, Kernel
from edgellm.kernels._calls import calls

FLAGS = {"nopython": True, "error_model": "numpy"}
I64 = ir.IntType(64)


class Bodies:
    """Bodies with an ISA's primitives; each that others call is typed once."""

    def __init__(self, isa: Isa) -> None:
        self._isa, self._target = isa, _target()
        self._primitives = {**primitives(isa.dot4, isa.dot4_u8, isa.ROWS), **calls()}
        self._inlined: dict[tuple[Body, str], Any] = {}

    def object_file(self, kernel: Kernel) -> bytes:
        """The kernel for this machine."""
        with global_compiler_lock:
            module = self._module(kernel)
        machine = _machine()
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization, options.slp_vectorization = True, False
        builder = binding.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        compiled: bytes = machine.emit_object(module)
        return compiled

    def in_process(self, kernel: Kernel) -> Any:
        """The kernel as Numba itself compiles and loads it: an object with `address` and `ctypes`, to be kept."""
        result = self._typed(kernel).signature.return_type
        return cfunc(result(*[types.int64] * kernel.n_arguments), error_model="numpy")(self._body(kernel))

    def _module(self, kernel: Kernel) -> Any:
        """All that the kernel consists of, and its symbol, not optimized yet."""
        typed = self._typed(kernel)
        typed.library.add_ir_module(self._symbol(typed.fndesc))
        typed.library.finalize()
        module = typed.library.linked
        for function in module.functions:
            if not function.is_declaration and function.name != SYMBOL:
                function.linkage = "internal"
        for variable in module.global_variables:
            if not variable.is_declaration:
                variable.linkage = "internal"
        return module

    def _typed(self, kernel: Kernel) -> Any:
        flags, target = compiler.Flags(), self._target
        target.options.parse_as_flags(flags, FLAGS)
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        arguments = (types.int64,) * kernel.n_arguments
        return compiler.compile_extra(
            target.typing_context, target.target_context, self._body(kernel), arguments, None, flags, {}
        )

    def _symbol(self, described: Any) -> ir.Module:
        """int64 SYMBOL(int64, ...): the result of the body, or 0 if it has none."""
        module, convention = ir.Module(SYMBOL), self._target.target_context.call_conv
        module.triple = host()[0]
        callee = convention.get_function_type(described.restype, described.argtypes)
        inner = ir.Function(module, callee, described.llvm_func_name)
        symbol = ir.Function(module, ir.FunctionType(I64, [I64] * len(described.argtypes)), SYMBOL)
        b = ir.IRBuilder(symbol.append_basic_block())
        _, result = convention.call_function(b, inner, described.restype, described.argtypes, symbol.args)
        if described.restype == types.none:
            result = I64(0)
        elif result.type.width < 64:
            result = b.zext(result, I64) if described.restype == types.boolean else b.sext(result, I64)
        b.ret(result)
        return module

    def _body(self, kernel: Kernel) -> Body:
        there = self._primitives
        if kernel.rows:
            there = {**there, **row_primitives(self._isa.dot4, self._isa.dot4_u8, kernel.rows)}
        return self._rebuilt(kernel.body, there, kernel.cache)

    def _rebuilt(self, body: Body, there: dict[str, Any], cache: str) -> Body:
        """The body with an ISA's primitives, and bodies that can be inlined, under the names that it uses."""
        assert isinstance(body, FunctionType)
        names = {name: there[name] for name in body.__code__.co_names if name in there}
        others = stand_ins(cache)
        for name in body.__code__.co_names:
            callee = others.get(name, body.__globals__.get(name))
            if (
                name not in names
                and isinstance(callee, FunctionType)
                and callee.__module__.startswith("edgellm.kernels")
            ):
                names[name] = self._inline(callee, cache)
        return FunctionType(body.__code__, {**body.__globals__, **names}, body.__name__, body.__defaults__)

    def _inline(self, body: Body, cache: str) -> Any:
        if (body, cache) not in self._inlined:
            wrapperless = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
            rebuilt = self._rebuilt(body, self._primitives, cache)
            inlined = njit(error_model="numpy", forceinline=True, **wrapperless)(rebuilt)
            inlined._compiler.targetdescr = self._target
            self._inlined[body, cache] = inlined
        return self._inlined[body, cache]


def stand_ins(cache: str) -> Mapping[str, Body]:
    """For that kind of cache, what takes the place of attention's functions of the same names."""
    if cache == "f16":
        return {}
    module = import_module(f"edgellm.kernels.attention_{cache}")
    return {name: body for name, body in vars(module).items() if getattr(body, "__module__", "") == module.__name__}


class _Library(codegen.JITCodeLibrary):  # type: ignore[misc]
    """What Numba writes for a function, linked with what that calls: no more."""

    @property
    def linked(self) -> Any:
        return self._final_module

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0


class _Codegen(codegen.JITCPUCodegen):  # type: ignore[misc]
    _library_class = _Library

    def set_env(self, name: str, env: Any) -> None:
        """Nothing of Python is used, so its environment is not either."""


def _target() -> Any:
    """Numba's CPU target, but for what turns LLVM's language into machine code."""
    cpu = registry.cpu_target
    cpu.target_context.refresh()
    context = cpu.target_context.subtarget(_internal_codegen=_Codegen("edgellm"))
    return SimpleNamespace(typing_context=cpu.typing_context, target_context=context, options=cpu.options)


def _machine() -> Any:
    """On Linux for code that runs wherever it is put, see image; elsewhere as Numba makes one."""
    triple, name, features = host()
    if "linux" in triple:
        reloc, model = "pic", "small"
    else:
        reloc, model = "static" if triple.startswith(("x86_64", "i686")) else "default", "jitdefault"
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=name, features=features, opt=3, reloc=reloc, codemodel=model, jit=True
    )
