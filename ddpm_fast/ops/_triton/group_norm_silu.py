"""y = silu((1 + scale) (weight norm(x + add) + bias) + shift), statistics over a group's channels and pixels.

x, y: (B, C, P), float32, bfloat16 or float16, C or P fastest; weight, bias: (C,); add, scale, shift: (B, C).
Fused: the time embedding before, affine, FiLM and SiLU after. float32 arithmetic, one rounding. x may be two
tensors, x and skip, one behind the other in C; they are concatenated in memory only where that is asked for.

resident    a tile of whole groups x all pixels stays in registers: one launch, one read and one write (4
            bytes an element in bfloat16). Every shape of 32 x 32 and 32 channels a group, and some beyond.
split       larger: `partials` leaves three sums per channel and chunk of pixels, each in a slot of its own,
            `finish` merges them (Chan et al. 1983) into coefficients per channel, `apply` applies those. Two
            reads and one write; no atomics, so the same bits in every run.

A tile is (channels, pixels) whichever of the two is fastest in memory. Sums are taken by channel, about the
channel's own mean, and folded into groups afterwards: a mean comes off before anything is squared or scaled,
so that a large one cancels nowhere, and `add`, constant over a channel, never meets the pixels at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from .tile import rounded

# ---- launches: from shape, dtype and layout only ----

SECTOR, LINE = 32, 128  # bytes: what memory moves at least, and what a warp's access is best made of
ENOUGH_PROGRAMS = 128  # about one for each multiprocessor: below it, narrower tiles rather than idle ones


@dataclass(frozen=True)
class Shape:
    """What decides a launch. `channels_last` says that channels are fastest in memory."""

    batch: int
    channels: int
    pixels: int
    groups: int
    itemsize: int
    channels_last: bool

    @property
    def group(self) -> int:
        return self.channels // self.groups


@dataclass(frozen=True)
class Tile:
    """`groups` groups of a sample in a block of channels (of which there may be more) x pixels."""

    groups: int
    block_c: int
    block_p: int

    @property
    def elements(self) -> int:
        return self.block_c * self.block_p

    @property
    def warps(self) -> int:
        """32 elements a thread, and 8 warps at most, of up to 255 registers a thread.

        In a tile of 32 K elements that is 128 a thread. 16 warps would have 128 registers for 64 elements and
        what a thread keeps by channel, which are as many as before: on sm_100 and sm_120 that spills.
        """
        return max(1, min(8, self.elements // 1024))

    def launch(self, products: bool = False) -> dict[str, int | bool]:
        """Options of a kernel that sums over the tile.

        Where a lane may hold one pixel of a channel, or anyway where `products` are summed over channels, a
        product is not fused into the sum of a shuffle: two lanes would then differ in the last bit, and which
        of them is kept be chance.
        """
        return {
            "num_warps": self.warps,
            "enable_fp_fusion": not products and self.block_p >= 64 * self.warps,
        }


def resident_tile(shape: Shape, best: int, most: int) -> Tile | None:
    """The tile that is read once; None if one of at most `most` elements cannot hold a group.

    A tile gains groups while it is tiny; then, as long as programs are left for the whole device, to a line's
    width where channels are fastest, up to `best` elements, of which two programs share a multiprocessor: one
    loads while the other stores; else to 2 K elements. Where channels are fastest it is a sector wide at
    least, or, if that is too much, 16 bytes.
    """

    def tile(groups: int) -> Tile:
        block_c, block_p = (triton.next_power_of_2(n) for n in (groups * shape.group, shape.pixels))
        return Tile(groups, block_c, block_p)

    def width(groups: int) -> int:
        return groups * shape.group * shape.itemsize

    def gains(groups: int) -> bool:
        if tile(2 * groups).elements <= 1024 or (shape.channels_last and width(groups) < SECTOR):
            return True
        wide = shape.channels_last and width(2 * groups) > LINE
        fits = tile(2 * groups).elements <= (best if shape.channels_last else 2048)
        programs = shape.batch * triton.cdiv(shape.groups, 2 * groups)
        return fits and not wide and programs >= ENOUGH_PROGRAMS

    groups = 1
    while groups < shape.groups and gains(groups):
        groups *= 2
    while groups > 1 and tile(groups).elements > most and width(groups) >= 2 * 16:
        groups //= 2
    return tile(groups) if tile(groups).elements <= most else None


def split_tile(shape: Shape) -> Tile:
    """A tile of 8 K elements for what goes through memory twice; its channels need not be whole groups.

    Long in pixels, since a chunk's sums are 12 bytes a channel.
    """
    if shape.channels_last:
        block_c = min(triton.next_power_of_2(shape.channels), 2 * SECTOR // shape.itemsize)
        return Tile(0, block_c, 8192 // block_c)
    block_p = min(triton.next_power_of_2(shape.pixels), 2048)
    return Tile(0, min(triton.next_power_of_2(shape.channels), 8192 // block_p), block_p)


def finish_tile(shape: Shape, chunks: int) -> Tile:
    """One group, and as many chunks at once ("pixels" here) as there are or make 4 K elements."""
    block_c = triton.next_power_of_2(shape.group)
    return Tile(1, block_c, min(triton.next_power_of_2(chunks), max(1, 4096 // block_c)))


# ---- pieces that the kernels share ----


@triton.jit
def place(pixels, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    """Offsets (BLOCK_C, BLOCK_P) from the first element of a tile."""
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    if LAST:
        offsets = c[:, None] + p.to(tl.int64)[None, :] * C
    else:
        offsets = c.to(tl.int64)[:, None] * pixels + p[None, :]
    return offsets


@triton.jit
def read(
    x, skip, start, offsets, inside, sample, first_c, first_p, pixels,
    C: tl.constexpr, C_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A tile of x, or of [x, skip], whose first C_X channels are x's.

    Each of the two is asked for its own channels: what is masked moves nothing. A choice between pointers is
    one load, but a narrow one where channels are fastest: the compiler takes it for a choice by element.
    """
    if skip is None:
        values = tl.load(x + start + offsets, mask=inside, other=0.0)
    else:
        C_SKIP: tl.constexpr = C - C_X
        c = first_c.to(tl.int64)
        start_x, start_skip = sample * C_X * pixels, sample * C_SKIP * pixels
        start_x += first_p * C_X + c if LAST else c * pixels + first_p
        start_skip += first_p * C_SKIP + (c - C_X) if LAST else (c - C_X) * pixels + first_p
        in_x = (first_c + tl.arange(0, BLOCK_C) < C_X)[:, None]
        pointers = x + start_x + place(pixels, C_X, BLOCK_C, BLOCK_P, LAST)
        values = tl.load(pointers, mask=inside & in_x, other=0.0)
        pointers = skip + start_skip + place(pixels, C_SKIP, BLOCK_C, BLOCK_P, LAST)
        values = tl.load(pointers, mask=inside & ~in_x, other=values)
    return values


@triton.jit
def given(operand, at, valid, OTHERWISE: tl.constexpr):
    """An optional operand's values as float32, or what leaves the result as it is."""
    if operand is None:
        values = tl.full(at.shape, OTHERWISE, tl.float32)
    else:
        values = tl.load(operand + at, mask=valid, other=0.0).to(tl.float32)
    return values


@triton.jit
def affine(weight, bias, scale, shift, scale_at, shift_at, c, valid):
    """gain and offset by channel: (1 + scale) (weight n + bias) + shift = gain n + offset."""
    film = 1 + given(scale, scale_at, valid, 0.0)
    offset = given(bias, c, valid, 0.0) * film + given(shift, shift_at, valid, 0.0)
    return given(weight, c, valid, 1.0) * film, offset


@triton.jit
def moments(x, inside, pixels):
    """x less a mean of each channel, that mean, and the sums of the rest and of its squares."""
    mean = tl.sum(x, 1) / pixels
    x = tl.where(inside, x - mean[:, None], 0.0)
    return x, mean, tl.sum(x, 1), tl.sum(x * x, 1)


@triton.jit
def group_mean(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """For each channel the mean over its group of (BLOCK_C,) values: GROUPS groups of GROUP, then padding."""
    if GROUPS == 1:
        inside = tl.arange(0, BLOCK_C) < GROUP
        means = tl.zeros_like(values) + tl.sum(tl.where(inside, values, 0.0), 0) / GROUP
    elif GROUP * GROUPS == BLOCK_C:
        means = tl.sum(tl.reshape(values, (GROUPS, GROUP)), 1)[:, None] / GROUP
        means = tl.reshape(tl.broadcast_to(means, (GROUPS, GROUP)), (BLOCK_C,))
    else:
        group = tl.arange(0, BLOCK_C) // GROUP
        same = group[:, None] == group[None, :]
        means = tl.sum(tl.where(same, values[:, None], 0.0), 0) / GROUP
    return means


@triton.jit
def statistics(
    mean, s1, s2, add, pixels, eps, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """From each channel's mean and sums about it: what x - mean lacks of x + add - (the group's mean), and
    the group's 1 / standard deviation.

    Means of a group's channels are compared with each other, never with zero: their differences are exact.
    """
    s1, s2 = s1 / pixels, s2 / pixels
    lift = mean - group_mean(mean, GROUP, GROUPS, BLOCK_C) + add
    lift = lift - group_mean(lift + s1, GROUP, GROUPS, BLOCK_C)
    variance = group_mean(s2 + lift * (2 * s1 + lift), GROUP, GROUPS, BLOCK_C)
    variance = tl.where(variance < 0, 0.0, variance)  # by rounding; NaN stays
    return lift, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def activate(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y


# ---- one launch ----


@triton.jit
def resident_kernel(
    x, skip, y, concat, weight, bias, add, scale, shift, add_stride, scale_stride, shift_stride, eps,
    C: tl.constexpr, C_X: tl.constexpr, PIXELS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (C + GROUPS * GROUP - 1) // (GROUPS * GROUP)
    sample, first = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * (GROUPS * GROUP)
    c = first + tl.arange(0, BLOCK_C)
    valid = (tl.arange(0, BLOCK_C) < GROUPS * GROUP) & (c < C)
    inside = valid[:, None] & (tl.arange(0, BLOCK_P) < PIXELS)[None, :]
    offsets = place(PIXELS, C, BLOCK_C, BLOCK_P, LAST)
    start = sample * (C * PIXELS) + (first if LAST else first.to(tl.int64) * PIXELS)

    values = read(
        x, skip, start, offsets, inside, sample, first, 0, PIXELS, C, C_X, BLOCK_C, BLOCK_P, LAST
    )  # fmt: skip
    if concat is not None:
        tl.store(concat + start + offsets, values, mask=inside)
    values = values.to(tl.float32)
    scale_at, shift_at = sample * scale_stride + c, sample * shift_stride + c
    gain, offset = affine(weight, bias, scale, shift, scale_at, shift_at, c, valid)
    added = given(add, sample * add_stride + c, valid, 0.0)
    values, mean, s1, s2 = moments(values, inside, PIXELS)
    lift, rstd = statistics(mean, s1, s2, added, PIXELS, eps, GROUP, GROUPS, BLOCK_C)
    gain *= rstd
    offset += lift * gain
    values = activate(values * gain[:, None] + offset[:, None], SILU)
    tl.store(y + start + offsets, rounded(values, y.dtype.element_ty), mask=inside)


# ---- split ----


@triton.jit
def partials_kernel(
    x, skip, partials, pixels, slot_stride,
    C: tl.constexpr, C_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """partials (3, B, chunks, C): a chunk's mean by channel, and the sums of the rest and of its squares."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sample, first_c = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BLOCK_C
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    first_p = chunk.to(tl.int64) * BLOCK_P
    c = first_c + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (first_p + tl.arange(0, BLOCK_P) < pixels)[None, :]
    start = sample * C * pixels + (first_p * C + first_c if LAST else first_c.to(tl.int64) * pixels + first_p)

    offsets = place(pixels, C, BLOCK_C, BLOCK_P, LAST)
    values = read(
        x, skip, start, offsets, inside, sample, first_c, first_p, pixels, C, C_X, BLOCK_C, BLOCK_P, LAST
    )  # fmt: skip
    count = tl.minimum(pixels - first_p, BLOCK_P).to(tl.float32)
    _, mean, s1, s2 = moments(values.to(tl.float32), inside, count)
    slot = partials + (sample * chunks + chunk) * C + c
    tl.store(slot, mean, mask=c < C)
    tl.store(slot + slot_stride, s1, mask=c < C)
    tl.store(slot + 2 * slot_stride, s2, mask=c < C)


@triton.jit
def finish_kernel(
    partials, coefficients, weight, bias, add, scale, shift, add_stride, scale_stride, shift_stride, eps,
    pixels, chunks, slot_stride, row_stride, chunk_pixels,
    C: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """coefficients (8, B, C): mean, gain and offset for `apply`, lift and rstd for the gradient, which makes
    the last three. One group a program."""
    GROUPS: tl.constexpr = C // GROUP
    sample, first = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS * GROUP
    c = first + tl.arange(0, BLOCK_C)
    valid = tl.arange(0, BLOCK_C) < GROUP
    k = tl.arange(0, BLOCK_K)
    slots = partials + sample * chunks * C + c[:, None] + k.to(tl.int64)[None, :] * C

    # Near enough to the channel's mean to take all sums about it; by pixels: the last chunk may have few.
    total = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for begin in range(0, chunks, BLOCK_K):
        inside = valid[:, None] & (begin + k < chunks)[None, :]
        count = tl.minimum(pixels - (begin + k) * chunk_pixels, chunk_pixels).to(tl.float32)[None, :]
        total += tl.load(slots + begin * C, mask=inside, other=0.0) * (count / pixels)
    mean = tl.sum(total, 1)
    sum1 = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    sum2 = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for begin in range(0, chunks, BLOCK_K):
        inside = valid[:, None] & (begin + k < chunks)[None, :]
        slot = slots + begin * C
        s1 = tl.load(slot + slot_stride, mask=inside, other=0.0)
        s2 = tl.load(slot + 2 * slot_stride, mask=inside, other=0.0)
        far = tl.where(inside, tl.load(slot, mask=inside, other=0.0) - mean[:, None], 0.0)
        count = tl.minimum(pixels - (begin + k) * chunk_pixels, chunk_pixels).to(tl.float32)[None, :]
        sum1 += s1 + count * far
        sum2 += s2 + far * (2 * s1 + count * far)

    lift, rstd = statistics(
        mean, tl.sum(sum1, 1), tl.sum(sum2, 1), given(add, sample * add_stride + c, valid, 0.0),
        pixels, eps, GROUP, 1, BLOCK_C,
    )  # fmt: skip
    scale_at, shift_at = sample * scale_stride + c, sample * shift_stride + c
    gain, offset = affine(weight, bias, scale, shift, scale_at, shift_at, c, valid)
    gain *= rstd
    row = coefficients + sample * C + c
    tl.store(row, mean, mask=valid)
    tl.store(row + row_stride, gain, mask=valid)
    tl.store(row + 2 * row_stride, offset + lift * gain, mask=valid)
    tl.store(row + 3 * row_stride, lift, mask=valid)
    tl.store(row + 4 * row_stride, rstd, mask=valid)


@triton.jit
def apply_kernel(
    x, skip, y, concat, coefficients, pixels, row_stride,
    C: tl.constexpr, C_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sample, first_c = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BLOCK_C
    first_p = tl.program_id(1).to(tl.int64) * BLOCK_P
    c = first_c + tl.arange(0, BLOCK_C)
    inside = (c < C)[:, None] & (first_p + tl.arange(0, BLOCK_P) < pixels)[None, :]
    offsets = place(pixels, C, BLOCK_C, BLOCK_P, LAST)
    start = sample * C * pixels + (first_p * C + first_c if LAST else first_c.to(tl.int64) * pixels + first_p)

    values = read(
        x, skip, start, offsets, inside, sample, first_c, first_p, pixels, C, C_X, BLOCK_C, BLOCK_P, LAST
    )  # fmt: skip
    if concat is not None:
        tl.store(concat + start + offsets, values, mask=inside)
    values = values.to(tl.float32)
    row = coefficients + sample * C + c
    mean = tl.load(row, mask=c < C, other=0.0)
    gain = tl.load(row + row_stride, mask=c < C, other=0.0)
    offset = tl.load(row + 2 * row_stride, mask=c < C, other=0.0)
    values = activate((values - mean[:, None]) * gain[:, None] + offset[:, None], SILU)
    tl.store(y + start + offsets, rounded(values, y.dtype.element_ty), mask=inside)


# ---- launchers ----


def in_layout(x: Tensor, num_groups: int) -> tuple[Tensor, Shape]:
    """x in the layout that the op keeps, and its shape; vectors are channels last too."""
    layout = reference.memory_format(x)
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    last = layout == torch.channels_last or pixels == 1
    shape = Shape(batch, channels, pixels, num_groups, x.element_size(), last)
    return x.contiguous(memory_format=layout), shape


def with_strides(weight, bias, add, scale, shift) -> tuple:
    """The operands and the strides of the rows of the last three, which are often halves of one tensor."""
    vectors = [v if v is None else v.contiguous() for v in (weight, bias)]
    rows = [v if v is None or v.stride(1) == 1 else v.contiguous() for v in (add, scale, shift)]
    return (*vectors, *rows, *(0 if v is None else v.stride(0) for v in rows))


def split_statistics(
    x: Tensor, shape: Shape, operands: tuple, eps: float, skip: Tensor | None = None
) -> Tensor:
    """The coefficients (8, B, C) of a large image; see `finish_kernel`."""
    tile = split_tile(shape)
    chunks = triton.cdiv(shape.pixels, tile.block_p)
    finish = finish_tile(shape, chunks)
    partials = x.new_empty((3, shape.batch, chunks, shape.channels), dtype=torch.float32)
    coefficients = x.new_empty((8, shape.batch, shape.channels), dtype=torch.float32)
    grid = (shape.batch * triton.cdiv(shape.channels, tile.block_c), chunks)
    partials_kernel[grid](
        x, skip, partials, shape.pixels, partials.stride(0), shape.channels, x.shape[1], tile.block_c,
        tile.block_p, shape.channels_last, **tile.launch(),
    )  # fmt: skip
    finish_kernel[(shape.batch * shape.groups,)](
        partials, coefficients, *operands, eps, shape.pixels, chunks, partials.stride(0),
        coefficients.stride(0), tile.block_p, shape.channels, shape.group, finish.block_c, finish.block_p,
        **finish.launch(),
    )  # fmt: skip
    return coefficients


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    x, shape = in_layout(x, num_groups)
    y = torch.empty_like(x, memory_format=reference.memory_format(x))
    normalise(x, None, y, None, shape, with_strides(weight, bias, add, scale, shift), eps, silu)
    return y


def normalise(
    x: Tensor,
    skip: Tensor | None,
    y: Tensor,
    concat: Tensor | None,
    shape: Shape,
    operands: tuple,
    eps: float,
    silu: bool,
) -> None:
    """The norm of x, or of [x, skip], into y; the latter itself into `concat`. All in one layout."""
    with torch.cuda.device_of(x):
        tile = resident_tile(shape, best=16384, most=32768)
        if tile is not None:
            grid = (shape.batch * triton.cdiv(shape.groups, tile.groups),)
            resident_kernel[grid](
                x, skip, y, concat, *operands, eps, shape.channels, x.shape[1], shape.pixels, shape.group,
                tile.groups, tile.block_c, tile.block_p, shape.channels_last, silu, **tile.launch(),
            )  # fmt: skip
        else:
            coefficients = split_statistics(x, shape, operands, eps, skip)
            tile = split_tile(shape)
            grid = (
                shape.batch * triton.cdiv(shape.channels, tile.block_c),
                triton.cdiv(shape.pixels, tile.block_p),
            )
            apply_kernel[grid](
                x, skip, y, concat, coefficients, shape.pixels, coefficients.stride(0), shape.channels,
                x.shape[1], tile.block_c, tile.block_p, shape.channels_last, silu, num_warps=tile.warps,
            )  # fmt: skip
