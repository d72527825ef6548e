"""Kinds of base models: a small random model of each class, made from its configuration, with a small real vocabulary.

`KINDS` names the classes by what is special about them; `make(name, folder)` fills a folder as `save_pretrained` does.
The weights are drawn so that every layer matters and the logits spread like those of a trained model.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


# Embeddings, heads and routers.
WIDE = ("embed_tokens.weight", "lm_head.weight", ".gate.weight")

# How images are prepared: what the converter of the part that reads them looks for.
QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


@cache
def make_byte_pairs(name: str = "gpt-2") -> Any:
    """Return a real vocabulary of byte pairs, with the tokens of ChatML."""
    from gguf_models import read_vocabulary

    tokenizer = read_vocabulary(f"ggml-vocab-{name}.gguf")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def make_sentence_pieces() -> Any:
    """Return a SentencePiece vocabulary of 400 pieces with the tokens of ChatML."""
    import tempfile

    from gguf_models import sentencepiece_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return sentencepiece_tokenizer(Path(folder), CHAT_TEMPLATE)


def _moe(**more: Any) -> dict[str, Any]:
    return {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, **more}


def _qwen3_vl(text: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    return {
        "text_config": {**text, "rope_parameters": rope},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    }


def _qwen3_5() -> dict[str, Any]:
    # A quarter of a head turns with the position; the sections of these dimensions must fit into it.
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    return {
        **TEXT,
        "head_dim": 64,
        "rope_parameters": rope,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }


KINDS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "LlamaForCausalLM": ("dense", lambda: TEXT),
    "tied LlamaForCausalLM": ("dense", lambda: {**TEXT, "tie_word_embeddings": True}),
    "Qwen3MoeForCausalLM": ("experts", lambda: _moe(norm_topk_prob=True)),
    "Qwen2MoeForCausalLM": ("experts", lambda: _moe(shared_expert_intermediate_size=64)),
    "MixtralForCausalLM": ("experts", lambda: {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "OlmoeForCausalLM": (
        "experts",
        # llama.cpp loads one whose heads have keys of their own, as the real ones.
        lambda: {**TEXT, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "GptOssForCausalLM": (
        "experts",
        # Heads as wide as the real ones: llama.cpp rounds where YaRN begins and ends, which narrow ones notice.
        lambda: {
            **TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "head_dim": 64,
            "max_position_embeddings": 131072,
        },
    ),
    "GraniteMoeForCausalLM": ("experts", lambda: {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV3ForCausalLM": (
        "experts",
        lambda: {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "sigmoid",  # stands in the real ones; transformers does not read it, the converter does
            "moe_intermediate_size": 96,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "Glm4MoeForCausalLM": (
        "experts",
        lambda: {
            **TEXT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "Lfm2MoeForCausalLM": (
        "experts",
        lambda: _moe(layer_types=["conv", "full_attention"], num_dense_layers=1, num_hidden_layers=2),
    ),
    "Gemma3ForConditionalGeneration": (
        "wrapper",
        lambda: {
            # llama.cpp takes every sixth layer for one without a window, and this scale, whatever the file says.
            "text_config": {**TEXT, "sliding_window": 32, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 16,
        },
    ),
    "Gemma4ForConditionalGeneration": (
        "wrapper",
        lambda: {
            "text_config": {
                **TEXT,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": 400,
                "hidden_size_per_layer_input": 16,
                "num_kv_shared_layers": 0,
                "global_head_dim": 32,
                "final_logit_softcapping": 30.0,  # llama.cpp takes this, whatever the file says
            },
            "vision_config": VISION,
            "audio_config": None,
        },
    ),
    "Qwen3_5ForConditionalGeneration": (
        "wrapper",
        lambda: {
            "text_config": _qwen3_5(),
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
            },
        },
    ),
    "Mistral3ForConditionalGeneration": (
        "wrapper",
        lambda: {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        },
    ),
    "Ministral3 in Mistral3ForConditionalGeneration": (
        "wrapper",
        lambda: {
            "text_config": {**TEXT, "model_type": "ministral3"},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        },
    ),
    "Llama4ForConditionalGeneration": (
        "wrapper",
        lambda: {
            # Every fourth layer is without rotary embeddings; llama.cpp crashes where there is none.
            "text_config": {
                **TEXT,
                "num_hidden_layers": 4,
                "intermediate_size_mlp": 128,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 64,
            },
            "vision_config": {
                **VISION,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "wrapper",
        lambda: {
            "text_config": {
                **{k: v for k, v in TEXT.items() if k != "head_dim"},
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    "Qwen3VLForConditionalGeneration": (
        "wrapper",
        lambda: _qwen3_vl(TEXT),
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "wrapper",
        lambda: _qwen3_vl(_moe()),
    ),
    "Qwen3NextForCausalLM": (
        "hybrid",
        lambda: _moe(
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            shared_expert_intermediate_size=64,
        ),
    ),
    "Lfm2ForCausalLM": (
        "hybrid",
        lambda: {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "GraniteMoeHybridForCausalLM": (
        "hybrid",
        lambda: {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "dense GraniteMoeHybridForCausalLM": (
        "hybrid",
        lambda: {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "FalconH1ForCausalLM": (
        "hybrid",
        lambda: {
            **TEXT,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_ssm": 128,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "Qwen3_5ForCausalLM": (
        "hybrid",
        lambda: _qwen3_5(),
    ),
}


def make(name: str, folder: Path) -> None:
    """Fill a new folder with a random model of this kind."""
    import torch
    import transformers

    kind = name.rpartition(" ")[2]
    values = KINDS[name][1]()
    if kind.startswith("Gemma4"):
        tokenizer = make_sentence_pieces()
    elif kind == "Qwen3_5ForConditionalGeneration":
        tokenizer = make_byte_pairs("qwen35")  # transformers reads any with the pre-tokenizer of this one
    else:
        tokenizer = make_byte_pairs()
    ids = {
        # llama.cpp's converter pads the vocabulary of some hybrids to a multiple of 8.
        "vocab_size": -(-len(tokenizer) // 8) * 8 if KINDS[name][0] == "hybrid" else len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_class = getattr(transformers, kind)
    if "text_config" in values:
        values = {**values, "text_config": {**values["text_config"], **ids}}
    config = model_class.config_class(**(values if "text_config" in values else {**values, **ids}))
    torch.manual_seed(1)
    model = model_class(config)
    draw_weights(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    if kind == "Qwen3VLMoeForConditionalGeneration":
        _transpose_experts(folder / "model.safetensors")
    if kind.startswith("Qwen") and "VL" in kind:
        (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_IMAGES))
    tokenizer.save_pretrained(folder)
    if tokenizer is make_byte_pairs():
        # The class of the model's own kind would make another pre-tokenizer.
        config_file = folder / "tokenizer_config.json"
        values = {**json.loads(config_file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
        config_file.write_text(json.dumps(values))


def _transpose_experts(file: Path) -> None:
    """Store the experts as the real checkpoints of Qwen3-VL do, which transformers turns round as it loads them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})


def draw_weights(model: Any) -> None:
    """Draw the weights anew, so that no layer is negligible and logits spread by about 3; those of routers too.

    Two experts that are nearly alike to a router would change places by a rounding.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv1d" not in name:
                wide = 3 if name.endswith(WIDE) or "router" in name else 1
                parameter.normal_(std=wide / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
