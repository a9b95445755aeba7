"""Arithmetic in fp32 to the last bits. On a GPU Triton's own is faster and less exact; interpreted, it is not.

`a / b` and `tl.sqrt` are two units of the last place off there, and `tl.exp` is off by as many as its argument is
large: it rounds x * log2(e) before the hardware raises 2 to that.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH, LN_2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440054690583e-4)  # the first has few bits
LEAST_EXPONENT = tl.constexpr(-104.0)  # fp32 has nothing as small as its power of e, but 0


@triton.jit
def divide(a, b):
    """a / b as IEEE 754 rounds it; `b` may be an integer."""
    return tl.div_rn(a, b * 1.0)


@triton.jit
def exp(x):
    """e^x: 2^n * e^r with n whole, x = n * ln 2 + r and |r| at most ln 2 / 2. NaN stays."""
    x = tl.where(x < LEAST_EXPONENT, LEAST_EXPONENT, x)
    n = tl.floor(x * LOG2_E + 0.5)
    return tl.exp2(n) * tl.exp((x - n * LN_2_HIGH) - n * LN_2_LOW)
