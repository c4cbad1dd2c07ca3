"""Where one way of computing overtakes another on a CPU, by what the CPU has.

Each constant says where it was measured: on Sapphire Rapids, which has AMX, or on Zen 4, which has AVX-512 with bf16
dot products but no AMX (2026-11-28), with PyTorch 2.13 on one thread unless another number is given. A CPU of another
kind takes the numbers of the one that it is more like: AMX is what makes PyTorch fast in bf16.
"""

from __future__ import annotations

import torch

from ..backends import cpu
from ..backends.cpu.linear import LINEAR_ROWS

AMX = "amx" in cpu.cpu_isas()
AVX512 = "avx512" in cpu.cpu_isas()
HALF = (torch.bfloat16, torch.float16)

# ---- attention ----------------------------------------------------------------------------------------------------

# Keys of all heads and sequences up to which one query without mask and gradients is PyTorch's; heads of 64. Sapphire
# Rapids, all dtypes: 192 to 1536 keys took ours 1.2 to 1.5 times PyTorch's time, 12288 as long, 98304 0.9 times. Zen 4,
# fp32: 768 keys 1.06 times, 1536 0.99, 3072 0.93, 6144 0.93; fp64: 768 1.07, 3072 0.89; with AVX2 alone on both sides,
# fp32: 768 1.2 times, 12000 1.04, 32768 0.84 or less. bf16 there: 64 keys 0.75 times, 768 0.2, 6144 0.1; fp16 less.
# With a mask ours runs, whatever that costs (Sapphire Rapids, 192 to 1536 keys: 1.6 to 2.4 times; Zen 4, fp32: 1.0 to
# 1.4), since PyTorch's lets a NaN of a closed key through. Where heads share keys PyTorch reads these once a head, and
# took 1.0 to 1.2 times our time with 80 keys or more.
SHORT_DECODE: dict[torch.dtype, int] = dict.fromkeys(cpu.TYPE_CODE, 2**14)
if AVX512 and not AMX:
    SHORT_DECODE |= dict.fromkeys((torch.float32, torch.float64), 2**11)
if not AMX:
    SHORT_DECODE |= dict.fromkeys(HALF, 0)

# ---- linear layers ------------------------------------------------------------------------------------------------

# Rows at which our kernel for decoding reads a weight faster than PyTorch's product does, by whether MKL makes little
# of the CPU's AVX-512: there it took 1.7 to 5 times as long, whatever the rows (Zen 4). Two threads, weights from 768 x
# 768 to 50257 x 768: in fp32 1.0 to 1.9 times PyTorch's speed, with fewer than 4 rows 0.8 to 1.1 (Sapphire Rapids); in
# 16 bits 1.1 to 5.5 times on either; fp64 0.7 to 1.3 times.
ROWS_IN_FP32 = {True: range(1, LINEAR_ROWS + 1), False: range(4, LINEAR_ROWS + 1)}
ROWS_IN_HALF = range(1, LINEAR_ROWS + 1)
# Elements of a weight up to which PyTorch's product of few rows is the faster one. Sapphire Rapids: one row took 1.6
# times PyTorch's time at 256 x 256 in fp32 and as long at 512 x 512; 2.3 times at 64 x 64 in bf16 and 0.4 times at 128
# x 128. Zen 4: 1.5 times at 256 x 256 in fp32, 1.1 at 384 x 384 and 0.95 at 512 x 512; 1.9 times at 64 x 64 in bf16 and
# 0.6 at 96 x 96; in fp16 one, two and four rows 1.7, 1.2 and 0.8 times at 96 x 96, and 1.4, 1.0 and 0.6 at 128 x 128.
SMALL_WEIGHT = {torch.float32: 2**17, torch.bfloat16: 2**12, torch.float16: 2**12 if AMX else 2**13}
# Multiplications in a product beyond which ours is worth its call where it leads (Zen 4); the same in training, where
# an autograd class of our own costs more than better products save: with 64 rows of 128, a step of BERT under autocast
# took 1.2 times as long with it.
SMALL_PRODUCT, SMALL_IN_TRAINING = 2**22, 2**26
# Terms of a sum, and terms where those of a lie below each other, up to which ours leads in bf16 (Zen 4). Its sums are
# made at one go, since they are rounded: with more of b to keep at hand it took up to 1.5 times as long as oneDNN.
DEEPEST, DEEPEST_BELOW = 8192, 4096
# With AMX, oneDNN 3.12 gives one of two threads nothing to do where the product has about 1024 rows and at most 1024
# columns: 1024 x 768 x 3072 ran at 1.1 TFLOP/s, in halves of the rows at 1.9; below and above, the whole is faster.
LONE_ROWS, LONE_COLUMNS = range(641, 1536), range(1, 1025)
# Rows from which on a bias inside oneDNN's product in bf16 pays (Sapphire Rapids): up to 1.2 times as fast, below 0.8
# to 1.0 times.
MANY_ROWS = 512
# Outputs of a layer from which on the rows that a loss ignores are looked for. In BERT base's training on 15 % of 1024
# tokens, with 30522 classes, two of the output layer's three products are then of 154 rows.
MANY_CLASSES = 4096

# ---- elementwise --------------------------------------------------------------------------------------------------

# Elements of a gate in decoding up to which PyTorch's two operators are faster than swiglu. Sapphire Rapids: 5632 took
# 14 us instead of 5, 90112 39 instead of 34. Zen 4: 16384 took 1.5 times PyTorch's time, 32768 1.1 and 65536 0.9 times.
SMALL_GATE = 2**16 if AMX else 2**15
