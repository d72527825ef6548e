"""Trains with TRL's SFTTrainer, on rows of text: python -m trainers.trl_sft WORK RESULT."""

import sys
from pathlib import Path

from trainers.work import LEARNING_RATE, SEED, WARMUP, Work


def main() -> None:
    """Train, and leave the steps in the second file."""
    from trainers import steps

    steps.record(Path(sys.argv[2]))
    run(Work.read(sys.argv[1]))


def run(work: Work) -> None:
    """Train."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(SEED)
    on_gpu = torch.cuda.is_available()
    bf16 = work.settings.precision == "bf16"
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        quantization_config=four_bit if work.load_in_4bit else None,
        device_map={"": "cuda" if on_gpu else "cpu"},
    )
    config = SFTConfig(
        output_dir=f"{work.folder}/unused",
        save_strategy="no",
        report_to=[],
        use_cpu=not on_gpu,
        bf16=bf16,
        use_liger_kernel=work.settings.has_liger,
        seed=SEED,
        data_seed=SEED,
        max_steps=work.steps,
        per_device_train_batch_size=work.examples,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        logging_steps=work.logging_steps,
        max_length=None if work.settings.padding_free else work.max_length,  # rows are no longer than that anyway
        packing=work.settings.packing,
        padding_free=work.settings.padding_free,
        gradient_checkpointing=work.settings.checkpointing,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=load_dataset("json", data_files=work.rows("prompt_completion"), split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=work.rank, lora_alpha=work.alpha, target_modules="all-linear"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
    )
    trainer.train()


if __name__ == "__main__":
    main()
