"""Hugging Face folders and GGUF files, offline, from tiny networks made here."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchclamp.core.errors import MissingExtraError, SourceError, UnsafeFileError
from patchclamp.core.progress import Silent
from patchclamp.model.identity import model_hash
from patchclamp.model.sources import Task, load
from patchclamp.model.sources import cache as cache_module
from patchclamp.model.sources.gguf import read_header

transformers = pytest.importorskip("transformers", reason="needs the hf extra")
gguf = pytest.importorskip("gguf", reason="needs the hf extra")

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Listening(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, amount: int = 1) -> None:
        self.done += amount


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    module.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", module


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_language_model_opens_as_it_was_saved(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, saved = llama
    loaded = load(folder)
    assert (loaded.name, loaded.origin) == ("llama", "Hugging Face folder")
    assert (loaded.task, loaded.context, loaded.tokenizer) == (Task.LANGUAGE, 64, None)
    assert loaded.call_options == {"use_cache": False}
    assert isinstance(loaded.example_inputs, dict)
    ids = loaded.example_inputs["input_ids"]
    assert ids.shape == (2, 8)
    out = loaded.module(**loaded.example_inputs, **loaded.call_options)
    assert torch.equal(out.logits, saved(ids).logits)
    assert out.past_key_values is None
    assert not loaded.module.training
    assert loaded.module.config._attn_implementation == "sdpa"
    assert model_hash(loaded.module) == model_hash(saved)


def test_stored_precision_is_kept(llama: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    llama[1].to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert next(load(tmp_path / "half").module.parameters()).dtype is torch.bfloat16


def test_a_given_transformers_module_is_described_and_left_alone() -> None:
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    module.set_attn_implementation("eager")
    before = model_hash(module)
    loaded = load(module)
    assert loaded.module is module
    assert module.training
    assert module.config._attn_implementation == "eager"
    assert module.config.use_cache
    assert model_hash(module) == before
    assert (loaded.task, loaded.origin) == (Task.LANGUAGE, "module given")
    assert loaded.call_options == {"use_cache": False}


def test_an_encoder_takes_a_mask_and_no_cache(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    loaded = load(tmp_path / "bert")
    assert (loaded.task, loaded.call_options) == (Task.ENCODE_TEXT, {})
    assert isinstance(loaded.example_inputs, dict)
    assert set(loaded.example_inputs) == {"input_ids", "attention_mask"}
    assert type(loaded.module).__name__ == "BertModel"


def test_an_image_classifier_brings_classes_and_preprocessing(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog"},
    )
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    assert "does not say how images are prepared" in load(folder).notes[0]
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 20},
                "do_center_crop": True,
                "crop_size": 16,
                "image_mean": [0.5] * 3,
                "image_std": [0.25] * 3,
            }
        )
    )
    loaded = load(folder)
    assert (loaded.task, loaded.class_names) == (Task.CLASSIFY_IMAGES, ("cat", "dog"))
    assert loaded.preprocessing is not None
    shown = loaded.preprocessing
    assert (shown.height, shown.crop, shown.mean, shown.std) == (16, 0.8, (0.5,) * 3, (0.25,) * 3)
    assert shown.scale == pytest.approx(1.0)
    assert isinstance(loaded.example_inputs, dict)
    assert loaded.module(**loaded.example_inputs).logits.shape == (2, 2)
    (folder / "preprocessor_config.json").write_text('{"size": "large"}')
    assert "unknown form" in load(folder).notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mine"}, r"does not know the architecture.*got model_type 'mine'"),
        ({"model_type": None}, "got model_type None"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}, "code that it brings along"),
        ({"architectures": ["Nobody"]}, "does not build the architecture"),
        ({"hidden_size": "wide"}, "cannot be opened"),
        ({"hidden_size": 64}, "(cannot be opened|do not fill)"),
        ({"num_hidden_layers": 3}, "do not fill a LlamaForCausalLM: 'model.layers.2"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    llama: tuple[Path, torch.nn.Module], changes: dict[str, object], message: str
) -> None:
    edit_config(llama[0], **changes)
    with pytest.raises(SourceError, match=message):
        load(llama[0])


def test_a_configuration_without_an_architecture_opens_headless_with_a_note(
    llama: tuple[Path, torch.nn.Module],
) -> None:
    edit_config(llama[0], architectures=None)
    loaded = load(llama[0])
    assert type(loaded.module).__name__ == "LlamaModel"
    assert "names no architecture" in loaded.notes[0]
    assert "1 tensors of the file are not used: lm_head.weight" in loaded.notes[1]


@pytest.mark.parametrize("damage", ["short", "none", "lacking", "garbage"])
def test_damaged_weights_are_refused(llama: tuple[Path, torch.nn.Module], damage: str) -> None:
    path = llama[0] / "model.safetensors"
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "none":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"\x00" * 1000)
    else:
        weights = load_file(path)
        weights.pop("model.layers.1.mlp.up_proj.weight")
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"(cut short|no weights|mlp.up_proj.weight' is missing)"):
        load(llama[0])


def test_sharded_weights_must_all_be_there(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, module = llama
    (folder / "model.safetensors").unlink()
    module.save_pretrained(folder, max_shard_size="50KB")  # type: ignore[operator]
    assert model_hash(load(folder).module) == model_hash(module)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=shard.name):
        load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../../other.safetensors"}}))
    with pytest.raises(SourceError, match="outside its folder"):
        load(folder)


def test_pickled_weights_are_refused_unless_allowed(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, module = llama
    (folder / "model.safetensors").unlink()
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match=r"are a pickle.*--allow-pickle"):
        load(folder)
    loaded = load(folder, allow_pickle=True)
    assert model_hash(loaded.module) == model_hash(module)
    assert "pickle" in loaded.notes[0]


def test_a_damaged_tokenizer_is_named(llama: tuple[Path, torch.nn.Module]) -> None:
    (llama[0] / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="the tokenizer in"):
        load(llama[0])


def test_the_library_is_as_talkative_afterwards_as_before(
    llama: tuple[Path, torch.nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        load(llama[0])
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_a_missing_library_gives_the_install_line(
    llama: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchclamp.model.sources.huggingface.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="transformers") as raised:
        load(llama[0])
    assert raised.value.hint == "pip install 'patchclamp[hf]'"


def write_gguf(path: Path, module: torch.nn.Module) -> None:
    """A Llama with a tied output matrix and a byte-level tokenizer, as llama.cpp writes them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(258)
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Hi", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight":
            continue
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    for old, new in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(old, new)
    return name


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, transformers.LlamaForCausalLM(config))
    return path


def logits(loaded: object) -> torch.Tensor:
    with torch.no_grad():
        out = loaded.module(**loaded.example_inputs, use_cache=False)  # type: ignore[attr-defined]
    found: torch.Tensor = out.logits
    return found


def direct(path: Path) -> torch.nn.Module:
    with_library: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    return with_library.eval()


def test_a_gguf_file_is_dequantised_once_and_equal_ever_after(
    quantised: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = Listening(), Listening()
    a = load(quantised, cache_dir=tmp_path / "cache", progress=first)
    assert capfd.readouterr() == ("", "")
    b = load(quantised, cache_dir=tmp_path / "cache", progress=second)
    assert len(first.notes) == 1
    assert first.notes[0].startswith("dequantising tiny.gguf to float32, once; cached at ")
    assert (first.done, second.notes, second.done) == (20, [], 0)
    assert a.notes == b.notes == ("dequantised from GGUF F32 to float32",)
    assert torch.equal(logits(a), logits(b))
    with torch.no_grad():
        assert torch.equal(logits(a), direct(quantised)(**a.example_inputs).logits)
    assert a.module.lm_head.weight is a.module.model.embed_tokens.weight
    assert a.module.dtype is torch.float32
    assert a.task is Task.LANGUAGE
    assert not hasattr(a.module.config, "quantization_config")
    assert a.tokenizer is not None
    assert a.tokenizer.decode(a.tokenizer.encode(["Hi é"])["input_ids"][0]) == "Hi é"


def test_a_folder_with_one_gguf_file_opens(quantised: Path, tmp_path: Path) -> None:
    loaded = load(quantised.parent, cache_dir=tmp_path / "cache")
    assert (loaded.name, loaded.origin) == ("files", "GGUF file")


def test_a_damaged_cache_is_made_again_and_says_so(quantised: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    before = logits(load(quantised, cache_dir=root))
    (weights,) = root.glob("gguf/*/model.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-50] ^= 1
    weights.write_bytes(raw)
    heard = Listening()
    assert torch.equal(logits(load(quantised, cache_dir=root, progress=heard)), before)
    assert "made again: 'model.safetensors' has other content" in heard.notes[0]
    assert "dequantising" in heard.notes[1]
    heard = Listening()
    load(quantised, cache_dir=root, progress=heard)
    assert heard.notes == []


def test_another_file_under_the_same_name_is_not_the_cached_one(
    quantised: Path, tmp_path: Path
) -> None:
    before = logits(load(quantised, cache_dir=tmp_path / "cache"))
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    write_gguf(quantised, transformers.LlamaForCausalLM(config))
    assert not torch.equal(logits(load(quantised, cache_dir=tmp_path / "cache")), before)


def test_a_cache_that_cannot_be_written_costs_time_only(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_sync", full)
    heard = Listening()
    loaded = load(quantised, cache_dir=tmp_path / "cache", progress=heard)
    assert torch.isfinite(logits(loaded)).all()
    assert loaded.notes[-1] == "not cached: No space left on device"
    assert "PATCHCLAMP_CACHE" in heard.notes[-1]
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_cache_below_a_file_costs_time_only(quantised: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    loaded = load(quantised, cache_dir=tmp_path / "file")
    assert loaded.notes[-1].startswith("not cached: ")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path, quantised: Path) -> None:
    path = tmp_path / "bad.gguf"
    whole = quantised.read_bytes()
    for raw, message in [
        (b"hello, I am text", "is not a GGUF file"),
        (b"GGUF", "damaged or was cut short"),
        (whole[:60], "damaged or was cut short"),
        (b"GGUF" + b"\xff" * 200, "damaged or was cut short"),
        (whole[: len(whole) - 5000], "cannot be opened"),
        (whole[: len(whole) // 20], "cannot be opened"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(SourceError, match=message):
            load(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "gguf").exists()


def test_the_header_is_read_without_the_library(quantised: Path) -> None:
    header = read_header(quantised)
    assert (header.architecture, header.quantisation) == ("llama", "F32")


def test_an_architecture_that_the_library_lacks_is_named(quantised: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(quantised.read_bytes().replace(b"llama", b"nobod"))
    with pytest.raises(SourceError, match="architecture 'nobod'"):
        load(path, cache_dir=tmp_path / "cache")
