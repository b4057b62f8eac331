"""Hugging Face directories: transformers is the oracle in both directions, and a file that is not quite right is refused.

Every comparison of logits here is one that the corruptions below must break: a transpose that is left out of a square
matrix, heads in another order or pairs of channels in Meta's order raise no error, only worse text.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import sentencepiece
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: what needs a connection is an error
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaForCausalLM,
)
from transformers import GPT2Config as TheirGPT2Config  # noqa: E402
from transformers import LlamaConfig as TheirLlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from nanogptx import checkpoint, huggingface, program, sample, tokenizer  # noqa: E402
from nanogptx.gpt2 import CONFIGS as GPT2_CONFIGS  # noqa: E402
from nanogptx.huggingface import Saved  # noqa: E402
from nanogptx.rope import UNSCALED, as_scaling, attention_factor, inverse_frequencies  # noqa: E402
from nanogptx.tinyllama import ARCHITECTURES, build_model  # noqa: E402
from nanogptx.tinyllama import CONFIGS as LLAMA_CONFIGS  # noqa: E402
from nanogptx.tokenizer import (  # noqa: E402
    KINDS,
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and texts

STORY = """ROMEO: But soft, what light through yonder window breaks? It is the east, and Juliet is the sun!
    Arise, fair sun, and kill the envious moon; who's already sick and pale with grief -- 'tis 3 of 5 (or <4>).
"""
SPELLED = ["<s>", "</s>", "<unk>", "<0x0A>", "<|bos|>", "<|eos|>", "<|endoftext|>", "<s><s>", "a<s>b", "<|unk|>", " ⁇ "]
RUNS = [letter * n for letter in "ae. \n" for n in (7, 31, 256, 400)]
HARD = [
    "",
    " ",
    "  ",
    " a",
    "a ",
    "  a   b  ",
    "\t",
    "a\tb",
    "\n",
    "\n\n",
    " \n a\r\n",
    "e\u0301 é \u0301",
    "👩‍👩‍👧 😀",
]
HARD += [
    "\u2581",
    "a\u2581b \u2581",
    "\u2585",
    "\x1c",
    "\x85",
    "\0",
    "\u00a0x",
    "\ufeffa",
    "½ﬁ…",
    "日本語",
    "don't we'll",
]
HARD += ["1234 5", "!?!", "\U0010ffff", "Ġ Ġa", STORY, *SPELLED]
_rng = random.Random(0)
HARD += ["".join(_rng.choices([*HARD, "the", " and", " sun", " ", "e"], k=8)) for _ in range(40)]

SIZES = {"bpe": 300, "char": 0, "sp-bpe": 330, "sp-unigram": 320, "sp-char": 330}
LEARNED = STORY * 3 + "the sun and the moon and the east " * 9
TOKENIZERS = {k: train_tokenizer(k, LEARNED + "".join(HARD) * (k == "char"), n) for k, n in SIZES.items()}
BPE = TOKENIZERS["bpe"]
TOKENIZERS["gpt2"] = BPETokenizer(BPE.merges, ["<|endoftext|>"])  # one special token for both ends of a document


def train_sp(text: str = LEARNED, **options) -> SentencePieceTokenizer:
    """A SentencePiece model as others make them."""
    path = {"sentence_iterator": iter(text.split("\n")), "vocab_size": 320, "byte_fallback": True, "minloglevel": 2}
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**path | options, model_writer=model)
    return SentencePieceTokenizer(model.getvalue())


def write_gpt2_files(own: BPETokenizer, folder: Path) -> None:
    """vocab.json and merges.txt as OpenAI published them."""
    words = ["".join(tokenizer.LETTERS[tokenizer.ID_OF_BYTE[byte]] for byte in piece) for piece in own.pieces[:-1]]
    vocab = {word: i for i, word in enumerate([*words, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{words[first]} {words[second]}" for first, second in own.merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Models

# No two sizes are equal where that could hide a mistake; head counts are no powers of two.
GPT2_SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 40}
LLAMA_SHAPE = {"n_layer": 2, "n_head": 6, "n_kv_head": 2, "n_embd": 48, "n_hidden": 56, "block_size": 40}
MODELS = {
    "gpt2": ("gpt2", GPT2_SHAPE),
    "gpt2-five-heads": ("gpt2", GPT2_SHAPE | {"n_head": 5, "n_embd": 30, "dropout": 0.1}),
    "llama": ("tinyllama", LLAMA_SHAPE),
    "llama-tied": ("tinyllama", LLAMA_SHAPE | {"tied": True}),
    "llama-one-kv-head": ("tinyllama", LLAMA_SHAPE | {"n_kv_head": 1, "rope_base": 500.0}),
    "llama-all-kv-heads": ("tinyllama", LLAMA_SHAPE | {"n_kv_head": 6, "tied": True}),
    "llama-rule-for-the-mlp": ("tinyllama", LLAMA_SHAPE | {"n_hidden": None, "multiple_of": 24}),
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight far from its first value, gains and biases too: what is lost or swapped shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name or ".ln_" in name))
    return model.eval()


def make(name: str, own=BPE, padding: int = 0, dtype=torch.float32) -> Saved:
    architecture, shape = MODELS[name]
    shape = shape | {"vocab_size": own.vocab_size + padding}
    tensors = randomize(build_model(architecture, shape)).state_dict()
    return Saved(architecture, shape, {name: t.to(dtype) for name, t in tensors.items()}, own)


def model_of(saved: Saved) -> torch.nn.Module:
    model = build_model(saved.architecture, saved.shape)
    checkpoint.load_weights(model, saved.tensors, Path("-"))
    return model.eval()


def check_logits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """The comparison on which everything here stands."""
    config = ours.config
    n_vocab = min(config.vocab_size, theirs.config.vocab_size)
    ids = torch.randint(n_vocab, (2, config.block_size), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = ours(ids)[0], theirs(ids).logits
    assert a.std() > 0.3, "such logits would show nothing"
    torch.testing.assert_close(a[..., :n_vocab], b[..., :n_vocab], atol=1e-5, rtol=1e-4)


def load_theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items())


def edit_json(path: Path, **changes) -> None:
    """Change a JSON object in place; None removes nothing, `...` does."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_theirs(architecture: str, folder: Path, own=BPE, dtype=torch.float32, save=None, **options):
    """A directory that transformers wrote, the tokenizer beside it ours; returns the model."""
    options = {"vocab_size": own.vocab_size, "bos_token_id": own.bos_id, "eos_token_id": own.eos_id} | options
    if architecture == "gpt2":
        sizes = {"n_positions": 40, "n_embd": 30, "n_layer": 3, "n_head": 5}
        model = GPT2LMHeadModel(TheirGPT2Config(**sizes | options))
    else:
        sizes = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
                 "num_key_value_heads": 2, "max_position_embeddings": 40, "rms_norm_eps": 1e-5}  # fmt: skip
        model = LlamaForCausalLM(TheirLlamaConfig(**sizes | options))
    randomize(model).to(dtype).save_pretrained(folder, **save or {})
    if isinstance(own, SentencePieceTokenizer):
        own.save(folder / "tokenizer.model")
    elif len(own.specials) == 1:
        write_gpt2_files(own, folder)
    else:
        huggingface.write_json(folder / "tokenizer.json", huggingface.tokenizer_to_hf(own))
    return model.float()


# ----------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("name", MODELS)
def test_exported_model_computes_the_same(tmp_path, name):
    saved = make(name)
    huggingface.write(saved, tmp_path / "hf")
    theirs = load_theirs(tmp_path / "hf")
    check_logits(model_of(saved), theirs)
    assert theirs.num_parameters() == sum(t.numel() for t in saved.tensors.values())


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in the order of Meta's files, which pair channel 2i with 2i + 1 (rope.py)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def change(name: str, function):
    """A corruption of one tensor, or of two that are swapped, in the second block."""

    def corrupt(folder: Path) -> None:
        def edit(tensors):
            where = {key: key for key in tensors if ".1." in key and name in key}
            assert len(where) == 1, where
            for key in where:
                tensors[key] = function(tensors[key])

        edit_tensors(folder, edit)

    return corrupt


def swap(one: str, other: str):
    def corrupt(folder: Path) -> None:
        def edit(tensors):
            for key in [key for key in tensors if one in key]:
                partner = key.replace(one, other)
                tensors[key], tensors[partner] = tensors[partner], tensors[key]

        edit_tensors(folder, edit)

    return corrupt


def thirds(*order: int):
    return lambda t: torch.cat([t.chunk(3, -1)[i] for i in order], -1)


def config(**options):
    return lambda folder: edit_json(folder / "config.json", **options)


CORRUPTIONS = {
    "gpt2": {
        "square matrix not transposed": change("attn.c_proj.weight", torch.t),
        "q and k swapped": change("attn.c_attn.weight", thirds(1, 0, 2)),
        "k and v swapped": change("attn.c_attn.weight", thirds(0, 2, 1)),
        "biases of q and v swapped": change("attn.c_attn.bias", thirds(2, 1, 0)),
        "q, k and v of a head side by side": change(
            "attn.c_attn.weight", lambda t: t.unflatten(1, (3, 3, 8)).transpose(1, 2).flatten(1)
        ),
        "heads in another order": change("attn.c_proj.weight", lambda t: t.roll(8, 0)),
        "norms swapped": swap("ln_1", "ln_2"),
        "positions shifted": lambda folder: edit_tensors(
            folder, lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].roll(1, 0)})
        ),
        "another number of heads": config(n_head=6),
        "the exact GELU": config(activation_function="gelu"),
    },
    "llama": {
        "q in Meta's order": change("q_proj", lambda t: interleaved(t, 6)),
        "k in Meta's order": change("k_proj", lambda t: interleaved(t, 2)),
        "kv heads swapped": change("k_proj", lambda t: t.roll(8, 0)),
        "square matrix transposed": change("o_proj", torch.t),
        "gate and up swapped": swap("gate_proj", "up_proj"),
        "norms swapped": swap("input_layernorm", "post_attention_layernorm"),
        "k and v swapped": swap("k_proj", "v_proj"),
        "head and embedding swapped": swap("lm_head", "model.embed_tokens"),
        "another number of heads": config(num_attention_heads=3, num_key_value_heads=1, head_dim=16),
        "another base": config(rope_theta=500.0, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    },
}
CORRUPTIONS["llama"]["q and k in Meta's order"] = lambda folder: [
    CORRUPTIONS["llama"][f"{x} in Meta's order"](folder) for x in "qk"
]


@pytest.mark.parametrize(("name", "harm"), [(name, harm) for name in CORRUPTIONS for harm in CORRUPTIONS[name]])
def test_comparison_sees_a_wrong_conversion(tmp_path, name, harm):
    """transformers loads each of these without a word; only the comparison of logits notices."""
    saved = make(name)
    huggingface.write(saved, tmp_path / "hf")
    CORRUPTIONS[name][harm](tmp_path / "hf")
    with pytest.raises(AssertionError, match="not close"):
        check_logits(model_of(saved), load_theirs(tmp_path / "hf"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-all-kv-heads"])
def test_our_way_back_undoes_no_corruption(tmp_path, name):
    """The comparison again, on what `read` makes of a corrupted directory: it is no mirror image of `write`."""
    saved = make(name)
    huggingface.write(saved, tmp_path / "hf")
    theirs = load_theirs(tmp_path / "hf")
    CORRUPTIONS[name[:5].rstrip("-")]["square matrix not transposed" if name == "gpt2" else "norms swapped"](
        tmp_path / "hf"
    )
    with pytest.raises(AssertionError, match="not close"):
        check_logits(model_of(huggingface.read(tmp_path / "hf")), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_export_and_import_give_the_same_bits(tmp_path, name, dtype):
    saved = make(name, dtype=dtype)
    huggingface.write(saved, tmp_path / "hf")
    back = huggingface.read(tmp_path / "hf")
    assert back.architecture == saved.architecture and same(back.tensors, saved.tensors)
    ours, theirs = (ARCHITECTURES[s.architecture][0](**s.shape) for s in (saved, back))
    assert [getattr(ours, f) for f in (*saved.shape, "hidden_dim") if f not in ("n_hidden", "multiple_of")] == [
        getattr(theirs, f) for f in (*saved.shape, "hidden_dim") if f not in ("n_hidden", "multiple_of")
    ]
    assert back.tokenizer.fingerprint == saved.tokenizer.fingerprint


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_padding_of_the_vocabulary_is_cut_off(tmp_path, name):
    saved = make(name, padding=13)
    huggingface.write(saved, tmp_path / "cut")
    huggingface.write(saved, tmp_path / "kept", keep_padding=True)
    cut, kept = huggingface.read(tmp_path / "cut"), huggingface.read(tmp_path / "kept")
    assert same(kept.tensors, saved.tensors) and kept.shape["vocab_size"] == BPE.vocab_size + 13
    rows = {"embed.weight", "head.weight"} & saved.tensors.keys()
    assert same(cut.tensors, saved.tensors | {name: saved.tensors[name][: BPE.vocab_size] for name in rows})
    for folder, n in (("cut", BPE.vocab_size), ("kept", BPE.vocab_size + 13)):
        theirs = load_theirs(tmp_path / folder)
        assert theirs.config.vocab_size == theirs.get_output_embeddings().weight.size(0) == n
        check_logits(model_of(saved), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_another_number_format(tmp_path, name, dtype):
    saved = make(name)
    huggingface.write(saved, tmp_path / "hf", dtype)
    back = huggingface.read(tmp_path / "hf")
    assert same(back.tensors, {name: t.to(dtype) for name, t in saved.tensors.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype  # the one that config.json names
    check_logits(model_of(back), load_theirs(tmp_path / "hf"))


def test_config_has_the_spellings_of_transformers_4_and_5(tmp_path):
    huggingface.write(make("llama-one-kv-head"), tmp_path / "hf", torch.bfloat16)
    theirs = json.loads((tmp_path / "hf/config.json").read_text())
    assert theirs["dtype"] == theirs["torch_dtype"] == "bfloat16"
    assert theirs["rope_theta"] == 500.0 and theirs["rope_scaling"] is None
    assert theirs["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    loaded = AutoConfig.from_pretrained(tmp_path / "hf")
    assert loaded.rope_parameters["rope_theta"] == 500.0 and loaded.rms_norm_eps == 1e-5
    assert (loaded.bos_token_id, loaded.eos_token_id) == (BPE.bos_id, BPE.eos_id)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("gpt2", "rope"),
        ("gpt2", "none"),
        ("gpt2", "alibi"),
        ("llama", "learned"),
        ("llama", "none"),
        ("llama", "alibi"),
    ],
)
def test_what_transformers_has_no_class_for(tmp_path, name, position):
    saved = make(name)
    saved = saved._replace(shape=saved.shape | {"position": position})
    expected = f"transformers has {saved.architecture} with position = (learned|rope) only, not {position}"
    with pytest.raises(ValueError, match=expected):
        huggingface.write(saved, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "bpe"), ("llama", "sp-bpe"), ("gpt2", "gpt2"), ("llama", "char")])
def test_greedy_text_is_the_same(tmp_path, name, kind):
    saved = make(name, TOKENIZERS[kind], padding=3)
    huggingface.write(saved, tmp_path / "hf")
    theirs, words = load_theirs(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt, own = "the sun", saved.tokenizer
    ids = words(prompt).input_ids
    if kind == "gpt2":  # its bos is not put in front by itself
        ids = [own.bos_id, *ids]
    greedy = sample.Settings(max_tokens=20, temperature=0)
    writer = sample.Writer(own, ids, greedy)
    for _ in sample.generate(model_of(saved), [writer]):
        pass
    idx = torch.tensor([ids])
    (all_ids,) = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False).tolist()
    assert all_ids[len(ids) :] == writer.ids and len(writer.ids) == 20
    (text,) = sample.generate_text(model_of(saved), own, prompt, 1, greedy)
    their_text = words.decode(all_ids, skip_special_tokens=True)
    if kind.startswith("sp-"):  # where bytes make no character, transformers writes \ufffd for their neighbours, too
        text, their_text = text.partition("\ufffd")[0], their_text.partition("\ufffd")[0]
    assert their_text == text and len(text) > len(prompt)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def export_tokenizer(own, folder: Path):
    """What AutoTokenizer makes of an exported directory."""
    architecture, shape = MODELS["llama"]
    shape = shape | {"n_layer": 1, "vocab_size": own.vocab_size}
    tensors = build_model(architecture, shape).state_dict()
    huggingface.write(Saved(architecture, shape, tensors, own), folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_exported_tokenizer_gives_the_same_ids(tmp_path, kind):
    own = TOKENIZERS[kind]
    theirs = export_tokenizer(own, tmp_path / "hf")
    front = [] if kind == "gpt2" else [own.bos_id]
    for text in HARD + RUNS * (kind != "sp-unigram"):
        ids = own.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == front + ids
        assert theirs.decode(ids) == own.decode(ids) == text
        assert theirs.decode(front + ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (own.bos_id, own.eos_id, own.vocab_size)
    assert {theirs.bos_token_id, theirs.eos_token_id} <= set(theirs.all_special_ids)
    assert theirs.decode([own.bos_id, own.eos_id], skip_special_tokens=True) == ""


def test_unigram_cuts_a_run_equally_well(tmp_path):
    """aa|a and a|aa are equally likely. SentencePiece adds in 32 bits and transformers in 64: the rounding decides."""
    own = TOKENIZERS["sp-unigram"]
    theirs = export_tokenizer(own, tmp_path / "hf")
    for text in RUNS:
        ids, other = own.encode(text), theirs(text, add_special_tokens=False).input_ids
        assert sorted(ids) == sorted(other) and theirs.decode(other) == text


# Letters of which some, but not all, that make "<s>" or "<0x0A>" have pieces of their own.
@pytest.mark.parametrize("letters", ["a<> ", "<sab ", "<unk>a ", "/s>a ", "<0xA>1 b", "ab "])
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_special_token_is_text(tmp_path, kind, letters):
    rng = random.Random(3)
    text = " ".join("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(400))
    text += "".join(SPELLED) * (kind == "char")
    own = train_tokenizer(kind, text, 263 + len(letters))
    theirs = export_tokenizer(own, tmp_path / "hf")
    for spelled in SPELLED:
        ids = theirs(spelled, add_special_tokens=False).input_ids
        assert ids == own.encode(spelled) and not set(ids) & set(theirs.all_special_ids)


def test_character_outside_the_alphabet_is_an_error_there_too(tmp_path):
    own = CharTokenizer.train("abc")
    theirs = export_tokenizer(own, tmp_path / "hf")
    assert theirs("cab", add_special_tokens=False).input_ids == [2, 0, 1]
    for encode in (own.encode, theirs):
        with pytest.raises(Exception, match="alphabet|Missing"):
            encode("abd")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [{}, {"pad_id": 3}, {"bos_id": 0, "eos_id": 1, "unk_id": 2}, {"split_digits": True}, {"bos_piece": "[B]"}],
    ids=str,
)
def test_sentencepiece_models_of_others(tmp_path, kind, options):
    """LLaMA's habits: a space in front of the text, and ▁ for every space."""
    own = train_sp(model_type=kind, **options)
    theirs = export_tokenizer(own, tmp_path / "hf")
    for text in set(HARD) - {"\u2581"}:  # the mark alone is always bytes in nanogptx
        ids = own.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
        ({"remove_extra_whitespaces": True}, "rewrites text"),
        ({"treat_whitespace_as_suffix": True}, "rewrites text"),
        ({"user_defined_symbols": ["<foo>", "th"]}, "symbols of its user"),
    ],
)
def test_sentencepiece_models_that_cannot_be_exported(tmp_path, kind, options, expected):
    with pytest.raises(ValueError, match=expected):
        export_tokenizer(train_sp(model_type=kind, **options), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_two_tokens_of_the_same_text_cannot_be_exported(tmp_path):
    """ab|c and a|bc are two tokens here, one in tokenizer.json, where a token is what it says."""
    own = BPETokenizer([(64, 65), (65, 66), (256, 66), (64, 257)])
    assert own.pieces[258] == own.pieces[259] == b"abc"
    with pytest.raises(ValueError, match="two tokens of this tokenizer have the same text"):
        export_tokenizer(own, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["bpe", "char", "gpt2"])
def test_tokenizer_json_comes_back(tmp_path, kind):
    export_tokenizer(TOKENIZERS[kind], tmp_path / "hf")
    assert huggingface.tokenizer_from_hf(tmp_path / "hf/tokenizer.json").fingerprint == TOKENIZERS[kind].fingerprint


def test_tokenizer_json_of_transformers_own_gpt2_class(tmp_path):
    own = TOKENIZERS["gpt2"]
    write_gpt2_files(own, tmp_path)
    GPT2Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new/merges.txt").exists(), "transformers 5 writes tokenizer.json alone"
    assert huggingface.tokenizer_from_hf(tmp_path / "new/tokenizer.json").fingerprint == own.fingerprint


def put(*keys, value):
    """A change deep in a JSON object."""

    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


TOKENIZER_CHANGES = {
    "Unigram": put("model", "type", value="Unigram"),
    "WordPiece": put("model", "type", value=["WordPiece"]),
    "no model": lambda tree: tree.pop("model"),
    "model is a list": put("model", value=[]),
    "no vocabulary": put("model", "vocab", value=None),
    "numbers swapped": lambda tree: tree["model"]["vocab"].update({"a": 65, "b": 64}),
    "infinite number": lambda tree: tree["model"]["vocab"].update(a=float("inf")),
    "one more": lambda tree: tree["model"]["vocab"].update(zyx=300),
    "merges in another order": lambda tree: tree["model"]["merges"].reverse(),
    "a merge left out": lambda tree: tree["model"]["merges"].pop(3),
    "a merge of three": lambda tree: tree["model"]["merges"].append(["a", "b", "c"]),
    "a merge of lists": lambda tree: tree["model"]["merges"].append([["a"], "b"]),
    "a space in front": put("pre_tokenizer", "add_prefix_space", value=True),
    "another pattern": put("pre_tokenizer", "use_regex", value=False),
    "no words": put("pre_tokenizer", value=None),
    "rewritten text": put("normalizer", value={"type": "NFKC"}),
    "whole words first": put("model", "ignore_merges", value=True),
    "merges left out by chance": put("model", "dropout", value=0.1),
    "ends of words": put("model", "end_of_word_suffix", value="</w>"),
    "insides of words": put("model", "continuing_subword_prefix", value="##"),
    "a third special token": lambda tree: tree["added_tokens"].append({"id": 300, "content": "<|third|>"}),
    "special token elsewhere": put("added_tokens", 0, "id", value=5),
    "special token without a number": put("added_tokens", 0, "id", value=None),
    "no special token": put("added_tokens", value=[]),
}


@pytest.mark.parametrize("harm", TOKENIZER_CHANGES)
def test_other_tokenizer_json_are_refused(tmp_path, harm):
    tree = huggingface.tokenizer_to_hf(BPE)
    TOKENIZER_CHANGES[harm](tree)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"tokenizer\.json is (of no kind|neither)"):
        huggingface.tokenizer_from_hf(tmp_path / "tokenizer.json")


# ----------------------------------------------------------------------------------------------------------------------
# Import


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("architecture", "own", "options"),
    [
        ("gpt2", "gpt2", {}),
        ("gpt2", "bpe", {"n_inner": 120, "activation_function": "gelu_pytorch_tanh"}),
        ("llama", "sp-bpe", {}),
        ("llama", "bpe", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", "sp-unigram", {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ],
)  # fmt: skip
def test_what_transformers_wrote_comes_and_goes_bit_by_bit(tmp_path, architecture, own, options, dtype):
    make_theirs(architecture, tmp_path / "a", TOKENIZERS[own], dtype, **options)
    saved = huggingface.read(tmp_path / "a")
    assert saved.tokenizer.fingerprint == TOKENIZERS[own].fingerprint
    check_logits(model_of(saved), load_theirs(tmp_path / "a"))
    huggingface.write(saved, tmp_path / "b")
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert same(one, other) and {t.dtype for t in one.values()} == {dtype}


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.").removeprefix("model.")] = tensors.pop(name)


def with_buffers(tensors):
    """What transformers 2 to 4 and OpenAI's conversion left in the files."""
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    if prefix or "wte.weight" in tensors:
        tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        tensors[f"{prefix}h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
    else:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("changes", [[without_prefix], [with_buffers], [without_prefix, with_buffers]])
def test_old_files(tmp_path, architecture, changes):
    theirs = make_theirs(architecture, tmp_path, TOKENIZERS["gpt2"])
    for edit in changes:
        edit_tensors(tmp_path, edit)
    check_logits(checkpoint.load_run(tmp_path)[0], theirs)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_many_files(tmp_path, architecture):
    theirs = make_theirs(architecture, tmp_path, TOKENIZERS["gpt2"], save={"max_shard_size": "20KB"})
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    check_logits(checkpoint.load_run(tmp_path)[0], theirs)


def test_one_file_goes_before_many_as_in_transformers(tmp_path):
    make_theirs("gpt2", tmp_path, TOKENIZERS["gpt2"], save={"max_shard_size": "20KB"})
    tensors = huggingface.read_shards(tmp_path)
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].roll(1, 0).clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_logits(checkpoint.load_run(tmp_path)[0], load_theirs(tmp_path))


PUBLISHED = {
    "gpt2-small": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_ours(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    architecture, shape = huggingface.read_config(tmp_path / "config.json")
    ours = (GPT2_CONFIGS | LLAMA_CONFIGS)[name]
    theirs = type(ours)(**shape)
    assert architecture == ("gpt2" if name == "gpt2-small" else "tinyllama")
    names = [
        "n_layer",
        "n_head",
        "n_kv_head",
        "n_embd",
        "hidden_dim",
        "block_size",
        "vocab_size",
        "position",
        "rope_base",
    ]
    assert [getattr(theirs, n) for n in names] == [getattr(ours, n) for n in names]
    assert theirs.dropout == (0.1 if name == "gpt2-small" else 0.0)  # what it was trained with
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(architecture, shape).parameters())
    assert count == {"gpt2-small": 124_439_808, "tinyllama-1.1b": 1_100_048_384}[name]


# ----------------------------------------------------------------------------------------------------------------------
# What is not ours is refused by name

CONFIGS = {"gpt2": huggingface.options_of("gpt2", GPT2_SHAPE) | {"model_type": "gpt2"}}
CONFIGS["llama"] = huggingface.options_of("tinyllama", LLAMA_SHAPE) | {"model_type": "llama"}


def refused(tmp_path, name, expected, **options):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    huggingface.read_config(path)  # fine before
    edit_json(path, **options)
    with pytest.raises(ValueError) as caught:
        huggingface.read_config(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("gpt2", "activation_function", "gelu"),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "layer_norm_epsilon", 1e-6),
        ("gpt2", "n_inner", 97),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "tie_word_embeddings", False),
        ("gpt2", "attn_pdrop", 0.2),
        ("gpt2", "embd_pdrop", 0.2),
        ("gpt2", "embd_pdrop", ...),  # left out, it is 0.1
        ("llama", "hidden_act", "gelu"),
        ("llama", "rms_norm_eps", 1e-6),
        ("llama", "rms_norm_eps", ...),  # left out, it is 1e-6
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "head_dim", 16),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),  # and rope_parameters says default
        ("llama", "rope_theta", 500.0),  # and rope_parameters says 10000
        ("llama", "attention_dropout", 0.1),
        *[(name, "quantization_config", {"quant_method": "gptq"}) for name in CONFIGS],
        *[(name, "sliding_window", 128) for name in CONFIGS],
        *[(name, "an_option_of_tomorrow", "x") for name in CONFIGS],
        *[(name, "model_type", value) for name in CONFIGS for value in ("mistral", None, ["gpt2"], {}, ...)],
        *[("gpt2", option, ...) for option in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")],
        ("llama", "num_attention_heads", ...),
        ("llama", "intermediate_size", ...),
    ],
)  # fmt: skip
def test_an_option_that_is_not_ours_is_named(tmp_path, name, option, value):
    refused(tmp_path, name, option, **{option: value})


@pytest.mark.parametrize("value", ["2", [2], None, {}, -2, 0, True, 2.0, float("nan"), 10**9, 10**30])
@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, sizes in (("gpt2", "gpt2"), ("llama", "tinyllama")) for option in huggingface.SIZES[sizes].values()],
)  # fmt: skip
def test_a_size_that_is_none(tmp_path, name, option, value):
    """Quickly, too: sizes this large must be refused before anything of that size is made, or counted."""
    if (option, value) in [("resid_pdrop", 0), ("tie_word_embeddings", True)]:
        pytest.skip("fine")
    refused(tmp_path, name, "", **{option: value})


def test_odd_numbers_beside_the_sizes(tmp_path):
    refused(tmp_path, "gpt2", "n_embd", n_embd=None, n_inner=5)
    refused(tmp_path, "gpt2", "n_embd", n_embd="x", n_inner="xxxx")
    refused(tmp_path, "gpt2", "n_head", n_head=7)
    refused(tmp_path, "llama", "no model of ours", rope_parameters=[1])
    refused(tmp_path, "llama", "rope_base", rope_theta=-1.0, rope_parameters=None)
    for value in (10**400, "10000", None, [1.0], True):
        refused(tmp_path, "llama", "", rope_theta=value, rope_parameters=None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"rope_theta": 500.0, "rope_parameters": ...}),
        ("llama", {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama", {"rope_theta": 500.0, "rope_parameters": None}),
    ],
)  # fmt: skip
def test_every_spelling_of_the_base(tmp_path, name, options):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    edit_json(tmp_path / "config.json", **options)
    assert huggingface.read_config(tmp_path / "config.json")[1]["rope_base"] == 500.0


def test_what_llama_1_leaves_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    left_out = ["num_key_value_heads", "tie_word_embeddings", "rope_theta", "rope_parameters", "head_dim", "mlp_bias"]
    edit_json(tmp_path / "config.json", **dict.fromkeys(left_out, ...))
    shape = huggingface.read_config(tmp_path / "config.json")[1]
    assert (shape["n_kv_head"], shape["tied"], shape["rope_base"]) == (6, False, 10000.0)


# ----------------------------------------------------------------------------------------------------------------------
# RoPE for longer contexts

# Our scalings of a model that was trained with 10 tokens, and what transformers calls them (but for the base).
SCALINGS = {
    "linear": ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "ntk": ({"kind": "ntk", "factor": 4.0}, {"rope_type": "default"}),
    "dynamic": ({"kind": "dynamic", "factor": 4.0, "original": 10}, {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": (
        {"kind": "yarn", "factor": 4.0, "original": 10, "beta_fast": 1.5, "beta_slow": 0.25},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "beta_fast": 1.5, "beta_slow": 0.25, "truncate": True},
    ),
    "yarn, all options": (
        {"kind": "yarn", "factor": 4.0, "original": 10, "beta_fast": 1.5, "beta_slow": 0.25, "truncate": False,
         "mscale": 0.7, "mscale_all_dim": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "beta_fast": 1.5, "beta_slow": 0.25,
         "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3},
    ),
    "yarn, attention factor": (
        {"kind": "yarn", "factor": 2.5, "original": 16, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
         "truncate": True, "attention_factor": 1.5},
    ),
    "llama3": (
        {"kind": "llama3", "factor": 4.0, "original": 10, "low_freq_factor": 0.25, "high_freq_factor": 2.0},
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 10, "low_freq_factor": 0.25,
         "high_freq_factor": 2.0},
    ),
}  # fmt: skip
every_scaling = pytest.mark.parametrize("name", SCALINGS)


def make_scaled(name: str, base: float = 30.0) -> Saved:
    """A small base, so that 40 tokens turn every pair by an angle that shows."""
    architecture, shape = MODELS["llama"]
    shape = shape | {"vocab_size": BPE.vocab_size, "rope_base": base, "rope_scaling": SCALINGS[name][0]}
    return Saved(architecture, shape, randomize(build_model(architecture, shape)).state_dict(), BPE)


def changes_logits(saved: Saved) -> bool:
    """Whether a scaling makes a difference that a comparison of logits would see."""
    ids = torch.randint(BPE.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    plain = saved._replace(shape={k: v for k, v in saved.shape.items() if k != "rope_scaling"})
    with torch.no_grad():
        return (model_of(saved)(ids)[0] - model_of(plain)(ids)[0]).abs().max().item() > 0.05


@every_scaling
def test_scaled_positions_go_and_come_back(tmp_path, name):
    saved = make_scaled(name)
    huggingface.write(saved, tmp_path / "hf")
    assert changes_logits(saved)
    check_logits(model_of(saved), load_theirs(tmp_path / "hf"))
    theirs = json.loads((tmp_path / "hf/config.json").read_text())
    base = 30.0 if name != "ntk" else 30.0 * 4 ** (8 / 6)
    ours, options = SCALINGS[name]
    assert theirs["rope_parameters"] == {**options, "rope_theta": base} and theirs["rope_theta"] == base
    assert theirs["rope_scaling"] == (options if name != "ntk" else None)
    assert theirs["max_position_embeddings"] == (10 if name == "dynamic" else 40)
    back = huggingface.read(tmp_path / "hf")
    assert same(back.tensors, saved.tensors)
    one, other = model_of(back), model_of(saved)
    if name == "ntk":  # which is nothing but another base
        assert one.config.rope_scaling == UNSCALED and one.config.rope_base == base
    else:
        assert one.config == other.config
    ids = torch.randint(BPE.vocab_size, (1, 40))
    assert torch.equal(one(ids)[0], other(ids)[0])


@every_scaling
def test_scaled_positions_that_transformers_wrote(tmp_path, name):
    options = SCALINGS[name][1]
    if name == "ntk":
        options = {**options, "rope_theta": 190.0}
    length = 10 if name == "dynamic" else 40
    make_theirs("llama", tmp_path, rope_parameters={"rope_theta": 30.0, **options}, max_position_embeddings=length)
    saved = huggingface.read(tmp_path)
    assert saved.shape["block_size"] == 40
    check_logits(model_of(saved), load_theirs(tmp_path))
    assert as_scaling(saved.shape["rope_scaling"]) == (as_scaling(SCALINGS[name][0]) if name != "ntk" else UNSCALED)


@every_scaling
@pytest.mark.parametrize("spelling", ["type", "rope_type", "both"])
def test_scaled_positions_as_transformers_4_spells_them(tmp_path, name, spelling):
    """rope_scaling, with "type" for "rope_type" in the oldest, and rope_theta beside it."""
    path = tmp_path / "config.json"
    options = dict(SCALINGS[name][1])
    kind = options.pop("rope_type")
    options |= {s: kind for s in ("type", "rope_type") if spelling in (s, "both")}
    path.write_text(json.dumps(CONFIGS["llama"]))
    length = 10 if name == "dynamic" else 40
    edit_json(path, rope_parameters=..., rope_theta=30.0, rope_scaling=options, max_position_embeddings=length)
    shape = huggingface.read_config(path)[1]
    ours = UNSCALED if name == "ntk" else as_scaling(SCALINGS[name][0])
    assert as_scaling(shape["rope_scaling"]) == ours and shape["rope_base"] == 30.0 and shape["block_size"] == 40


PUBLISHED_SCALINGS = {
    # Llama 3.1, transformers 4's spelling; Yarn-Llama-2-7b-64k; Qwen2.5's recipe; vicuna-16k; DeepSeek's options
    "llama-3.1": ({"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
                  {"kind": "llama3", "factor": 8.0, "original": 8192}),
    "yarn-llama-2": ({"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
                     {"kind": "yarn", "factor": 16.0, "original": 4096}),
    "nothing said of the original": ({"factor": 4, "type": "yarn", "beta_fast": None}, {"kind": "yarn", "factor": 4, "original": 40}),
    "vicuna": ({"factor": 4.0, "type": "linear"}, {"kind": "linear", "factor": 4.0}),
    "deepseek": ({"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
                 {"kind": "yarn", "factor": 40, "original": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "an option of another kind": ({"factor": 4.0, "rope_type": "linear", "original_max_position_embeddings": 4096, "beta_fast": 8}, {"kind": "linear", "factor": 4.0}),
    "dynamic's original": ({"factor": 2.0, "rope_type": "dynamic", "original_max_position_embeddings": 20}, {"kind": "dynamic", "factor": 2.0, "original": 40}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_SCALINGS)
def test_published_scalings(tmp_path, name):
    """And transformers computes the same frequencies from them."""
    options, ours = PUBLISHED_SCALINGS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["llama"]))
    edit_json(path, rope_parameters=..., rope_scaling=options)
    scaling = as_scaling(huggingface.read_config(path)[1]["rope_scaling"])
    assert scaling == as_scaling(ours)
    theirs = LlamaRotaryEmbedding(TheirLlamaConfig(**json.loads(path.read_text())))
    theirs(torch.zeros(1), torch.arange(100)[None])
    torch.testing.assert_close(inverse_frequencies(8, 10000.0, scaling, 100), theirs.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}, "unknown rope_type 'longrope'"),
        ({"type": "su", "factor": 2.0}, "unknown rope_type 'su'"),
        ({"type": "dynamic-yarn", "factor": 2.0}, "unknown rope_type 'dynamic-yarn'"),
        ({"rope_type": "ntk", "factor": 2.0}, "unknown rope_type 'ntk'"),
        ({"rope_type": "none"}, "unknown rope_type 'none'"),
        ({"rope_type": "proportional"}, "unknown rope_type 'proportional'"),
        ({"rope_type": ["yarn"]}, "unknown rope_type '['yarn']'"),
        ({"rope_type": "linear"}, "factor = None cannot"),
        ({"rope_type": "linear", "factor": 0.5}, "factor = 0.5 cannot"),
        ({"rope_type": "yarn", "factor": "4"}, "factor = '4' cannot"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10.5}, "original = 10.5 cannot"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor = None cannot"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor = None cannot"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "default", "rope_theta": 0.5}, "rope_base = 0.5"),
        ({"rope_type": "default", "rope_theta": "x"}, "no model of ours"),
        ([1], "no model of ours"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_scaling_that_is_not_ours_is_named(tmp_path, name, options, expected):
    other = {"rope_parameters": "rope_scaling", "rope_scaling": "rope_parameters"}[name]
    refused(tmp_path, "llama", expected, **{name: options, other: ..., "rope_theta": ...})


def test_two_spellings_that_differ(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
    differ = {"rope_parameters": yarn | {"rope_theta": 10000.0}, "rope_scaling": yarn | {"factor": 2.0}}
    refused(tmp_path, "llama", "rope_scaling and rope_parameters mean different things", **differ)
    refused(tmp_path, "llama", "mean different things", rope_scaling=yarn | {"rope_theta": 500.0}, rope_parameters=yarn)
    refused(tmp_path, "llama", "original_max_position_embeddings", original_max_position_embeddings=10)


# ----------------------------------------------------------------------------------------------------------------------
# Hostile and damaged files

WTE, C_ATTN = "transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


class Trap:
    """Whoever unpickles this runs our command."""

    def __reduce__(self):
        return os.system, ("touch MARKER",)


def edited(function):
    return lambda folder: edit_tensors(folder, function)


def of_file(name: str, function):
    """Replace a file's bytes by what `function` makes of them."""
    return lambda folder: (folder / name).write_bytes(function((folder / name).read_bytes()))


def header(function):
    """Replace the header of model.safetensors; what `function` returns may be text or JSON."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        new = function(json.loads(content[8 : 8 + length]))
        new = (new if isinstance(new, str) else json.dumps(new)).encode()
        return len(new).to_bytes(8, "little") + new + content[8 + length :]

    return of_file("model.safetensors", edit)


def twice(tree) -> str:
    text = json.dumps(tree)
    entry = json.dumps({WTE: tree[WTE]})[1:-1]  # the same tensor, at the same place
    assert entry in text
    return text.replace(entry, f"{entry}, {entry}")


def with_index(change):
    """Two files and their index, then a change of the index."""

    def harm(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {}
        for file, part in (("one.safetensors", names[:5]), ("two.safetensors", names[5:])):
            safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        shutil.copy(folder / "one.safetensors", folder.parent / "outside.safetensors")
        index = {"weight_map": weight_map}
        change(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return harm


def elsewhere(file):
    def change(index):
        first = {name for name in index["weight_map"] if index["weight_map"][name] == "one.safetensors"}
        index["weight_map"] |= dict.fromkeys(first, file)

    return with_index(change)


def drop(name: str):
    return edited(lambda tensors: tensors.pop(name))


def replace(name: str, function):
    return edited(lambda tensors: tensors.update({name: function(tensors[name])}))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({WTE: Trap()}, folder / "pytorch_model.bin")


def pickled(name: str):
    return lambda folder: torch.save({"w": Trap()}, folder / name)


def plain_pickle(name: str):
    return of_file(name, lambda content: pickle.dumps(Trap()))


GPT2_HARMS = {
    "truncated": (of_file("model.safetensors", lambda b: b[:-1]), "model.safetensors cannot be read"),
    "cut in the header": (of_file("model.safetensors", lambda b: b[:100]), "model.safetensors cannot be read"),
    "cut in the length": (of_file("model.safetensors", lambda b: b[:5]), "model.safetensors cannot be read"),
    "empty": (of_file("model.safetensors", lambda b: b""), "model.safetensors cannot be read"),
    "more at the end": (of_file("model.safetensors", lambda b: b + b"x"), "model.safetensors cannot be read"),
    "2**40 header": (
        of_file("model.safetensors", lambda b: (1 << 40).to_bytes(8, "little") + b[8:]),
        "header too large",
    ),
    "2**63 header": (
        of_file("model.safetensors", lambda b: (1 << 63).to_bytes(8, "little") + b[8:]),
        "header too large",
    ),
    "header of brackets": (header(lambda tree: "[" * 50_000), "model.safetensors cannot be read"),
    "header is a list": (header(lambda tree: [tree]), "model.safetensors cannot be read"),
    "tensor twice": (header(twice), "a key comes twice"),
    "endless empty tensor": (
        header(lambda t: t | {"x": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}),
        "model.safetensors cannot be read",
    ),
    "number as a dtype": (header(lambda t: t | {WTE: t[WTE] | {"dtype": 3}}), "model.safetensors cannot be read"),
    "tensors overlap": (
        header(lambda t: t | {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        "model.safetensors cannot be read",
    ),
    "no config": (lambda folder: (folder / "config.json").write_text("{}"), "not a run directory|not of a nanogptx run"),
    "config is a list": (of_file("config.json", lambda b: b"[" + b + b"]"), "config.json does not hold a JSON object"),
    "config of brackets": (of_file("config.json", lambda b: b"[" * 50_000), "config.json is damaged"),
    "config cut": (of_file("config.json", lambda b: b[:-3]), "config.json is damaged"),
    "config says a thing twice": (of_file("config.json", lambda b: b'{"n_head": 1,' + b[1:]), "config.json .* twice"),
    "config is no text": (of_file("config.json", lambda b: b"\xff\xfe" + b), "config.json is damaged"),
    "a billion layers": (config(n_layer=10**9), "n_layer is 1000000000"),
    "a thousand layers": (config(n_layer=1000), "1000 layers are promised, and there are 28 tensors"),
    "a layer more": (config(n_layer=3), "transformer.h.2.ln_1.weight is missing|h.2.*missing"),
    "a layer less": (config(n_layer=1), "transformer.h.1.* is not part of the model"),
    "a huge width": (config(n_embd=3 * 10**9), "n_embd is 3000000000"),
    "a width that is prime": (config(n_embd=3 * 10**6 + 1), "n_embd = 3000001 is not divisible by n_head = 3"),
    "a width of another model": (config(n_embd=3 * 10**6), "the model has .*000000"),
    "a vocabulary that is smaller than the tokenizer's": (config(vocab_size=299), "the tokenizer has 300 ids"),
    "tensor missing": (drop("transformer.h.0.mlp.c_fc.bias"), "transformer.h.0.mlp.c_fc.bias is missing"),
    "embedding missing": (drop(WTE), f"{WTE} is missing"),
    "tensor extra": (edited(lambda t: t.update({"transformer.h.0.attn.rotary": t[WTE]})), "h.0.attn.rotary is not part"),
    "tensor without a name": (edited(lambda t: t.update({"": t[WTE]})), "is not part of the model"),
    "head with a bias": (edited(lambda t: t.update({"lm_head.bias": torch.ones(300)})), "lm_head.bias is not part"),
    "already transposed": (replace(C_ATTN, lambda t: t.t()), r"c_attn.weight is \(72, 24\), the model has \(24, 72\)"),
    "too wide": (replace(C_ATTN, lambda t: torch.cat([t, t[:, :1]], 1)), r"c_attn.weight is \(24, 73\)"),
    "too narrow": (replace(C_ATTN, lambda t: t[:, :-1]), r"c_attn.weight is \(24, 71\)"),
    "three dimensions": (replace(C_ATTN, lambda t: t[None]), r"c_attn.weight is \(1, 24, 72\)"),
    "no dimensions": (replace(C_ATTN, lambda t: t[0, 0]), r"c_attn.weight is \(\)"),
    "bias is a number": (replace("transformer.h.0.attn.c_attn.bias", lambda t: t[0]), r"c_attn.bias is \(\)"),
    "int8": (replace(C_ATTN, lambda t: t.to(torch.int8)), r"c_attn.weight is .* torch.int8"),
    "float64": (replace(C_ATTN, torch.Tensor.double), r"c_attn.weight is .* torch.float64"),
    "another head": (edited(lambda t: t.update({"lm_head.weight": t[WTE] + 1})), "lm_head.weight differs from"),
    "head in another format": (edited(lambda t: t.update({"lm_head.weight": t[WTE].half()})), "lm_head.weight differs"),
    "head alone": (edited(lambda t: t.update({"lm_head.weight": t.pop(WTE)})), "lm_head.weight differs from"),
    "with and without prefix": (edited(lambda t: t.update({"wte.weight": t[WTE]})), "is there with and without transf"),
    "only a pickle": (only_a_pickle, "has no model.safetensors"),
    **{f"torch file named {name}": (pickled(name), name) for name in ("model.safetensors", "config.json", "tokenizer.json")},
    **{f"pickle named {name}": (plain_pickle(name), name) for name in ("model.safetensors", "config.json", "tokenizer.json")},
    "index goes up": (elsewhere("../outside.safetensors"), "names ../outside.safetensors, which is outside its folder"),
    "index names a path": (elsewhere(str(ROOT / "outside.safetensors")), "which is outside its folder"),
    "index names a folder": (elsewhere(".."), "cannot be read as safetensors"),
    "index names nothing": (elsewhere(""), "cannot be read as safetensors"),
    "index names a NUL": (elsewhere("a\0b"), "cannot be read as safetensors"),
    "index names an absent file": (elsewhere("three.safetensors"), "three.safetensors cannot be read"),
    "index names the config": (elsewhere("config.json"), "config.json cannot be read as safetensors"),
    "index lies": (elsewhere("two.safetensors"), "two.safetensors does not hold the tensors that"),
    "index leaves one out": (with_index(lambda i: i["weight_map"].pop(WTE)), "does not hold the tensors that"),
    "index promises more": (with_index(lambda i: i["weight_map"].update(x="one.safetensors")), "does not hold the tensors"),
    "index without a map": (with_index(dict.clear), "has no weight_map"),
    "index of numbers": (with_index(lambda i: i["weight_map"].update(x=3)), "has no weight_map"),
    "index is a list": (with_index(lambda i: i.update(weight_map=[1])), "has no weight_map"),
    "vocabulary of brackets": (
        lambda folder: (write_gpt2_files(TOKENIZERS["gpt2"], folder), (folder / "vocab.json").write_text("[" * 50_000)),
        "is not a tokenizer",
    ),
    "tokenizer of brackets": (of_file("tokenizer.json", lambda b: b"[" * 50_000), "tokenizer.json is damaged"),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), "takes one with --tokenizer"),
    "model missing": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
}  # fmt: skip
LLAMA_HARMS = {
    "head missing": (drop("lm_head.weight"), "lm_head.weight is missing"),
    "no head promised": (config(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    "tied in words": (config(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    "transposed": (replace(GATE, torch.t), r"gate_proj.weight is \(48, 56\), the model has \(56, 48\)"),
    "more kv heads": (config(num_key_value_heads=3), r"k_proj.weight is \(16, 48\), the model has \(24, 48\)"),
    "fewer kv heads": (config(num_key_value_heads=1), r"k_proj.weight is \(16, 48\), the model has \(8, 48\)"),
    "kv heads that do not divide": (config(num_key_value_heads=4), "n_head = 6 is not divisible by n_kv_head = 4"),
    "a bias": (edited(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})), "q_proj.bias is not"),
    "a huge head": (config(hidden_size=10**10, num_attention_heads=1, num_key_value_heads=1), "hidden_size is 10000000000"),
    "with and without prefix": (
        edited(lambda t: t.update({"norm.weight": t["model.norm.weight"]})), "with and without model",
    ),
}  # fmt: skip
HARMS = {f"gpt2: {name}": harm for name, harm in GPT2_HARMS.items()}
HARMS |= {f"llama: {name}": harm for name, harm in LLAMA_HARMS.items()}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """One directory of each architecture, to be copied."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("gpt2", "llama"):
        huggingface.write(make(name), folder / name)
    return folder


def fails(capsys, main, args) -> str:
    """Run a program as from the command line: exit status 2, and one line that says why."""
    with pytest.raises(SystemExit) as caught:
        program.run(lambda: main([str(arg) for arg in args]))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", HARMS)
def test_hostile_directory_is_refused_in_one_line(tmp_path, monkeypatch, capsys, exported, name):
    monkeypatch.chdir(tmp_path)  # a trap that goes off would leave its marker here
    folder, (harm, expected) = tmp_path / "hf", HARMS[name]
    shutil.copytree(exported / name.split(":")[0], folder)
    huggingface.read(folder)  # fine before
    harm(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = fails(capsys, checkpoint.main, ["import", folder, tmp_path / "run"])
    assert str(folder) in line
    with pytest.raises((ValueError, OSError), match=expected):
        checkpoint.read(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "more than 300 MB for nothing"
    assert not (tmp_path / "run").exists() and not (tmp_path / "MARKER").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", "outside.safetensors"}


def test_the_trap_is_a_trap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "MARKER").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\0" * 100, bytes(range(256)) * 4, b"{}", b"null"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_random_bytes(tmp_path, exported, file, content):
    shutil.copytree(exported / "llama", tmp_path / "hf")
    (tmp_path / "hf" / file).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        huggingface.read(tmp_path / "hf")


# ----------------------------------------------------------------------------------------------------------------------
# The program


@pytest.mark.parametrize(("architecture", "own"), [("gpt2", "gpt2"), ("llama", "sp-bpe")])
def test_import_inspect_sample_export(tmp_path, capsys, architecture, own):
    """A directory of transformers becomes a run, which samples the same as the directory itself, and goes back."""
    own = TOKENIZERS[own]
    theirs = make_theirs(architecture, tmp_path / "hf", own)
    checkpoint.main(["import", str(tmp_path / "hf"), str(tmp_path / "runs/new")])
    count = sum(p.numel() for p in theirs.parameters())
    said = capsys.readouterr().out
    kind = {"gpt2": "gpt2", "llama": "tinyllama"}[architecture]
    facts = f"{kind}, {count:,} parameters, {4 * count:,} bytes in float32; {type(own).__name__} with {own.vocab_size} ids; step 0"
    assert said == f"{tmp_path / 'runs/new'}: {facts}\n"
    check_logits(checkpoint.load_run(tmp_path / "runs/new")[0], theirs)

    for folder in ("hf", "runs/new"):
        checkpoint.main(["inspect", str(tmp_path / folder)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{tmp_path / folder}: {facts}"
        shape = dict(line.split() for line in lines if line and line[0].isalpha() and len(line.split()) == 2)
        assert shape["vocab_size"] == str(own.vocab_size) and shape["block_size"] == "40"
        tensors = [line.split() for line in lines if " x " in line]
        assert sum(int(line[0]) * int(line[-2].replace(",", "")) for line in tensors) == 4 * count
        up = {"gpt2": ["3", "x", "blocks.*.mlp.up.weight", "(120,", "30)", "float32", "14,400", "bytes"],
              "llama": ["2", "x", "blocks.*.mlp.up.weight", "(56,", "48)", "float32", "10,752", "bytes"]}  # fmt: skip
        assert up[architecture] in tensors

    texts = []
    for folder in ("hf", "runs/new"):
        sample.main([str(tmp_path / folder), "--prompt", "the", "--max-tokens", "9", "--n", "1", "--device", "cpu"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""

    checkpoint.main(["export", str(tmp_path / "runs/new"), str(tmp_path / "back"), "--dtype", "bfloat16"])
    assert f"{2 * count:,} bytes in bfloat16" in capsys.readouterr().out, "it tells what was written"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert same({name: t.bfloat16() for name, t in one.items()}, other)


def test_padding_is_an_option(tmp_path):
    checkpoint.write_run(make("gpt2", padding=7), tmp_path / "run")
    checkpoint.main(["export", str(tmp_path / "run"), str(tmp_path / "cut")])
    checkpoint.main(["export", str(tmp_path / "run"), str(tmp_path / "kept"), "--keep-padding"])
    sizes = [json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] for name in ("cut", "kept")]
    assert sizes == [BPE.vocab_size, BPE.vocab_size + 7]


@pytest.mark.parametrize("place", ["elsewhere", "elsewhere/merges.txt"])
def test_tokenizer_from_another_place(tmp_path, capsys, place):
    make_theirs("gpt2", tmp_path / "hf", TOKENIZERS["gpt2"])
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    for name in ("merges.txt", "vocab.json"):
        (tmp_path / "hf" / name).rename(tmp_path / "elsewhere" / name)
    assert "takes one with --tokenizer" in fails(capsys, checkpoint.main, ["import", tmp_path / "hf", tmp_path / "run"])
    checkpoint.main(["import", str(tmp_path / "hf"), str(tmp_path / "run"), "--tokenizer", str(tmp_path / place)])
    assert load_tokenizer(tmp_path / "run").fingerprint == TOKENIZERS["gpt2"].fingerprint
    TOKENIZERS["sp-bpe"].save(tmp_path / "large.model")
    arguments = ["import", tmp_path / "hf", tmp_path / "other", "--tokenizer", tmp_path / "large.model"]
    capsys.readouterr()
    assert "the tokenizer has 330 ids, and the model 299" in fails(capsys, checkpoint.main, arguments)
    assert not (tmp_path / "other").exists()


def with_tensors(change):
    """Another checkpoint in the place of the run's; its manifest is right."""

    def harm(run: Path) -> None:
        tensors = huggingface.read_safetensors(run / "step-0/model.safetensors")
        change(tensors)
        shutil.rmtree(run / "step-0")
        checkpoint.save(run, 0, {"model": tensors}, {"step": 0})

    return harm


RUN_HARMS = {
    "no shape": (config(model=...), "is not of a nanogptx run"),
    "shape is a list": (config(model=[1]), "is not of a nanogptx run"),
    "more layers than tensors": (config(model=GPT2_SHAPE | {"n_layer": 10**9}), "1000000000 layers are promised"),
    "unknown setting": (config(model=GPT2_SHAPE | {"tomorrow": 1}), "no such setting"),
    "another shape": (config(model=GPT2_SHAPE | {"vocab_size": 301}), r"embed.weight is \(300, 24\), the model has"),
    "architecture is a list": (config(architecture=["gpt2"]), "is not of a nanogptx run"),
    "tensor missing": (with_tensors(lambda t: t.pop("norm.bias")), "norm.bias is missing"),
    "tensor extra": (with_tensors(lambda t: t.update(x=t["norm.bias"].clone())), "x is not part of the model"),
    "int8": (with_tensors(lambda t: t.update({"norm.bias": t["norm.bias"].to(torch.int8)})), "torch.int8"),
    "a larger tokenizer": (lambda run: (train_tokenizer("bpe", LEARNED, 302)).save(run / "tokenizer.json"), "302 ids"),
}


@pytest.mark.parametrize("name", RUN_HARMS)
def test_run_that_does_not_fit_together_is_not_exported(tmp_path, capsys, name):
    checkpoint.write_run(make("gpt2"), tmp_path / "run")
    harm, expected = RUN_HARMS[name]
    harm(tmp_path / "run")
    fails(capsys, checkpoint.main, ["export", tmp_path / "run", tmp_path / "hf"])
    with pytest.raises(ValueError, match=expected):
        huggingface.write(checkpoint.read(tmp_path / "run"), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("target", ["folder", "file"])
def test_an_existing_target_is_refused(tmp_path, capsys, exported, command, target):
    checkpoint.write_run(make("gpt2"), tmp_path / "run")
    if target == "folder":
        (tmp_path / "target").mkdir()
    mine = tmp_path / "target/mine" if target == "folder" else tmp_path / "target"
    mine.write_text("precious")
    source = {"import": exported / "gpt2", "export": tmp_path / "run"}[command]
    line = fails(capsys, checkpoint.main, [command, source, tmp_path / "target"])
    assert str(tmp_path / "target") in line and "holds something already" in line
    assert mine.read_text() == "precious" and {path.name for path in tmp_path.iterdir()} == {"run", "target"}


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_leaves_nothing(tmp_path, capsys, exported, command):
    checkpoint.write_run(make("gpt2"), tmp_path / "run")
    source = {"import": exported / "gpt2", "export": tmp_path / "run"}[command]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the weights are more
        with pytest.raises((OSError, safetensors.SafetensorError)):
            checkpoint.main([command, str(source), str(tmp_path / "target")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def killed_at(moment: int, main) -> int:
    """Run `main` in a forked child that is killed before its `moment`-th write, flush or rename; its exit status."""
    if (pid := os.fork()) == 0:
        calls = 0

        def before(call):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), 9)
                return call(*args, **kwargs)

            return wrapped

        os.fsync, os.rename, os.replace = before(os.fsync), before(os.rename), before(os.replace)
        huggingface.write_safetensors = before(huggingface.write_safetensors)
        checkpoint.write_safetensors = before(checkpoint.write_safetensors)
        try:
            main()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
@pytest.mark.parametrize("command", ["import", "export"])
def test_killed_at_every_moment_the_target_is_absent_or_whole(tmp_path, command):
    saved = make("llama", TOKENIZERS["sp-bpe"])
    write, read = {
        "import": (checkpoint.write_run, checkpoint.read_run),
        "export": (huggingface.write, huggingface.read),
    }[command]
    for moment in range(1, 60):
        target = tmp_path / str(moment)
        status = killed_at(moment, lambda target=target: write(saved, target))
        if status == 0:
            break
        assert status == -9
        if target.exists():  # the last moments: it is in place, and only the folder above is not flushed
            assert same(read(target).tensors, saved.tensors)
        else:
            write(saved, target)  # what the crash left behind is not in the way
    assert moment > 10 and same(read(target).tensors, saved.tensors)
    assert not any(name.name.startswith(".") and name.name.split(".")[1] == str(moment) for name in tmp_path.iterdir())


def test_from_the_command_line(tmp_path, exported):
    """Once as a real process: an unpickled trap, a traceback or a second line would show here."""
    (tmp_path / "hf").mkdir()
    for file in (exported / "gpt2").iterdir():
        shutil.copy(file, tmp_path / "hf")
    only_a_pickle(tmp_path / "hf")
    script = [sys.executable, str(ROOT / "nanogptx/checkpoint.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for args, status in ((["inspect", exported / "gpt2"], 0), (["import", "hf", "run"], 2)):
        done = subprocess.run([*script, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status
        assert (done.stderr == "") if status == 0 else (done.stdout == "" and done.stderr.count("\n") == 1)
    assert done.stderr.startswith("error: hf has no model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
