"""Tiles of a cache in the order in which tensor cores take them, decoded in the registers that feed them.

The cache is loaded as 32-bit words of PER values along D, and stays packed until a thread holds what it will multiply.
Tensor cores take pairs of values that follow each other along the summed dimension in one register:

* For ``k @ q`` that is D. Its order doesn't matter if q has the same one, so a pair is value i of a word and value
  i + PER / 2: both lie at the same place of a half word.
* For ``v.T @ weights`` it is the tokens. Half words of two tokens, half a tile apart, are put into one word first; then
  a pair is value i of the one and of the other.

So a pair is decoded by a few operations on whole words and scaled by one packed product. All else is names: the views
here say which value a thread holds where, so that none has to be moved. RUN is how many pairs a thread holds in a row,
which Triton chooses by the narrowest type that it finds among an operand's sources; another RUN would be right, too,
but would go through shared memory.

Codes times block scales are exact in the type of q: see ``_triton_gemm``. For NVFP4 the unit of the codes goes into the
scale, times 2^-8 (bfloat16) or 2^-7 (float16) to stay in range.
"""

# mypy: disable-error-code="assignment, var-annotated, misc"
# Kernels grow tuples and rebind names to other types, which Triton's compiler unrolls.

from __future__ import annotations

import triton
import triton.language as tl

from .. import _triton_pairs as pairs

__all__ = [
    "in_row_order",
    "keys",
    "paired",
    "scales",
    "value_of_column",
    "value_of_summand",
    "values",
    "words",
]


@triton.jit
def value_of_column(n, WORDS: tl.constexpr, PER: tl.constexpr):
    """Which of the D values column n of the sums is."""
    UPPER: tl.constexpr = WORDS // 8
    word = n % 8 * UPPER + n // 8 % UPPER
    return word * PER + n // WORDS


@triton.jit
def value_of_summand(n, WORDS: tl.constexpr, PER: tl.constexpr, RUN: tl.constexpr):
    """Which of the D values position n of the summed dimension of ``q @ k.T`` is."""
    UPPER: tl.constexpr = WORDS // 4
    HALF: tl.constexpr = PER // 2
    own = n // (8 * RUN) * RUN + n // 2 % RUN  # of a thread's pairs
    word = n // (2 * RUN) % 4 * UPPER + own // HALF
    return word * PER + own % HALF + n % 2 * HALF


# Loading


@triton.jit
def words(start, there, WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    """``[R, WORDS]`` words of rows of bytes that start at multiples of ALIGNED; where a mask is given, zeros where it
    says that no row is."""
    col = tl.arange(0, WORDS)[None, :]
    if ALIGNED >= 4:
        return _load(start.to(tl.pointer_type(tl.uint32), bitcast=True)[:, None] + col, there)
    else:
        word = tl.zeros((start.shape[0], WORDS), tl.uint32)
        for i in tl.static_range(4):
            word |= _load(start[:, None] + (col * 4 + i), there).to(tl.uint32) << (8 * i)
        return word


@triton.jit
def scales(start, there, COUNT: tl.constexpr):
    """Bytes of block scales ``[R, COUNT]``, with a mask as that of :func:`words`."""
    return _load(start[:, None] + tl.arange(0, COUNT)[None, :], there).to(tl.uint32)


@triton.jit
def _load(place, there):
    if there is None:
        return tl.load(place)
    else:
        return tl.load(place, mask=there[:, None], other=0)


@triton.jit
def _spread(scale, WORDS: tl.constexpr):
    """``[R, COUNT]`` to the words that they belong to, ``[R, WORDS]``."""
    R: tl.constexpr = scale.shape[0]
    COUNT: tl.constexpr = scale.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(scale, 2), (R, COUNT, WORDS // COUNT))
    return tl.reshape(wide, (R, WORDS))


# Decoding pairs


@triton.jit
def _pair_of_scales(scale, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes of ``[R, COUNT]`` block scales to pairs of a row and of the one half a tile on, ``[R / 2, COUNT]``, as
    what :func:`_scaled` multiplies by."""
    lo, hi = pairs.front_back_rows(scale)
    word = lo | (hi << 16)
    if FORMAT != "nvfp4":
        return pairs.ue8m0_pair(word)
    else:
        word = pairs.e4m3_pair(word, 0, DTYPE)
        if DTYPE == tl.float16:
            return _times(word, 0x78007800, DTYPE)  # 2^15: 2^8 for the scale's bits, 2^14 for the codes', 2^-7
        else:
            return _times(_times(word, 0x7B807B80, DTYPE), 0x7A807A80, DTYPE)  # 2^120, and 2^126 2^-8


@triton.jit
def _times(word, FACTORS: tl.constexpr, DTYPE: tl.constexpr):
    return pairs.join_halves(*pairs.multiply_halves(word, _all(word, FACTORS), DTYPE), DTYPE)


@triton.jit
def _of_both(pair):
    """The halves of such pairs, each in both halves of a word: ``[R, COUNT]``."""
    R: tl.constexpr = pair.shape[0]
    COUNT: tl.constexpr = pair.shape[1]
    both = tl.join(pairs.low_halves(pair, pair), pairs.high_halves(pair, pair))
    return tl.reshape(tl.permute(both, (2, 0, 1)), (2 * R, COUNT))


@triton.jit
def _all(words, WORD: tl.constexpr):
    return tl.full(words.shape, WORD, tl.uint32)


@triton.jit
def _scaled(words, scales, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """All values of the low and of the high half words, times the scales' halves: a tuple of pairs, joined."""
    if FORMAT == "plain":
        return (tl.join(*pairs.halves(words, DTYPE)),)
    elif FORMAT == "e4m3":
        first = pairs.multiply_halves(pairs.e4m3_pair(words, 0, NAN=False), _all(words, 0x7B807B80), DTYPE)  # 2^120
        second = pairs.multiply_halves(pairs.e4m3_pair(words, 1, NAN=False), _all(words, 0x7B807B80), DTYPE)
        return tl.join(*first), tl.join(*second)
    else:
        codes = pairs.e2m1_pairs(words, DTYPE)
        parts = ()
        for i in tl.static_range(4):
            pair = codes[i]
            if FORMAT != "nvfp4":
                # A scale may need all of bfloat16's range: no room for the codes' unit.
                pair = _times(pair, 0x7E807E80, DTYPE)  # 2^126
            parts += (tl.join(*pairs.multiply_halves(pair, scales, DTYPE)),)
        return parts


@triton.jit
def _stack(parts, COUNT: tl.constexpr):
    """COUNT tensors ``[A, B, C]`` to one ``[A, B, C, COUNT]``."""
    A: tl.constexpr = parts[0].shape[0]
    B: tl.constexpr = parts[0].shape[1]
    C: tl.constexpr = parts[0].shape[2]
    if COUNT == 1:
        return tl.reshape(parts[0], (A, B, C, 1))
    elif COUNT == 2:
        return tl.join(parts[0], parts[1])
    elif COUNT == 4:
        four = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(four, (A, B, C, 4))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        return tl.reshape(tl.join(even, odd), (A, B, C, 8))


@triton.jit
def keys(words, scale, PER: tl.constexpr, RUN: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Words ``[BN, W]`` and their scales to k ``[BN, D]``, rows as :func:`in_row_order`."""
    BN: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    H: tl.constexpr = PER // 2
    SCALED: tl.constexpr = FORMAT != "plain" and FORMAT != "e4m3"
    scales = words
    if SCALED:
        scales = _spread(_of_both(_pair_of_scales(scale, FORMAT, DTYPE)), W)
    parts = _scaled(words, scales, FORMAT, DTYPE)
    # Tokens (half, sixteenth, 8), then words (4, W / 4), pairs and their halves.
    k = tl.reshape(_stack(parts, H), (2, BN // 16, 8, 4, W // 4, 2, H))
    k = tl.reshape(tl.permute(k, (1, 0, 2, 3, 4, 6, 5)), (BN, 4, W * H // (4 * RUN), RUN, 2))
    return tl.reshape(tl.permute(k, (0, 2, 1, 3, 4)), (BN, W * PER))


@triton.jit
def values(words, scale, PER: tl.constexpr, RUN: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Words ``[BN, W]`` and their scales to v.T ``[D, BN]``; columns as the rows of :func:`paired`."""
    BN: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    SCALED: tl.constexpr = FORMAT != "plain" and FORMAT != "e4m3"
    first, second = pairs.front_back_rows(words)
    scales = first
    if SCALED:
        scales = _spread(_pair_of_scales(scale, FORMAT, DTYPE), W)
    low, high = pairs.low_halves(first, second), pairs.high_halves(first, second)
    parts = _scaled(low, scales, FORMAT, DTYPE) + _scaled(high, scales, FORMAT, DTYPE)
    v = tl.reshape(_stack(parts, PER), (BN // (8 * RUN), RUN, 4, 8, W // 8, 2, PER))
    return tl.reshape(tl.permute(v, (6, 4, 3, 0, 2, 1, 5)), (W * PER, BN))


@triton.jit
def in_row_order(there):
    """What is said of the tile's tokens, of k's rows: those of a token and of its partner are 8 apart."""
    BN: tl.constexpr = there.shape[0]
    return tl.reshape(tl.permute(tl.reshape(there, (2, BN // 16, 8)), (1, 0, 2)), (BN,))


@triton.jit
def paired(weights, RUN: tl.constexpr):
    """Rows of ``[BN, ROWS]`` in the order in which threads hold them as summands: a token and its partner side by
    side, RUN such pairs in a thread."""
    BN: tl.constexpr = weights.shape[0]
    ROWS: tl.constexpr = weights.shape[1]
    pair = tl.permute(tl.reshape(weights, (BN // 16, 2, 8, ROWS)), (0, 2, 1, 3))
    pair = tl.permute(tl.reshape(pair, (BN // (8 * RUN), RUN, 4, 2, ROWS)), (0, 2, 1, 3, 4))
    return tl.reshape(pair, (BN, ROWS))
