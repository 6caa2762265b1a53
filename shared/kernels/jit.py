"""Compilation of the hot path: kernels, what is inlined into them, one cache.

numba's own cache notices a change only in the file of the cached function, not in the files it calls into; it falls
back to folders beside the source, and runs what it finds there. So the project has a cache of its own:

    kernels/DIGEST/       private; DIGEST (`version.py`) is of the sources and of what compiles them: a changed kernel
                          can never be run from a stale copy
      NAME.KEY.nbc        a compiled form of the kernel NAME; KEY is of its signature and the processor
      NAME.nbi            JSON: KEY -> SHA-256 of that file

What is missing or damaged is compiled anew and replaced; where nothing can be kept, kernels are compiled in memory.
The oldest folders are removed when a new one is made.

What costs most to compile is tuples of arrays, hundreds of fields each, and kernels that are compiled once more into
those that call them, and so on upwards: what is in `by_address/` spares the one, kernels that are `apart` the other.
"""

import contextlib
import copy
import ctypes
import hashlib
import inspect
import json
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import binding
from llvmlite import ir as llvm
from numba.core import cgutils, ir, sigutils
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps
from numba.core.types.misc import unliteral

from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.files import make_folder
from warmfront.shared.kernels.version import digest
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.paths import cache_root

__all__ = ["apart", "cache_is_cold", "compile_for", "compiling_note", "inlined", "kernel"]

F = TypeVar("F", bound=Callable[..., Any])

# Caches that are kept, so that two installations do not make each other compile anew.
_KEPT = 4
# The folder of our own functions.
_TOP = f"{Path(__file__).parents[2]}{os.sep}"


def _cache_folder() -> Path | None:
    try:
        return cache_root() / "kernels" / digest()
    except ResourceError:  # told when a kernel is to be kept, which not every command does
        return None


_FOLDER = _cache_folder()


def _copied(part: Any, memo: dict[int, Any]) -> Any:
    """numba's `copy.deepcopy` of a Scope or Loc, which spares those of our functions.

    What is inlined is copied block by block, and with each block, twice, all variables of the function and where they
    stand in the source, which nobody changes afterwards: most of the time that inlining took.
    """
    place = part if isinstance(part, ir.Loc) else part.loc
    if place.filename.startswith(_TOP):
        return part
    made = memo[id(part)] = object.__new__(type(part))
    vars(made).update(copy.deepcopy(vars(part), memo))
    return made


ir.Scope.__deepcopy__ = ir.Loc.__deepcopy__ = _copied


def _distrust() -> str:
    """Why nothing in the cache may be run: whoever can write there could put any code in it. Empty if it may be run."""
    if _FOLDER is None:
        return "there is no folder to keep them in"
    try:
        status = _FOLDER.stat()
    except OSError as error:
        return f"{_FOLDER} cannot be read: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{_FOLDER} is not a folder"
    if status.st_uid not in (0, os.geteuid()):
        return f"{_FOLDER} belongs to another user"
    return f"{_FOLDER} may be written to by others" if status.st_mode & 0o022 else ""


def _refusal() -> str:
    """Make the cache's folder; why nothing can be kept in it, or empty."""
    if _FOLDER is not None and not _FOLDER.exists():
        try:
            make_folder(_FOLDER.parent)
            _FOLDER.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            return f"{_FOLDER} cannot be made: {error.strerror}"
        _prune(_FOLDER)
    if reason := _distrust():
        return reason
    return "" if os.access(str(_FOLDER), os.W_OK | os.X_OK) else f"{_FOLDER} may not be written to"


def _prune(folder: Path) -> None:
    """Remove the oldest caches beside `folder`; other processes may do the same."""
    ages = {}
    for old in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            ages[old] = old.stat().st_mtime
    ages.pop(folder, None)
    for old in sorted(ages, key=lambda old: -ages[old])[_KEPT - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


@cache
def _look_for_no_blas() -> None:
    """Spare a process that compiles its first kernel the half second in which numba imports scipy's linear algebra.

    It does so, if scipy is installed, to find a BLAS for products of matrices that no kernel here makes. Whether scipy
    is there can be told without. Who compiles such a product in the same process gets what numba does otherwise.
    """

    def ensure_scipy() -> None:
        if find_spec("scipy") is None:
            raise ImportError("scipy is not installed")

    linalg: Any = import_module("numba.np.linalg")
    ensure_blas, linalg.ensure_blas = linalg.ensure_blas, ensure_scipy
    import_module("numba.np.arraymath")  # it is this one that looks, once
    linalg.ensure_blas = ensure_blas


class _Cache:
    """The compiled forms of one kernel, as numba's dispatcher asks for them and hands them over."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.cache_path = str(_FOLDER)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The form compiled for `signature`; None if the cache has none that is whole.

        numba would first load and register all that compiling needs, which takes longer than loading every kernel of a
        process; what is compiled already needs its memory management alone.
        """
        rtsys.initialize(context)
        kept = None if _distrust() else self._kept(signature, context)
        if kept is None:
            _look_for_no_blas()
        return kept

    def _kept(self, signature: Any, context: Any) -> Any:
        # Whatever is wrong with a file, the way out is the same.
        with contextlib.suppress(Exception):
            key = self._key(signature, context.codegen())
            data = self._file(key).read_bytes()
            if hashlib.sha256(data).hexdigest() == self._index()[key]:
                called, reduced = pickle.loads(data)
                for module, name, arguments in called:
                    getattr(import_module(module), name).compile(arguments)
                return CompileResult._rebuild(context, *reduced)
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled for `signature`, if that can be."""
        if result.lifted or result.library.has_dynamic_globals or _refusal():
            return
        names = (each.name for each in result.library._final_module.global_variables)
        called = [_apart[name].source for name in names if name in _apart]
        data = dumps((called, result._reduce()))
        with contextlib.suppress(OSError):  # a full disk; a kernel that no file holds
            key = self._key(signature, result.codegen)
            _replace(self._file(key), data)
            _replace(self._file(), json.dumps(self._index() | {key: hashlib.sha256(data).hexdigest()}).encode())

    def is_empty(self) -> bool:
        """Whether no form of the kernel is kept."""
        return bool(_distrust()) or not self._index()

    def _file(self, key: str = "") -> Path:
        name = f"{self._function.__module__}.{self._function.__qualname__}"
        assert _FOLDER is not None
        return _FOLDER / (f"{name}.{key}.nbc" if key else f"{name}.nbi")

    def _index(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            index = json.loads(self._file().read_bytes())
            return index if isinstance(index, dict) else {}
        return {}

    def _key(self, signature: Any, codegen: Any) -> str:
        # The folder's digest does not know kernels of other packages.
        source = Path(inspect.getfile(self._function)).read_bytes()
        return hashlib.sha256(repr((signature, codegen.magic_tuple())).encode() + source).hexdigest()[:16]


def _replace(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all, in the place of whatever has its name."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_bytes(data)
        if path.is_dir():
            shutil.rmtree(path)
        whole.replace(path)


def cache_is_cold(*functions: Any) -> bool:
    """Whether any of these kernels has yet to be compiled on this machine."""
    return any(_Cache(function.py_func).is_empty() for function in functions)


def compiling_note() -> str:
    """What to tell a user who has to wait for kernels."""
    if reason := _refusal():
        return f"compiling kernels, as at every start: {reason}; set XDG_CACHE_HOME to a folder of your own"
    return "compiling kernels (first run only)"


def compile_for(function: Any, *arguments: object) -> None:
    """Compile the kernel `function` for the types of `arguments`, or take it from the cache, without calling it."""
    function.compile(tuple(numba.typeof(argument) for argument in arguments))


def inlined(function: F) -> F:
    """Compile `function` into its callers, at each call, not by itself.

    A kernel is optimised anew within each kernel that calls it, and again within that one's callers. So what has one
    caller is inlined.
    """
    piece: F = numba.njit(inline="always")(function)
    return piece


class _Apart:
    """Where compiled code finds a kernel that is `apart`: the symbol of a word with its address."""

    def __init__(self, symbol: str, function: Callable[..., Any], result: CompileResult) -> None:
        # From where another process gets the kernel.
        self.source = function.__module__, function.__qualname__, result.signature.args
        # Kept, for its memory is.
        self._library = result.library
        self._word = ctypes.c_uint64(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))
        binding.add_symbol(symbol, ctypes.addressof(self._word))


# By symbol.
_apart: dict[str, _Apart] = {}


def _calls_through(symbol: str, described: Any) -> Callable[..., Any]:
    """What numba is to write where a kernel calls that of the symbol; `described`: numba's description of it."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kinds, result = described.argtypes, described.restype
        word = builder.module.globals.get(symbol)
        if word is None:
            word = llvm.GlobalVariable(builder.module, llvm.IntType(64), symbol)
        kernel_type = context.call_conv.get_function_type(result, kinds)
        function = builder.inttoptr(builder.load(word), kernel_type.as_pointer())
        status, value = context.call_conv.call_function(builder, function, result, kinds, arguments)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return value

    emit.signature, emit.libs = described.argtypes, ()  # type: ignore[attr-defined]
    return emit


def apart(function: F) -> F:
    """As `kernel`, called by its address by other kernels, into which it is not compiled once more.

    For those that have work for some hundred nanoseconds, and kernels above them.
    """
    compiled: Any = kernel(function)
    compile_now = compiled.compile

    def compile_apart(signature: Any) -> Any:
        entry = compile_now(signature)
        result = compiled.overloads[tuple(sigutils.normalize_signature(signature)[0])]
        kind = hashlib.sha256(repr(result.signature.args).encode()).hexdigest()[:16]
        symbol = f"{function.__module__}.{function.__qualname__}.{kind}"
        if symbol not in _apart:
            _apart[symbol] = _Apart(symbol, function, result)
            compiled.targetctx.remove_user_function(entry)
            compiled.targetctx._defns[entry].append(_calls_through(symbol, result.fndesc), result.fndesc.argtypes)
        return entry

    compiled.compile = hold_interrupts()(compile_apart)
    return cast(F, compiled)


def kernel(function: F) -> F:
    """Compile `function` on first call: no GIL, result cached across processes."""
    if numba.config.DISABLE_JIT:
        raise UsageError("numba is told to compile nothing, which warmfront cannot do without: unset NUMBA_DISABLE_JIT")
    # No fastmath: what may be reassociated or contracted comes out one way or the other as a kernel is inlined into its
    # caller or not, which follows from what was cached when that was compiled: the bits would differ between starts.
    compiled: Any = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    compiled._cache = _Cache(function)
    resolve, compile_now = compiled.get_call_template, compiled.compile
    # Else numba would compile it anew for each constant that a caller passes.
    compiled.get_call_template = lambda args, kws: resolve(
        tuple(map(unliteral, args)), {name: unliteral(kind) for name, kind in kws.items()}
    )
    # LLVM calls back into Python, where a KeyboardInterrupt would be lost.
    compiled.compile = hold_interrupts()(compile_now)
    return compiled
