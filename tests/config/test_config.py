"""Settings: preset, then flags; every mistake one sentence that names the value and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from model.muon import MATCHED_RMS
from pipeline.config.command_line import resolve
from pipeline.config.data import DemoConfig, ImportShardsConfig, TokenizeConfig, TrainTokenizerConfig
from pipeline.config.finetuning import FinetuneConfig
from pipeline.config.inference import EvaluateConfig, ExportConfig, GenerateConfig, ServeConfig
from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig, worker_range
from pipeline.errors import UserError
from pipeline.tokenizer.patterns import MAX_TOKENS

ROOT = Path(__file__).resolve().parent.parent.parent
SECTIONS_OF_ALL: list[tuple[str, type]] = [
    ("tokenize", TokenizeConfig),
    ("train_tokenizer", TrainTokenizerConfig),
    ("pretrain", PretrainConfig),
    ("evaluate", EvaluateConfig),
    ("generate", GenerateConfig),
]


def pretrain(*flags: str) -> PretrainConfig:
    return resolve(PretrainConfig, "pretrain", flags, program="jobs/pretrain.py")


def preset(tmp_path: Path, text: str) -> str:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_recipe() -> None:
    config = pretrain()
    model = config.model_config(vocab_size=50257)
    assert (model.num_layers, model.num_heads, model.d_model, model.d_ff, model.context_length) == (
        12,
        12,
        768,
        2048,
        1024,
    )
    assert config.windows_per_step == 512


def test_every_preset_resolves() -> None:
    """Each section of each file under configs/."""
    classes: dict[str, type] = {"import_shards": ImportShardsConfig, "demo": DemoConfig} | dict(SECTIONS_OF_ALL)
    classes |= {"export": ExportConfig, "serve": ServeConfig, "finetune": FinetuneConfig}
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"demo", "fast", "fastest", "gpt2.5", "gpt2.5-2026-03"}
    for path in paths:
        for section in yaml.safe_load(path.read_text(encoding="utf-8")):
            resolve(classes[section], section, ["--config", str(path)], program="job")


@pytest.mark.parametrize(
    ("name", "tokens"), [("gpt2.5-2026-03", 10_485_760_000), ("fast", 2_673_868_800), ("fastest", 1_703_936_000)]
)
def test_the_presets_of_published_results_take_their_tokens(name: str, tokens: int) -> None:
    config = pretrain("--config", str(ROOT / f"configs/{name}.yaml"))
    assert config.train_steps * config.tokens_per_step == tokens
    assert config.model_config(50_257).head_dim in {64, 128}


def test_the_tuned_muon_rate_is_converted() -> None:
    """Theirs: steps of 0.025 sqrt(max(1, R/C)), 0.025 x 0.05 of a weight taken off; ours: lr 0.2 sqrt(max(R, C))."""
    config = pretrain("--config", str(ROOT / "configs/fastest.yaml"))
    for rows, columns in ((768, 768), (2048, 768)):
        ours = config.lr * MATCHED_RMS * max(rows, columns) ** 0.5
        assert ours == pytest.approx(0.025 * max(1, rows / columns) ** 0.5, rel=1e-3)
    assert config.lr * config.weight_decay == pytest.approx(0.025 * 0.05, rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2.5", "demo"])
@pytest.mark.parametrize(("section", "config_class"), SECTIONS_OF_ALL)
def test_the_presets_resolve(name: str, section: str, config_class: type) -> None:
    resolve(config_class, section, ["--config", str(ROOT / f"configs/{name}.yaml")], program="job")


def test_the_recipe_preset_repeats_the_defaults() -> None:
    from_preset = to_dict(pretrain("--config", str(ROOT / "configs/gpt2.5.yaml")))
    differing = {name for name, value in to_dict(PretrainConfig()).items() if from_preset[name] != value}
    assert differing == {"device", "hellaswag"}  # GPUs by name, so that it fails at once without; questions of the hub


def test_flags_override_the_preset_and_hyphens_are_underscores(tmp_path: Path) -> None:
    path = preset(tmp_path, "pretrain: {lr: 1e-3, train_steps: 10, tie_embeddings: false}")
    config = pretrain("--train-steps", "20", "--config", path, "--batch_size=8")
    assert (config.lr, config.train_steps, config.tie_embeddings, config.batch_size) == (1e-3, 20, False, 8)


def test_the_warmup_of_a_preset_is_taken_back_for_one_in_steps(tmp_path: Path) -> None:
    path = preset(tmp_path, "pretrain: {warmup_fraction: 0.05}")
    config = pretrain("--config", path, "--warmup_fraction", "None", "--warmup_steps", "300")
    assert (config.num_warmup_steps, config.warmup_fraction) == (300, None)
    assert (pretrain().num_warmup_steps, pretrain("--warmup_steps", "0").num_warmup_steps) == (4000, 0)
    assert pretrain("--schedule", "wsd").first_decay_step == 64_000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat"),
        (["--train_step", "1"], "unknown flag --train_step, did you mean 'train_steps'?"),
        (["stray"], "unknown argument stray"),
        (["--lr", "fast"], "--lr: could not convert string to float: 'fast'"),
        (["--warmup_steps", "few"], "--warmup_steps: could not convert string to int: 'few'"),
        (["--device", "gpu"], "invalid choice 'gpu'"),
        (["--lr"], "Missing value for argument '--lr'"),
        (["--config"], "--config needs the path"),
        (["--config", "absent.yaml"], "there is no preset absent.yaml"),
        (["--d_model", "100"], "d_model 100 is not divisible by num_heads 12"),
        (["--train_steps", "0"], "train_steps is 0; it must be positive"),
        (["--tokens_per_step", "1000"], "tokens_per_step 1,000 is no multiple of context_length 1,024"),
        (["--tokens_per_step", "2048"], "fewer than the 4 workers"),
        (["--grad_accum_steps", "2"], "is 262,144 tokens, but tokens_per_step is 524,288"),
        (["--num_workers", "0"], "num_workers is 0; it must be positive"),
        (["--num_workers", "-1"], "num_workers is -1; it must be positive"),
        (["--num_workers", "0:4"], "num_workers is 0:4; it must be positive"),
        (["--num_workers", "8:2"], "num_workers is 8:2; the fewest come first: 2:8"),
        (["--num_workers", "2-8"], "num_workers is 2-8; give a number, or the fewest and the most, for instance 2:8"),
        (["--num_workers", "1:600"], "gives 512 windows of 1,024 tokens, fewer than the 600 workers"),
        (["--num_workers", "2:8", "--grad_accum_steps", "4"], "grad_accum_steps 4 cannot hold on 2 to 8 workers alike"),
        (["--resize_seconds", "0"], "resize_seconds is 0; it must be positive"),
        (["--batch_size", "0"], "batch_size is 0; it must be positive"),
        (["--batch_size", "most"], "most"),
        (["--batch_size", "auto", "--grad_accum_steps", "4"], "grad_accum_steps 4 says what batch_size auto is to"),
        (["--output_lr", "1e-3"], "output_lr is 0.001, but the output matrix is the embedding; leave it out, or give"),
        (["--zero_init_output"], "zero_init_output is True, but the output matrix is the embedding"),
        (["--embedding_lr", "-1"], "embedding_lr is -1.0; it must not be negative"),
        (["--vector_lr", "1", "--lr", "0"], "vector_lr is 1.0 and lr is 0.0; with it, lr must be positive"),
        (["--init_std", "-0.1"], "init_std is -0.1; it must not be negative"),
        (["--muon_iterations", "0"], "muon_iterations is 0; it must be positive"),
        (["--muon_momentum", "1"], "muon_momentum is 1.0; it must lie in [0, 1)"),
        (["--muon_coefficients", "2", "-1.5", "1.5"], "muon_coefficients 2 -1.5 1.5 turn 1 into 2, which must lie"),
        (["--profile_steps", "20"], "profile_steps is 20; give the first and the last step, for instance 20:25"),
        (["--profile_steps", "25:20"], "profile_steps is 25:20; the first step must not come after the last"),
        (
            ["--warmup_steps", "4001", "--warmup_fraction", "0.05"],
            "give one of them (--warmup_fraction None takes back",
        ),
        (["--warmup_steps", "80001"], "warmup_steps is 80001; it must lie between 0 and train_steps 80000"),
        (["--warmup_fraction", "1.5"], "warmup_fraction is 1.5; it must lie in [0, 1]"),
        (["--decay_fraction", "0.5"], "decay_fraction is 0.5, but only with schedule wsd it has a meaning"),
        (["--schedule", "linear", "--decay_from", "9"], "decay_from is 9, but only with schedule wsd it has a meaning"),
        (
            ["--schedule=wsd", "--decay_from=9", "--decay_fraction=0.1"],
            "decay_from 9 and decay_fraction 0.1 are two ways",
        ),
        (["--schedule=wsd", "--decay_from=3999"], "would rise until step 4000 and fall from step 3999 on"),
        (["--schedule=wsd", "--decay_from=80001"], "and train_steps 80000; change the warm-up"),
        (["--schedule", "step"], "invalid choice 'step'"),
        (["--recompute", "all"], "invalid choice 'all'"),
        (["--deterministic", "yes"], "invalid choice 'yes'"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain(*flags)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pretrain: {learning_rate: 1}", "unknown key 'learning_rate'"),
        ("pretrain: {train_step: 1}", "did you mean 'train_steps'?"),
        ("pretain: {lr: 1}", "unknown section 'pretain', did you mean 'pretrain'?"),
        ("lr: 1", "one section per job"),
        ("pretrain: {lr: [", "cannot be read"),
        ("pretrain: {lr: quick}", "section pretrain: "),
        ("pretrain: {d_model: 100}", "section pretrain: d_model 100"),
    ],
)
def test_mistakes_in_a_preset_name_it(tmp_path: Path, text: str, sentence: str) -> None:
    path = preset(tmp_path, text)
    with pytest.raises(UserError) as caught:
        pretrain("--config", path)
    assert sentence in str(caught.value) and path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flag_may_mend_what_the_preset_gets_wrong(tmp_path: Path) -> None:
    assert pretrain("--config", preset(tmp_path, "pretrain: {d_model: 100}"), "--d_model", "96").d_model == 96


def test_an_elastic_number_of_workers_is_a_range_in_flags_and_presets(tmp_path: Path) -> None:
    for unquoted in ("2:8", "'2:8'"):  # to YAML 1.1 the first is a number to the base of 60
        from_preset = pretrain("--config", preset(tmp_path, f"pretrain: {{num_workers: {unquoted}}}"))
        assert from_preset == pretrain("--num_workers", "2:8") == pretrain("--num-workers=2:8")
        assert worker_range(from_preset.num_workers) == (2, 8)
    assert pretrain("--config", preset(tmp_path, "pretrain: {num_workers: 3}")).num_workers == 3
    assert worker_range(4) == worker_range("4") == worker_range("4:4") == (4, 4)
    assert pretrain("--num_workers", "4:4", "--grad_accum_steps", "4").grad_accum_steps == 4


def train_tokenizer(*flags: str) -> TrainTokenizerConfig:
    return resolve(TrainTokenizerConfig, "train_tokenizer", flags, program="jobs/train_tokenizer.py")


def test_words_and_ranges_are_the_same_in_flags_and_presets(tmp_path: Path) -> None:
    path = preset(tmp_path, "pretrain: {deterministic: off, compile: on, profile_steps: 20:25, batch_size: auto}")
    flags = ["--deterministic", "off", "--compile", "on", "--profile_steps", "20:25", "--batch_size", "auto"]
    assert pretrain("--config", path) == pretrain(*flags)
    assert pretrain(*flags).batch_size == "auto"
    assert pretrain("--batch_size", "2e1").batch_size == 20


def test_special_tokens_are_a_list_in_flags_and_presets(tmp_path: Path) -> None:
    assert train_tokenizer().special_tokens == ("<|endoftext|>",)
    path = preset(tmp_path, "train_tokenizer: {special_tokens: [<|a|>, b c], pattern: cl100k}")
    assert train_tokenizer("--config", path).special_tokens == ("<|a|>", "b c")
    flags = train_tokenizer("--config", path, "--special-tokens", "xx", "ż", "--vocab_size", "300")
    assert (flags.special_tokens, flags.pattern, flags.vocab_size) == (("xx", "ż"), "cl100k", 300)
    for together in (
        ["--special_tokens", "<|a|>,b c"],
        ["--special_tokens=<|a|>,b c"],
        ["--special-tokens", "<|a|>", "b c"],
    ):
        assert train_tokenizer(*together).special_tokens == ("<|a|>", "b c")
    none = train_tokenizer("--config", preset(tmp_path, "train_tokenizer: {special_tokens: []}"), "--vocab_size", "256")
    assert none.special_tokens == ()
    assert TrainTokenizerConfig(**to_dict(flags)) == flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vocab_size", "256"], "vocab_size is 256; it must be at least 257: 256 bytes and 1 special tokens"),
        (["--min_frequency", "0"], "min_frequency is 0; it must be positive"),
        (["--vocab_size", "1048576"], "vocab_size is 1048576; it must be at most 1048575"),
        (["--special_tokens", "xx", "xx"], "special_tokens are ['xx', 'xx']; they must differ"),
        (["--special_tokens", "xx", ""], "special_tokens are ['xx', '']; none may be empty"),
        (["--special_tokens", "xx", "x"], "special token 'x' is a single byte, which is a token already; choose a"),
        (["--special_tokens", "xx", "\udcff"], r"special token '\udcff' is not UTF-8 text; choose another name"),
        (["--pattern", "gpt4"], "invalid choice 'gpt4'"),
        (["--val_fraction", "1"], "val_fraction is 1.0; it must lie in [0, 1)"),
        (["--sample_bytes", "0"], "sample_bytes is 0; it must be positive"),
        (["--item_bytes", "-1"], "item_bytes is -1; it must be positive"),
        (["--num_workers", "0"], "num_workers is 0; it must be positive"),
    ],
)
def test_mistakes_of_tokenizer_training(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        train_tokenizer(*flags)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_no_vocabulary_is_larger_than_the_tokenizer_takes() -> None:
    with pytest.raises(UserError, match="vocab_size is 1048576; it must be at most 1048575"):
        TokenizeConfig(vocab_size=MAX_TOKENS + 1)


def test_settings_round_trip() -> None:
    config = pretrain("--checkpoint", "runs/a", "--grad_accum_steps", "4")
    assert PretrainConfig(**to_dict(config)) == config
