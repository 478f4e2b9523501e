"""For --help: the groups that the flags of each job stand in, the examples, and what may be given without its flag.

Every field of a job's settings has a place here; a test says which one has not.
"""

from __future__ import annotations

POSITIONALS = {"evaluate": "checkpoint", "export": "checkpoint", "generate": "checkpoint", "serve": "checkpoint"}
"""The flag of each job whose value may also come first, alone."""

_SETTINGS = "dry_run"
_TRACKING = "tracking_uri experiment"
_READING = {
    "settings": _SETTINGS,
    "data": "source output text_column column_separator document_separator max_document_bytes val_fraction val_split "
    "skip_bad_files skip_bad_records limit_documents limit_bytes filters "
    "filter_bounds languages language_score own_rules mask_personal_data filter_report dedup dedup_words "
    "dedup_bands dedup_rows dedup_threshold decontaminate verify",
    "tokenizer": "vocab_size sample_bytes tokenizer end_of_text_token train_tokenizer min_frequency special_tokens "
    "pattern",
    "tracking": _TRACKING,
    "cluster": "num_workers item_bytes download_workers cache_bytes nodes price_per_hour",
}

GROUPS: dict[str, dict[str, str]] = {
    "tokenize": _READING,
    "train_tokenizer": _READING,
    "import_shards": {
        "settings": _SETTINGS,
        "data": "train val output headerless tokenizer eot_id",
        "tracking": _TRACKING,
    },
    "pretrain": {
        "settings": _SETTINGS,
        "model": "depth vocab_size num_layers num_heads d_model d_ff context_length theta norm_eps tie_embeddings "
        "qk_norm init_std embedding_init_std zero_init_projections zero_init_output",
        "optimization": "tokens_per_parameter train_steps tokens_per_step batch_size grad_accum_steps optimizer lr "
        "embedding_lr output_lr vector_lr min_lr_fraction warmup_fraction warmup_steps schedule decay_fraction "
        "decay_from beta1 beta2 eps weight_decay embedding_weight_decay muon_momentum muon_iterations "
        "muon_coefficients grad_clip seed precision compile deterministic recompute skip_nonfinite",
        "data": "data phase packing document_mask val_every val_tokens",
        "tasks": "tasks task_files task_questions tasks_every hellaswag hellaswag_every",
        "checkpoints": "output checkpoint branch_from step checkpoint_every keep_checkpoints keep_every",
        "tracking": f"{_TRACKING} registered_model log_every sample_every sample_prompt sample_tokens profile_steps "
        "price_per_hour tokens_per_second",
        "cluster": "num_workers device resize_seconds collective_timeout max_failures",
    },
    "finetune": {
        "settings": _SETTINGS,
        "data": "source data messages_key chat_template context_length val_fraction limit_conversations "
        "skip_bad_files val_every val_tokens",
        "optimization": "epochs tokens_per_step batch_size optimizer lr schedule warmup_fraction min_lr_fraction beta1 "
        "beta2 weight_decay grad_clip seed precision compile deterministic recompute",
        "checkpoints": "checkpoint output checkpoint_every keep_checkpoints",
        "tracking": f"{_TRACKING} registered_model log_every sample_every sample_prompt sample_tokens",
        "cluster": "num_workers device resize_seconds collective_timeout max_failures data_workers item_bytes "
        "download_workers cache_bytes",
    },
    "evaluate": {
        "settings": _SETTINGS,
        "model": "checkpoint",
        "data": "data val_tokens document_mask output",
        "tasks": "tasks task_files task_questions hellaswag hellaswag_questions",
        "tracking": "tracking_uri",
        "cluster": "num_workers batch_size device",
    },
    "generate": {
        "settings": _SETTINGS,
        "model": "checkpoint device dtype batch_size",
        "text": "prompt prompts interactive chat output max_new_tokens num_samples",
        "sampling": "temperature top_k top_p seed",
    },
    "export": {
        "settings": _SETTINGS,
        "model": "checkpoint output format dtype max_file_bytes",
        "hub": "push_to_hub",
        "tracking": "mlflow tracking_uri",
    },
    "serve": {
        "settings": _SETTINGS,
        "model": "checkpoint model_name dtype",
        "server": "host port max_connections head_seconds",
        "requests": "max_prompt_tokens max_tokens max_texts max_body_bytes request_seconds",
        "cluster": "num_replicas device max_batch_size max_waiting",
    },
    "sweep": {
        "settings": _SETTINGS,
        "trials": "vary search num_trials search_seed",
        "early stopping": "early_stopping min_steps reduction_factor",
        "checkpoints": "output",
        "cluster": "trials_at_once",
    },
    "demo": {"data": "stories story_bytes story_seed conversations num_conversations"},
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "tokenize": (
        "--config configs/demo.yaml",
        "--source 'my/texts/*.jsonl.zst' --output data/mine --vocab_size 32000",
        "--source input.txt --val_split tail --val_fraction 0.1 --output data/mine --vocab_size 1000",
        "--source 'my/texts/*.jsonl.zst' --filters gopher --nodes 8x16 --price_per_hour 0.3 --dry_run",
        "--verify --output data/mine",
    ),
    "train_tokenizer": ("--source 'my/texts/*.jsonl.zst' --output data/tokenizer --vocab_size 32000",),
    "import_shards": (
        "--train 'tokens/train_*.bin' --val 'tokens/val_*.bin' --output data/imported",
        "--headerless --train train.bin --val val.bin --output data/imported",
    ),
    "pretrain": (
        "--config configs/demo.yaml",
        "--config configs/demo.yaml --output runs/muon --optimizer muon --lr 0.01",
        "--data data/mine --output runs/mine --depth 4 --vocab_size 32000 --num_workers 2",
        "--data data/web:0.7 --data data/books:0.3 --phase 6000 data/web:0.2 data/books:0.8 --output runs/mixed",
        "--depth 24 --num_workers 8 --price_per_hour 2.69 --dry_run",
    ),
    "finetune": (
        "--config configs/chat.yaml",
        "--checkpoint runs/mine --source 'my/chats/*.jsonl' --data data/chat --output runs/chat --lr 1e-4",
        "--checkpoint runs/mine --source chats.parquet --chat_template gpt2.5 --num_workers 2",
    ),
    "evaluate": (
        "runs/demo",
        "runs/demo --data data/mine --val_tokens 100000",
        "runs/demo --hellaswag hellaswag_val.jsonl",
        "runs/demo --tasks core --task_files eval_bundle",
        "runs/demo --tasks arc_easy,piqa,lambada",
    ),
    "generate": (
        "runs/demo --prompt 'Once upon a time, '",
        "runs/demo --interactive",
        "runs/demo-chat --chat",
        "runs/demo --prompts prompts.txt --output texts.jsonl --num_samples 4",
    ),
    "export": (
        "runs/demo --output export/demo",
        "runs/demo --output export/demo --dtype bf16",
        "runs/demo --output export/demo-gguf --format gguf --dtype q8_0",
    ),
    "serve": (
        "runs/demo",
        "runs/demo --port 8080 --num_replicas 2",
    ),
    "sweep": (
        "--config configs/demo.yaml --output sweeps/lr --vary lr=1e-3,3e-3 beta2=0.95,0.99",
        "--data data/mine --output sweeps/lr --search random --num_trials 20 --vary lr=1e-4..1e-2:log",
    ),
    "demo": ("--config configs/demo.yaml",),
}
"""What stands behind ``python jobs/NAME.py``."""
