"""File sizes: estimated bytes of a GGUF of a quantization type."""

# Bits per weight of Llama 3.1 8B in llama.cpp's types, from the README of its quantizer; those of the other types
# follow from the size of a block. A type is a mixture: the larger part of the output matrix is Q6_K.
LLAMA_8B_BITS = {
    "IQ1_S": 2.0042,
    "IQ1_M": 2.1460,
    "IQ2_XXS": 2.3824,
    "IQ2_XS": 2.5882,
    "IQ2_S": 2.7403,
    "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548,
    "IQ3_XS": 3.4977,
    "IQ3_S": 3.6606,
    "IQ3_M": 3.7628,
    "IQ4_XS": 4.4597,
    "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697,
    "Q2_K": 3.1593,
    "Q3_K_S": 3.6429,
    "Q3_K_M": 3.9960,
    "Q3_K_L": 4.2979,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
}

# The model that the table above was measured on: its weights, and those in its output embeddings.
LLAMA_8B = (8_030_261_248, 128_256 * 4096)

# What a vocabulary of byte pairs takes in a GGUF: each entry's text, type and merge.
VOCABULARY_ENTRY_BYTES = 50


def estimate_gguf_bytes(type: str, weights: int, output: int, vocabulary: int) -> int:  # noqa: A002 - the field's own word
    """Estimate the size of a GGUF of `weights` weights, `output` of them in the output (or tied) embeddings.

    llama.cpp's types below 8 bit are mixtures that store those embeddings as Q6_K; what a type takes for the others is
    taken from Llama 3.1 8B. Within 3 % of real files; the ternary types and Q2_0 are off by more.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    def get_block_bits(name: str) -> float:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        return 8 * size / values

    if type in LLAMA_8B_BITS:
        whole, head = LLAMA_8B
        bits = (LLAMA_8B_BITS[type] * whole - get_block_bits("Q6_K") * head) / (whole - head)
    else:
        # Only experts become MXFP4. A type that gguf-py does not know yet is counted as 16 bit, which is too much.
        name = "Q8_0" if type == "MXFP4_MOE" else type
        bits = get_block_bits(name if name in GGMLQuantizationType.__members__ else "F16")
    of_output = bits if bits >= 8 else get_block_bits("Q6_K")
    return int((bits * (weights - output) + of_output * output) / 8) + VOCABULARY_ENTRY_BYTES * vocabulary
