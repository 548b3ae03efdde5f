"""Counter noise on the device, one definition for every kernel that draws.

    r = Philox4x32-10(counter = (element // 4, stream << 28 | step, image low, image high), key = seed)
    u = (r + 0.5) 2^-32;  z0, z1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1);  z2, z3 from u2, u3

Integers are bit-exact with `reference.philox4x32_10`, normals within 1e-6 of `reference.counter_normal`.
A counter is computed once, by the thread that keeps its four normals: about 20 integer and 20 float
operations an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER0 = tl.constexpr(0xD2511F53)
_MULTIPLIER1 = tl.constexpr(0xCD9E8D57)
_WEYL0 = tl.constexpr(0x9E3779B9)
_WEYL1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, key0, key1):
    """Ten rounds (Salmon et al. 2011, section 3.3) on uint32 words."""
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * _MULTIPLIER0, c2.to(tl.uint64) * _MULTIPLIER1
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0, product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1, product0.to(tl.uint32)
        key0, key1 = key0 + _WEYL0, key1 + _WEYL1
    return c0, c1, c2, c3


@triton.jit
def uniform(r):
    """(0, 1]: rounding carries the last 128 of the 2^32 words up to 1, where the radius is 0."""
    return (r.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def sincos_turns(u):
    """Sine and cosine of ``2 pi u``, within 1e-7: the reduction to an eighth of a turn is exact in turns,
    and so needs none of libdevice's slow path, which spills. Each fma is spelled out: left to the compiler,
    two kernels could draw normals that differ in the last bit."""
    quarter = (4.0 * u + 0.5).to(tl.int32)
    angle = tl.fma(u, 4.0, -quarter.to(tl.float32)) * 1.5707963267948966
    square = angle * angle
    s = tl.fma(square, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(tl.fma(s, square, -1.6666654611e-1) * square, angle, angle)
    c = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(tl.fma(c, square, 4.166664568298827e-2), square, -0.5)
    c = tl.fma(c, square, 1.0)
    odd = (quarter & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return sine, tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def box_muller(r0, r1):
    radius = tl.sqrt(-2.0 * tl.log(uniform(r0)))
    sine, cosine = sincos_turns(uniform(r1))
    return radius * cosine, radius * sine


@triton.jit
def _counters(c0, seed, image, stream_step):
    zero = tl.zeros_like(c0)
    c1, c2, c3 = (
        zero + stream_step.to(tl.uint32),
        zero + image.to(tl.uint32),
        zero + (image >> 32).to(tl.uint32),
    )
    r0, r1, r2, r3 = philox4x32_10(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return z0, z1, z2, z3


@triton.jit
def _weave(a, b, c, d):
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def normal(seed, image, stream_step, start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The normals of a sample's elements ``start, ..., start + BLOCK - 1``; ``start`` is a multiple of 4.

    ``seed``, ``image``, ``stream_step`` and ``start`` are int64 scalars. A thread gets whole counters, whose
    normals are neighbours: one where its accesses are of 4 elements (float32), two where they are of 8 (a
    half type, WIDE). So the noise lies where it is used, with no exchange through shared memory.
    """
    first = (start // 4).to(tl.uint32)
    if WIDE:
        even = first + 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
        z0, z1, z2, z3 = _counters(even, seed, image, stream_step)
        z4, z5, z6, z7 = _counters(even + 1, seed, image, stream_step)
        return tl.interleave(_weave(z0, z2, z4, z6), _weave(z1, z3, z5, z7))
    else:
        z0, z1, z2, z3 = _counters(first + tl.arange(0, BLOCK // 4).to(tl.uint32), seed, image, stream_step)
        return _weave(z0, z1, z2, z3)
