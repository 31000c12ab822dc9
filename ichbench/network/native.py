"""The compiled kernels of native.cpp: built once a machine with its own C++ compiler, checked against torch, called through ctypes.

Nothing depends on them: without a compiler, or where they do not give torch's numbers, `kernels()` is None and prediction takes the
ways of network/winograd.py and torch. The program lies in the user's cache folder (`XDG_CACHE_HOME`, else ~/.cache) under a name that
hangs on the sources, the compiler and the instructions that torch uses (AVX2, AVX-512, none of them; ATEN_CPU_CAPABILITY sets them).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
#: C++ compilers that are looked for, after the one that the environment variable CXX names
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
#: what torch computes with -> flags; elsewhere every processor of the kind has what the compiler uses
INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")}
#: seconds; it takes three
PATIENCE = 120
#: largest difference to torch, over the spread of its answer, with which the kernels are taken
CLOSE = 1e-4


class Kernels:
    """Functions of the compiled program. Tensors are float32, on the CPU and contiguous, images (samples, z, y, x, channels)."""

    def __init__(self, program: ctypes.CDLL, compiler: str) -> None:
        self._program, self.compiler = program, compiler
        program.lanes.restype = ctypes.c_int64
        self.lanes = int(program.lanes())

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self

    def packed(self, matrix: Tensor) -> Tensor:
        """Weights (channels in, channels out) in the order in which `up` reads them."""
        to = self._zeros(1, *matrix.shape)
        self._run("pack", matrix.contiguous(), to, *matrix.shape)
        return to

    def point_weights(self, weight: Tensor, along_z: bool, strided: bool) -> Tensor:
        """Filters (channels out, channels in, [3 or 1,] 3, 3) as `winograd` takes them: their values at the points."""
        taps = weight.flatten(2).permute(2, 1, 0).contiguous()
        size_z, channels_in = len(taps) // 9, taps.shape[1]
        to = self._zeros(216, *taps.shape[1:]) if along_z else self._zeros(36, size_z * channels_in, taps.shape[2])
        self._run("point_weights", taps, to, channels_in, taps.shape[2], size_z, along_z, strided, torch.get_num_threads())
        return to

    def winograd(
        self, images: Sequence[Tensor], points: Tensor, size_z: int, stride_z: int, along_z: bool, strided: bool, out: Tensor
    ) -> None:
        """`out` = the convolution of one image, or of two whose channels follow each other, with filters (size_z, 3, 3), zeros outside.

        Strides are (stride_z, 1, 1) or, if `strided`, (stride_z, 2, 2). `along_z` (size 3, no strides): fewer multiplications along z
        as well, with twice the weights.
        """
        first, second = images[0], images[-1]
        channels = (first.shape[-1], second.shape[-1] if len(images) == 2 else 0)
        given = (first, channels[0], second, channels[1], *first.shape[1:4])
        self._run("winograd", *given, points, out, *out.shape, size_z, stride_z, along_z, strided, torch.get_num_threads())

    def up(self, x: Tensor, weights: Tensor, bias: Tensor, box_zyx: Sequence[int], out: Tensor) -> None:
        """`out` = the transposed convolution of `x` whose stride is its kernel; weights: packed (channels in, box x channels out)."""
        slices, threads = x.shape[0] * x.shape[1], torch.get_num_threads()
        self._run("up", x, weights, bias, out, slices, *x.shape[2:], out.shape[-1], *box_zyx, threads)

    def norm_act(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, leaky_slope: float) -> None:
        """Instance norm and leaky ReLU of `x`, in place; a slope of 1 leaves the second out."""
        sizes, threads = (x.shape[0], x[0, ..., 0].numel(), x.shape[-1]), torch.get_num_threads()
        self._run("norm_act", x, weight, bias, *sizes, float(eps), float(leaky_slope), threads)

    def _zeros(self, matrices: int, channels_in: int, channels_out: int) -> Tensor:
        """Room for weights whose channels are filled up to whole vectors, and to pairs of them."""
        shape = (matrices, -(-channels_in // self.lanes) * self.lanes, -(-channels_out // (2 * self.lanes)) * 2 * self.lanes)
        # numpy asks for large pages, without which writing hundreds of megabytes for the first time takes five times as long
        values = torch.from_numpy(np.empty(shape, np.float32))
        return values if shape == (matrices, channels_in, channels_out) else values.zero_()

    def _run(self, name: str, *arguments: Tensor | float) -> None:
        if getattr(self._program, name)(*map(_argument, arguments)):
            raise MemoryError


def _argument(value: Tensor | float) -> Any:
    if not isinstance(value, Tensor):
        return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
    if value.dtype != torch.float32 or value.device.type != "cpu" or not value.is_contiguous():
        raise TypeError(f"the kernels take contiguous float32 tensors on the CPU, got {value.dtype} on {value.device}")
    return ctypes.c_void_p(value.data_ptr())


@functools.cache
def kernels() -> Kernels | None:
    """The kernels of this machine, built at the first call (three seconds, once); None where they cannot be had."""
    return next((found for compiler in find_compilers() if (found := _made_by(compiler)) is not None), None)


def about_kernels() -> str:
    """What prediction on this CPU uses, for people."""
    found, compilers = kernels(), [Path(path).name for path in find_compilers()]
    if found is not None:
        return f"for prediction, built by {found.compiler}, {found.lanes} numbers at a time"
    reason = f"what {' and '.join(compilers)} builds does not load or does not give torch's numbers"
    if not compilers:
        reason = f"there is no C++ compiler ({', '.join(COMPILERS)} or the one that CXX names)"
    return f"none, for {reason}: prediction takes about twice as long"


def find_compilers() -> list[str]:
    """Paths of C++ compilers, the one to try first at the front."""
    found = [shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name]
    return list(dict.fromkeys(path for path in found if path is not None))


def is_right(found: Kernels) -> bool:
    """Whether the kernels give torch's numbers, on images whose sizes leave rests everywhere."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, weight, bias = draw(2, 5, 6, 7, 21), draw(21), draw(21)
    image, other = x.movedim(-1, 1), draw(2, 5, 6, 7, 4)
    pairs = []
    with torch.inference_mode():
        both = torch.cat([image, other.movedim(-1, 1)], 1)
        for size, stride, along_z in ((3, (1, 1, 1), True), (3, (1, 1, 1), False), (1, (1, 1, 1), False), (3, (2, 2, 2), False)):
            filters, strided = draw(37, 25, size, 3, 3), stride[1] == 2
            expected = F.conv3d(both, filters, None, stride, (size // 2, 1, 1)).movedim(1, -1)
            out = torch.empty(expected.shape)
            found.winograd([x, other], found.point_weights(filters, along_z, strided), size, stride[0], along_z, strided, out)
            pairs.append((out, expected))
        filters = draw(21, 21, 2, 1, 2)
        expected = F.conv_transpose3d(image, filters, bias, (2, 1, 2)).movedim(1, -1)
        out = torch.empty(expected.shape)
        found.up(x, found.packed(filters.movedim(1, -1).reshape(21, -1)), bias, (2, 1, 2), out)
        pairs.append((out, expected))
        expected = F.leaky_relu(F.instance_norm(image, weight=weight, bias=bias, eps=1e-5), 0.1).movedim(1, -1)
        found.norm_act(x, weight, bias, 1e-5, 0.1)
        pairs.append((x, expected))
    return all(float((ours - theirs).abs().max()) < CLOSE * float(theirs.std()) for ours, theirs in pairs)


def _made_by(compiler: str) -> Kernels | None:
    """The kernels that `compiler` builds, if they are right; a program that is not does not stay."""
    program = None
    try:
        program = _program(compiler)
        found = Kernels(ctypes.CDLL(str(program)), Path(compiler).name)
        if is_right(found):
            return found
    except (OSError, AttributeError, subprocess.SubprocessError):
        pass
    if program is not None:
        with contextlib.suppress(OSError):
            program.unlink(missing_ok=True)
    return None


def _program(compiler: str) -> Path:
    """The compiled program; made first if there is none, or a damaged one: to load that would end the process."""
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.glob("native*")) if path.suffix in (".cpp", ".h")]
    capability = torch.backends.cpu.get_cpu_capability()
    command = [compiler, *FLAGS, *next((flags for name, flags in INSTRUCTIONS.items() if name in capability), ())]
    parts = [*sources, os.fsencode(" ".join([platform.machine(), *command]))]
    name, folder = f"native-{_digest(b'|'.join(parts))}", _cache_folder()
    for program in folder.glob(f"{name}-*.so"):
        if program.name == f"{name}-{_digest(program.read_bytes())}.so":
            return program
        program.unlink(missing_ok=True)
    handle, scratch = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        _compile([*command, "-o", scratch, str(SOURCE)])
        program = folder / f"{name}-{_digest(Path(scratch).read_bytes())}.so"
        Path(scratch).replace(program)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return program


def _compile(command: list[str]) -> None:
    """Run it, and end it with all that it started when it takes too long."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            code = process.wait(PATIENCE)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _cache_folder() -> Path:
    """The user's own cache folder; where there is none, or others can write it, one for the life of this process."""
    with contextlib.suppress(OSError, RuntimeError, StopIteration):
        given = [Path(os.environ.get("XDG_CACHE_HOME", "")), Path.home() / ".cache"]
        folder = next(path for path in given if path.is_absolute()) / "ichbench"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
        own = not hasattr(os, "geteuid") or (about.st_uid == os.geteuid() and not about.st_mode & 0o022)
        if own and os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="ichbench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
