"""Upstream API: private or undocumented names of TRL, transformers, PEFT, accelerate and torch that Lathe relies on.

Such names may change in any release. `tests/unit/test_upstream_api.py` asserts that each exists with the signature
given here, and that training, models, gguf and estimate use no private name that is missing here. When a new version of
a package breaks the test, look at the code that the reason names.
"""

from typing import NamedTuple


class UpstreamName(NamedTuple):
    """One name of another package.

    `owner` is the import path of a module or class. `signature` has no annotations; it is empty for attributes and for
    functions in C++, of which only the existence is known.
    """

    owner: str
    name: str
    signature: str
    reason: str


# Methods of trainers that ours override; the class is the one whose method is replaced.
OVERRIDDEN = (
    UpstreamName(
        "transformers.Trainer",
        "autocast_smart_context_manager",
        "(self, cache_enabled=True)",
        "bf16 autocast without accelerate's float32 copy of the logits",
    ),
    UpstreamName("transformers.Trainer", "floating_point_ops", "(self, inputs)", "would walk through all parameters"),
    UpstreamName("transformers.Trainer", "_clip_grad_norm", "(self, model)", "the gradient's norm, before the step"),
    UpstreamName(
        "transformers.Trainer",
        "training_step",
        "(self, model, inputs, num_items_in_batch=None)",
        "one forward and backward pass, whose loss is checked",
    ),
    UpstreamName("trl.SFTTrainer", "training_step", "(self, *args, **kwargs)", "passes its arguments on"),
    UpstreamName("trl.DPOTrainer", "training_step", "(self, *args, **kwargs)", "passes its arguments on"),
    UpstreamName(
        "trl.GRPOTrainer",
        "training_step",
        "(self, model, inputs, num_items_in_batch)",
        "counts passes in `_step`, which the buffered answers are indexed by",
    ),
    UpstreamName(
        "transformers.Trainer", "_save_checkpoint", "(self, model, trial)", "checkpoints that are complete or absent"
    ),
    UpstreamName("trl.SFTTrainer", "_save_checkpoint", "(self, model, trial)", "would add a model card"),
    UpstreamName("trl.DPOTrainer", "_save_checkpoint", "(self, model, trial)", "would add a model card"),
    UpstreamName("trl.GRPOTrainer", "_save_checkpoint", "(self, model, trial)", "would add a model card"),
    UpstreamName(
        "transformers.Trainer",
        "save_model",
        "(self, output_dir=None, _internal_call=False)",
        "would gather a sharded base",
    ),
    UpstreamName(
        "transformers.Trainer",
        "_save",
        "(self, output_dir=None, state_dict=None)",
        "would add tokenizer and pickled arguments",
    ),
    UpstreamName(
        "transformers.Trainer",
        "_load_from_checkpoint",
        "(self, resume_from_checkpoint, model=None)",
        "called once when a run resumes; our part of a checkpoint is read there",
    ),
    UpstreamName("transformers.Trainer", "log", "(self, logs, start_time=None)", "adds the count of tokens"),
    UpstreamName("trl.SFTTrainer", "log", "(self, logs, start_time=None)", "adds `_metrics` to what is logged"),
    UpstreamName("trl.DPOTrainer", "log", "(self, logs, start_time=None)", "adds `_metrics` to what is logged"),
    UpstreamName("trl.GRPOTrainer", "log", "(self, logs, start_time=None)", "adds `_metrics` to what is logged"),
    UpstreamName(
        "trl.SFTTrainer",
        "compute_loss",
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
        "logits at supervised positions only; the trainer averages gradients over processes",
    ),
    UpstreamName(
        "trl.DPOTrainer",
        "compute_loss",
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
        "counts tokens and pairs",
    ),
    UpstreamName(
        "trl.GRPOTrainer",
        "compute_loss",
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
        "counts tokens",
    ),
    UpstreamName(
        "transformers.Trainer",
        "evaluate",
        "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
        "SFT: loss per supervised token; GRPO: rewards of greedy answers",
    ),
    UpstreamName(
        "trl.SFTTrainer",
        "evaluate",
        "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
        "loss per supervised token, where the stock loop averages over batches",
    ),
    UpstreamName(
        "transformers.Trainer",
        "_get_train_sampler",
        "(self, train_dataset=None)",
        "the order of an epoch, with padding examples last",
    ),
    UpstreamName(
        "transformers.Trainer",
        "_evaluate",
        "(self, trial, ignore_keys_for_eval, skip_scheduler=False)",
        "DPO's evaluation before the first step, not repeated when a run resumes",
    ),
    UpstreamName(
        "trl.DPOTrainer",
        "_prepare_dataset",
        "(self, dataset, processing_class, args, dataset_name)",
        "would tokenize again; token ids are there",
    ),
    UpstreamName(
        "trl.DPOTrainer",
        "_precompute_ref_logps",
        "(self, dataset, name, batch_size)",
        "draws progress bars, which are shown on a terminal only",
    ),
    UpstreamName(
        "trl.DPOTrainer",
        "compute_ref_log_probs",
        "(self, model, inputs)",
        "the reference's log-probabilities, in the precision of training",
    ),
)

# Attributes of trainers, models and layers that are read or written.
ATTRIBUTES = (
    UpstreamName("transformers.Trainer", "_tr_loss", "", "loss since the last log, which a checkpoint keeps"),
    UpstreamName("transformers.Trainer", "_globalstep_last_logged", "", "step of the last log, in a checkpoint too"),
    UpstreamName("trl.SFTTrainer", "_metrics", "", "measures since the last log, which a checkpoint keeps"),
    UpstreamName("trl.DPOTrainer", "_metrics", "", "the same; validation is averaged over pairs there"),
    UpstreamName("trl.GRPOTrainer", "_metrics", "", "the same"),
    UpstreamName("trl.GRPOTrainer", "_step", "", "passes so far, restored when a run resumes: TRL has no hook for it"),
    UpstreamName(
        "trl.GRPOTrainer", "_buffered_inputs", "", "sampled answers, kept in a checkpoint: no hook of TRL does"
    ),
    UpstreamName("trl.GRPOTrainer", "num_iterations", "", "steps per batch of answers"),
    UpstreamName("trl.GRPOTrainer", "generation_config", "", "the sampling of answers by transformers"),
    UpstreamName("trl.GRPOTrainer", "vllm_generation", "", "the sampling of answers by vLLM"),
    UpstreamName("trl.GRPOTrainer", "eos_token_ids", "", "tells a finished answer from a cut one"),
    UpstreamName("transformers.PreTrainedConfig", "_attn_implementation", "", "which attention the model has"),
    UpstreamName("transformers.PreTrainedModel", "all_tied_weights_keys", "", "names of weights that are one"),
    UpstreamName(
        "bitsandbytes.nn.Linear4bit",
        "support_avx512bf16_for_cpu",
        "",
        "set to false: layers repacked for inference have no gradient",
    ),
)

# Functions and methods that are called.
CALLED = (
    UpstreamName("transformers.Trainer", "_prepare_inputs", "(self, inputs)", "moves a batch to the device"),
    UpstreamName("transformers.Trainer", "compute_loss_context_manager", "(self)", "the autocast of a forward pass"),
    UpstreamName(
        "transformers.core_model_loading",
        "revert_weight_conversion",
        "(model, state_dict)",
        "names and shapes of weights as the base stores them",
    ),
    UpstreamName(
        "transformers.integrations.sdpa_attention",
        "sdpa_attention_forward",
        "(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, "
        "cache=None, **kwargs)",
        "torch's attention as transformers calls it",
    ),
    UpstreamName(
        "transformers.quantizers.base", "get_keys_to_not_convert", "(model)", "which layers stay out of 4 bits"
    ),
    UpstreamName(
        "transformers.utils.chat_template_utils",
        "_compile_jinja_template",
        "(chat_template)",
        "syntax errors of a chat template, found before it is used",
    ),
    UpstreamName("peft.helpers", "disable_input_dtype_casting", "(model, active=True)", "adapters take bf16 as it is"),
    UpstreamName(
        "peft.tuners.tuners_utils",
        "check_target_module_exists",
        "(config, key)",
        "which layers PEFT will put an update on",
    ),
    UpstreamName(
        "peft.utils.transformers_weight_conversion",
        "convert_peft_config_for_transformers",
        "(peft_config, model, conversions)",
        "which names of layers PEFT takes for experts",
    ),
    UpstreamName("peft.tuners.lora.layer", "ParamWrapper", "", "the update of a weight without a layer of its own"),
    UpstreamName(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "",
        "kinds of models with a class for text alone",
    ),
    UpstreamName(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "",
        "kinds of models of text and images",
    ),
    UpstreamName(
        "accelerate.commands.config.config_args", "load_config_from_file", "(config_file)", "reads a launcher's file"
    ),
    UpstreamName("accelerate.commands.launch", "launch_command", "(args)", "starts the worker processes"),
    UpstreamName("accelerate.commands.launch", "launch_command_parser", "(subparsers=None)", "reads its command"),
    UpstreamName("accelerate.data_loader.SeedableRandomSampler", "set_epoch", "(self, epoch)", "the order of an epoch"),
    UpstreamName("torch", "_softmax_backward_data", "", "the gradient of a softmax, in bf16"),
    UpstreamName("torch.cpu", "_is_avx512_bf16_supported", "()", "whether bf16 is multiplied in hardware"),
    UpstreamName("torch.cpu", "_is_amx_tile_supported", "()", "whether bf16 is multiplied in hardware"),
    UpstreamName("torch.ops.mkldnn", "_is_mkldnn_bf16_supported", "", "the same on ARM"),
    UpstreamName("torch._subclasses.fake_tensor", "FakeTensorMode", "", "tensors without data, for the estimate"),
    UpstreamName("torch.utils._python_dispatch", "TorchDispatchMode", "", "sees every tensor that is made"),
    UpstreamName("torch.utils._pytree", "tree_leaves", "(tree, is_leaf=None)", "the tensors in a function's result"),
    UpstreamName(
        "torch.utils._pytree",
        "tree_map_only",
        "(type_or_types_or_pred, /, func, tree, is_leaf=None)",
        "all tensors of a state",
    ),
    UpstreamName("llama_cpp._ggml", "libggml", "", "names and block sizes of ggml's types"),
)

UPSTREAM_API = (*OVERRIDDEN, *ATTRIBUTES, *CALLED)
