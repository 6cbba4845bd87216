"""The shapes that are measured: plain data."""

from __future__ import annotations

QUANTIZE_ROWS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
QUANTIZE_COLUMNS = (128, 1024, 4096, 7168, 8192, 16384)

# For layouts and formats that differ from the full sweep in little.
FEW_QUANTIZE = ((1, 4096), (128, 4096), (2048, 7168), (8192, 4096), (32768, 8192))

# For the fused quantisers: columns of what is quantised.
FUSED_QUANTIZE = (
    *((m, k) for k in (4096, 14336) for m in (1, 32, 128, 1024, 8192, 32768)),
    (8192, 7168),
    (8192, 16384),
)

# (rows, K, where it comes from): activations that models quantise and the sweep lacks.
MODEL_ACTIVATIONS = (
    (16, 2880, "gpt-oss.hidden"),
    (4096, 2880, "gpt-oss.hidden"),
    (16, 5120, "qwen3-32b.hidden"),
    (4096, 5120, "qwen3-32b.hidden"),
    (4096, 14336, "llama3-8b.down"),
    (4096, 28672, "llama3-70b.down"),
    (4096, 18432, "deepseek-v3.dense-down"),
    (4608, 3072, "flux.hidden"),
    (4608, 15360, "flux.single-out"),
)

# (N, K, where it comes from): the table of GEMMs.
GEMM_TABLE = (
    (28672, 8192, "llama3-70b.up"),
    (8192, 28672, "llama3-70b.down"),
    (4096, 4096, "llama3-8b.o"),
    (7168, 2048, "deepseek-v3.expert-down"),
)
GEMM_TABLE_ROWS = (1, 4, 8, 16, 24, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 4096, 8192)
"""Some of them fill no tile, which once took half as long again as more rows that do."""

GEMM_WEIGHTS = tuple((n, k) for n, k, _ in GEMM_TABLE)
GEMM_ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)

# (M, N, K): sizes that are no multiple of any tile; K is whole blocks of 32.
RAGGED_GEMMS = ((17, 4100, 4128), (129, 1001, 1440), (1000, 2880, 2880))

MODEL_WEIGHTS = (
    (6144, 4096, "llama3-8b.qkv"),
    (28672, 4096, "llama3-8b.gate-up"),
    (4096, 14336, "llama3-8b.down"),
    (10240, 8192, "llama3-70b.qkv"),
    (8192, 8192, "llama3-70b.o"),
    (57344, 8192, "llama3-70b.gate-up"),
    (5120, 2880, "gpt-oss.qkv"),
    (2880, 4096, "gpt-oss.o"),
    (1536, 7168, "deepseek-v3.q-a"),
    (24576, 1536, "deepseek-v3.q-b"),
    (32768, 512, "deepseek-v3.kv-b"),
    (7168, 16384, "deepseek-v3.o"),
    (4096, 7168, "deepseek-v3.shared-gate-up"),
    (24576, 4096, "qwen3-8b.gate-up"),
    (4096, 12288, "qwen3-8b.down"),
    (51200, 5120, "qwen3-32b.gate-up"),
    (5120, 25600, "qwen3-32b.down"),
)
MODEL_ROWS = (16, 2048)

# Diffusion transformers have one size of M: image and text tokens together.
FLUX_TOKENS = 4096 + 512
FLUX_WEIGHTS = (
    (9216, 3072, "flux.qkv"),
    (12288, 3072, "flux.mlp-in"),
    (3072, 12288, "flux.mlp-out"),
    (21504, 3072, "flux.single-in"),
    (3072, 15360, "flux.single-out"),
)

# (tokens, heads, head dimension): what is appended to a cache, or read from it.
KV_APPENDS = ((1, 8, 128), (64, 8, 128), (512, 8, 128), (4096, 8, 128), (16384, 8, 128), (4096, 8, 64))
KV_PAGE = 16
KV_DECODE_APPENDS = ((16, 8, 128), (256, 8, 128))  # a token of each sequence
# (sequences, tokens of each, heads, head dimension): what is read out of pages.
KV_SEQUENCES = ((1, 32768, 8, 128), (16, 4096, 8, 128), (64, 8192, 8, 128), (16, 4096, 8, 64))
# (sequences, tokens of each, query heads, kv heads, head dimension)
KV_ATTENTION = (
    (1, 32768, 32, 8, 128),
    (1, 131072, 32, 8, 128),
    (16, 4096, 32, 8, 128),
    (64, 8192, 32, 8, 128),
    (64, 32768, 32, 8, 128),
    (256, 2048, 32, 8, 128),
    (64, 8192, 64, 8, 128),
    (64, 8192, 64, 8, 64),
    (64, 8192, 16, 8, 256),
)
KV_READS = ((1024, 128), (65536, 128), (1048576, 128), (65536, 1024))  # (rows, K)

# name -> (hidden, intermediate, local experts, top-k). GPT-OSS 120B has 2880, padded for the interleaved layout's
# tiles; DeepSeek-V3 is one of eight ranks of expert parallelism, every routed row local.
MOE_MODELS = {"gpt-oss-120b": (2944, 2944, 128, 4), "deepseek-v3-ep8": (7168, 2048, 32, 8)}
MOE_TOKENS = (1, 8, 64, 256, 1024, 4096, 8192)

# Where there is no GPU, and in --quick.
SMALL_QUANTIZE = ((1, 4096), (128, 4096), (256, 1024))
SMALL_GEMMS = ((1, 512, 512), (64, 512, 512), (17, 100, 96))
QUICK_QUANTIZE = ((1, 4096), (128, 4096), (8192, 4096), (32768, 8192))
QUICK_GEMMS = ((1, 4096, 4096), (64, 4096, 4096), (4096, 4096, 4096), (16, 28672, 8192), (129, 1001, 1440))
