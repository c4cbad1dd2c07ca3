"""Where one way of computing overtakes another on a CPU, by what the CPU has.

Each constant, or the page that it names, says where it was measured: on Sapphire Rapids, which has AMX, or on Zen 4,
which has AVX-512 with bf16 dot products but no AMX (2026-11-28), with PyTorch 2.13 on one thread unless another number
is given. A CPU of another kind takes the numbers of the one that it is more like: AMX is what makes PyTorch fast in
bf16.
"""

from __future__ import annotations

import torch

from ..backends import cpu
from ..backends.cpu.linear import LINEAR_ROWS

AMX = "amx" in cpu.cpu_isas()
AVX512 = "avx512" in cpu.cpu_isas()
HALF = (torch.bfloat16, torch.float16)

# ---- attention ----------------------------------------------------------------------------------------------------

# Keys of all heads and sequences up to which one query without mask and gradients is PyTorch's: 768 in fp32 took ours
# 1.06 times PyTorch's time on Zen 4 (docs/design/attention.md). With a mask ours runs, since PyTorch's lets a NaN of a
# closed key through.
SHORT_DECODE: dict[torch.dtype, int] = dict.fromkeys(cpu.TYPE_CODE, 2**14)
if AVX512 and not AMX:
    SHORT_DECODE |= dict.fromkeys((torch.float32, torch.float64), 2**11)
if not AMX:
    SHORT_DECODE |= dict.fromkeys(HALF, 0)

# ---- linear layers ------------------------------------------------------------------------------------------------

# Measurements: docs/design/linear.md.
# Whether MKL makes little of this CPU's AVX-512: one row in fp32 took it 1.7 times as long as our kernel (Zen 4).
MKL_LAGS = AVX512 and not cpu.is_intel()
# Rows, by that, at which our kernel for decoding reads an fp32 weight faster than PyTorch does; and the rows of every
# dtype that the kernel leads in (bf16: 1.1 times as fast or more). fp64 is PyTorch's.
ROWS_IN_FP32 = {True: range(1, LINEAR_ROWS + 1), False: range(4, LINEAR_ROWS + 1)}
FASTER_ROWS: dict[torch.dtype, range] = {}
if cpu.missing_reason is None:
    FASTER_ROWS = dict.fromkeys(HALF, range(1, LINEAR_ROWS + 1)) | {torch.float32: ROWS_IN_FP32[MKL_LAGS]}
# Elements of a weight up to which PyTorch is faster with few rows: at 256 x 256 in fp32 ours took 1.6 times as long.
SMALL_WEIGHT = {torch.float32: 2**17, torch.bfloat16: 2**12, torch.float16: 2**12 if AMX else 2**13}
# Multiplications in a matmul beyond which our GEMM is worth its call where it leads; the same in training, where an
# autograd class of our own costs more than a better matmul saves: a step of small BERT took 1.2 times as long.
SMALL_PRODUCT, SMALL_IN_TRAINING = 2**22, 2**26
# Terms of a sum, and terms where those of a lie below each other, up to which our GEMM leads in bf16: with more, it
# took up to 1.5 times as long as oneDNN.
DEEPEST, DEEPEST_BELOW = 8192, 4096
# Rows and columns of which oneDNN leaves one of two threads idle (AMX): halves of 1024 x 768 x 3072 ran 1.7 times as
# fast as the whole.
LONE_ROWS, LONE_COLUMNS = range(641, 1536), range(1, 1025)
# Rows from which on a bias inside oneDNN's matmul in bf16 pays: up to 1.2 times as fast (AMX).
MANY_ROWS = 512
# Outputs of a layer from which on rows without gradient, as of tokens that a loss ignores, are looked for; and the
# share of all rows beyond which they are left out.
MANY_CLASSES, IGNORED_SHARE = 4096, 0.1
# Logits of a window of linear_cross_entropy; more make no matmul faster.
FULL_RATE = 2**23

# ---- elementwise --------------------------------------------------------------------------------------------------

# Elements of a gate in decoding up to which PyTorch's two operators are faster than swiglu: 16384 took ours 1.5 times
# their time on Zen 4 (docs/design/swiglu.md).
SMALL_GATE = 2**16 if AMX else 2**15
