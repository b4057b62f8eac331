"""Hugging Face's formats: its GPT-2 and LLaMA hold the same numbers as ours, under other names.

GPT-2's matrices are stored transposed, with q, k and v in one; LLaMA's are laid out like ours, and so are its heads
(see rope.py on pairing). A config.json can say more than our models compute: whatever is not exactly ours is refused by
name, since a model that computes something slightly else gives text that is slightly worse, and no error.

Sources: the configuration and modeling files of transformers 4 and 5 for both models, and the format of tokenizer.json
in the tokenizers library.

Left out: other architectures, quantized weights, and tokenizers of other kinds than tokenizer.py has.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from nanogptx import tokenizer
from nanogptx.device import DTYPES
from nanogptx.files import Tensors, new_folder, read_json, read_safetensors, write_json, write_safetensors
from nanogptx.program import nearest
from nanogptx.rope import KINDS, UNSCALED, Scaling, as_scaling, stretched_base
from nanogptx.tinyllama import ARCHITECTURES, build_model
from nanogptx.tokenizer import BPETokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer


class Saved(NamedTuple):
    """A trained model as it lies in a folder: what it is, its numbers, its tokenizer, and the step they are of."""

    architecture: str
    shape: dict
    tensors: Tensors
    tokenizer: Tokenizer
    step: int = 0


# ----------------------------------------------------------------------------------------------------------------------
# Tensors

# What they call our modules; a block's stand behind "transformer.h.3." and "model.layers.3.".
NAMES = {
    "gpt2": {"embed": "wte", "position": "wpe", "norm": "ln_f", "attention_norm": "ln_1", "mlp_norm": "ln_2",
             "attention.q": "attn.c_attn", "attention.k": "attn.c_attn", "attention.v": "attn.c_attn",
             "attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    "tinyllama": {"embed": "embed_tokens", "norm": "norm", "head": "lm_head", "attention_norm": "input_layernorm",
                  "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
                  "mlp.down": "mlp.down_proj", **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"}},
}  # fmt: skip
PREFIX = {"gpt2": "transformer.", "tinyllama": "model."}
BLOCK = {"gpt2": "h", "tinyllama": "layers"}
# Tables that old files carry along: causal masks, and the frequencies of RoPE.
BUFFERS = re.compile(r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")


def hf_name(architecture: str, name: str) -> str:
    """Their name of one of our tensors: blocks.3.mlp.up.weight -> transformer.h.3.mlp.c_fc.weight."""
    block, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    place = "" if module == "head" else PREFIX[architecture] + (f"{BLOCK[architecture]}.{block}." if block else "")
    return f"{place}{NAMES[architecture][module]}.{kind}"


def is_conv1d(architecture: str, name: str) -> bool:
    """Whether they store this matrix as (in, out): GPT-2's, whose linear layers are written as convolutions."""
    return architecture == "gpt2" and re.fullmatch(r"blocks\.\d+\.(attention|mlp)\..*weight", name) is not None


def third_of(architecture: str, name: str) -> str:
    """ "q", "k" or "v" for what GPT-2 keeps as a third of one tensor, else ""."""
    found = re.search(r"\.attention\.([qkv])\.", name) if architecture == "gpt2" else None
    return found[1] if found else ""


def to_hf(architecture: str, tensors: Tensors) -> Tensors:
    """Our tensors under their names and in their layout."""
    out = {}
    for name, tensor in tensors.items():
        if third := third_of(architecture, name):
            tensor = torch.cat([tensors[name.replace(f".{third}.", f".{x}.")] for x in "qkv"])  # (3C, C) or (3C,)
        out[hf_name(architecture, name)] = (tensor.t() if is_conv1d(architecture, name) else tensor).contiguous()
    return out


def check_tensors(tensors: Tensors, wanted: Tensors, source: Path) -> None:
    """ValueError naming the first tensor that is missing, unknown, of another shape than wanted, or no fraction."""
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{source}: tensor {name} is {'missing' if name in wanted else 'not part of the model'}")
    for name, t in tensors.items():
        if t.shape != wanted[name].shape or t.dtype not in DTYPES.values():
            sizes = f"{tuple(t.shape)}, the model has {tuple(wanted[name].shape)}"
            raise ValueError(f"{source}: tensor {name} is {sizes} (and it is of {t.dtype})")


def expected_tensors(architecture: str, shape: dict, count: int, source: Path) -> Tensors:
    """Our model's tensors, as shapes without numbers; ValueError for more layers than `count` tensors can make."""
    if isinstance(layers := shape.get("n_layer"), int) and layers > count:
        raise ValueError(f"{source}: {layers} layers are promised, and there are {count} tensors")
    with torch.device("meta"):
        return build_model(architecture, shape).state_dict()


def from_hf(architecture: str, shape: dict, tensors: Tensors, source: Path) -> Tensors:
    """Their tensors under our names and in our layout; ValueError for one that is missing, unknown or wrong."""
    prefix, head, theirs = PREFIX[architecture], "lm_head.weight", {}
    for name, tensor in tensors.items():  # the oldest files lack the prefix
        full = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if full in theirs:
            raise ValueError(f"{source}: tensor {name} is there with and without {prefix}")
        if not BUFFERS.fullmatch(full):
            theirs[full] = tensor
    expected = expected_tensors(architecture, shape, len(theirs), source)
    wanted = to_hf(architecture, expected)
    if head not in wanted and head in theirs:
        if not torch.equal(theirs.pop(head), theirs.get(hf_name(architecture, "embed.weight"), torch.empty(0))):
            raise ValueError(f"{source}: {head} differs from the embedding, but tie_word_embeddings says they are one")
    check_tensors(theirs, wanted, source)
    out = {}
    for name in expected:
        tensor = theirs[hf_name(architecture, name)]
        tensor = tensor.t() if is_conv1d(architecture, name) else tensor
        if third := third_of(architecture, name):
            tensor = tensor.chunk(3)["qkv".index(third)]
        out[name] = tensor.contiguous()
    return out


def read_shards(folder: Path) -> Tensors:
    """The tensors of model.safetensors, or of all the files that its index names; ValueError for anything odd."""
    if (folder / "model.safetensors").exists():  # before the index, as in transformers
        return read_safetensors(folder / "model.safetensors")
    if not (index := folder / "model.safetensors.index.json").exists():
        raise ValueError(f"{folder} has no model.safetensors: other formats can run code; let transformers save it")
    where, tensors = read_json(index).get("weight_map"), {}
    if not (isinstance(where, dict) and all(isinstance(file, str) for file in where.values())):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file}, which is outside its folder")
        part = read_safetensors(folder / file)
        if part.keys() != {name for name in where if where[name] == file}:
            raise ValueError(f"{folder / file} does not hold the tensors that {index.name} promises")
        tensors |= part
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# config.json

SIZES = {  # what they call our settings
    "gpt2": {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions",
             "vocab_size": "vocab_size", "dropout": "resid_pdrop"},
    "tinyllama": {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
                  "n_embd": "hidden_size", "n_hidden": "intermediate_size", "block_size": "max_position_embeddings",
                  "vocab_size": "vocab_size", "tied": "tie_word_embeddings"},
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"  # theirs, of RoPE
# What they take for an option that is left out, where nanogptx has something else.
DEFAULTS = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "tie_word_embeddings": True},
    "tinyllama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
# Options that do not change what is computed (by a decoder, in evaluation).
HARMLESS = re.compile(
    "model_type|architectures|_name_or_path|transformers_version|(torch_)?dtype|use_cache|(bos|eos|pad)_token_id|n_ctx|"
    "initializer_range|task_specific_params|summary_.*|output_.*|return_dict.*|id2label|label2id|problem_type|"
    "pretraining_tp|chunk_size_feed_forward|is_encoder_decoder|gradient_checkpointing"
)


def options_of(architecture: str, shape: dict) -> dict:
    """All of config.json that decides what is computed; transformers 4's spellings and 5's."""
    config = ARCHITECTURES[architecture][0](**shape)
    sizes = {theirs: getattr(config, ours, None) for ours, theirs in SIZES[architecture].items()}
    if architecture == "gpt2":
        return sizes | {
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "add_cross_attention": False,
            "tie_word_embeddings": True, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        }  # fmt: skip
    return sizes | rope_to_hf(config) | {
        "intermediate_size": config.hidden_dim, "head_dim": config.head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip


def rope_to_hf(config) -> dict:
    """Their options for a LLaMA's positions, as transformers 4 spells them and 5. ntk is only another base there."""
    scaling, base = config.rope_scaling, float(config.rope_base)
    if scaling.kind == "ntk":
        scaling, base = UNSCALED, stretched_base(config.head_dim, base, scaling)
    named = {name.replace("original", ORIGINAL): getattr(scaling, name) for name in KINDS[scaling.kind]}
    # subtle: their dynamic stretch begins at max_position_embeddings, so this is not the longest context there
    longest = named.pop(ORIGINAL) if scaling.kind == "dynamic" else config.block_size
    options = {"rope_type": scaling.kind.replace("none", "default")} | {k: v for k, v in named.items() if v is not None}
    return {"max_position_embeddings": longest, "rope_theta": base, "rope_parameters": options | {"rope_theta": base},
            "rope_scaling": None if scaling == UNSCALED else options}  # fmt: skip


def scaling_from_hf(theirs: dict, longest: int) -> Scaling:
    """The meaning of their rope_scaling or rope_parameters, beside max_position_embeddings = `longest`.

    Raises ValueError for a kind or an option that nanogptx has not, and for one that is missing.
    """
    kind, kinds = theirs.get("rope_type", theirs.get("type", "default")), "default linear dynamic yarn llama3".split()
    if kind not in kinds:
        raise ValueError(nearest("rope_type", str(kind), kinds))
    kind, options = kind.replace("default", "none"), {"factor": None, "low_freq_factor": None, "high_freq_factor": None}
    options |= {name: value for name, value in theirs.items() if value is not None}
    options["original"] = longest if kind == "dynamic" else options.get(ORIGINAL, longest)
    # What belongs to another kind is passed over, as in transformers.
    skip = {"rope_type", "type", "rope_theta", "finetuned", ORIGINAL, *KINDS["yarn"], *KINDS["llama3"]} - {*KINDS[kind]}
    return as_scaling({name: value for name, value in options.items() if name not in skip} | {"kind": kind})


def rope_from_hf(theirs: dict) -> dict:
    """The part of our shape that their options of RoPE decide; what has two spellings is taken out of `theirs`."""
    given = [options for name in ("rope_scaling", "rope_parameters") if (options := theirs.pop(name, None))]
    longest, base = theirs["max_position_embeddings"], theirs.get("rope_theta", 10000.0)
    meanings = {(options.get("rope_theta", base), scaling_from_hf(options, longest)) for options in given or [{}]}
    (base, scaling), *others = meanings
    if others:
        raise ValueError("rope_scaling and rope_parameters mean different things")
    stretched = round(longest * scaling.factor) if scaling.kind == "dynamic" else longest
    return {"rope_base": base, "rope_scaling": asdict(scaling), "block_size": stretched}


def read_config(path: Path) -> tuple[str, dict]:
    """The architecture and shape that a config.json describes; ValueError naming the option that is not ours."""
    theirs = read_json(path)
    kinds = {"gpt2": "gpt2", "llama": "tinyllama"}
    if (architecture := kinds.get(str(theirs.get("model_type")))) is None:
        raise ValueError(f"{path}: model_type is {theirs.get('model_type')!r}, expected {' or '.join(kinds)}")
    theirs = DEFAULTS[architecture] | theirs
    theirs.setdefault("num_key_value_heads", theirs.get("num_attention_heads"))  # LLaMA 1
    if theirs.get("activation_function") == "gelu_pytorch_tanh":
        theirs["activation_function"] = "gelu_new"
    for name in SIZES[architecture].values():
        value, types = theirs.get(name), {"resid_pdrop": (int, float), "tie_word_embeddings": (bool,)}.get(name, (int,))
        if type(value) not in types or value >= 1 << 24:  # with no limit, only to check a size could take hours
            raise ValueError(f"{path}: {name} is {value!r}, which no model of ours has")
    if theirs.get("n_inner") == 4 * theirs.get("n_embd", 0):
        theirs["n_inner"] = None
    shape = {ours: theirs[name] for ours, name in SIZES[architecture].items()}
    try:
        shape |= rope_from_hf(theirs) if architecture == "tinyllama" else {}
        expected = options_of(architecture, shape)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} describes no model of ours ({error})") from error
    for name, value in theirs.items():
        if name in expected and value is not None and value != expected[name]:
            raise ValueError(f"{path}: {name} is {value!r}, and nanogptx computes {expected[name]!r} only")
        if name not in expected and value not in (None, False) and not HARMLESS.fullmatch(name):
            raise ValueError(f"{path}: nanogptx does not know the option {name} ({value!r})")
    return architecture, shape


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def bpe_to_hf(own: BPETokenizer) -> dict:
    """GPT-2's kind: the letters of bytes, cut by its pattern, merged in order."""
    pieces = ["".join(tokenizer.LETTERS[tokenizer.ID_OF_BYTE[b]] for b in piece) for piece in own.pieces if piece]
    if len(vocab := {piece: i for i, piece in enumerate(pieces)}) < len(pieces):
        raise ValueError("two tokens of this tokenizer have the same text, which tokenizer.json cannot express")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [[pieces[first], pieces[second]] for first, second in own.merges]
    model = {"type": "BPE", "unk_token": None, "byte_fallback": False, "vocab": vocab, "merges": merges}
    return {"normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def split_at(pattern: dict) -> dict:
    """The rule that cuts a text so that every match stands alone."""
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def char_to_hf(own: CharTokenizer) -> dict:
    """Every character is a word; another than those of the alphabet is an error there, too."""
    model = {"type": "WordLevel", "vocab": own.ids, "unk_token": "<|unk|>"}
    every = split_at({"Regex": r"[\s\S]"})
    return {"normalizer": None, "pre_tokenizer": every, "decoder": {"type": "Fuse"}, "model": model}


def sentencepiece_to_hf(own: SentencePieceTokenizer) -> dict:
    """BPE where the scores are ranks, else unigram. In our models a space is a space, in LLaMA's ▁ stands for it.

    The ids are the same but for ties in unigram models (a run of one letter, cut here or there): SentencePiece adds up
    probabilities in 32 bits, the tokenizers library in 64.
    """
    processor, ours, mark = own.processor, own.split is tokenizer.PIECE_WORDS, tokenizer.MARK
    if processor.normalize(" ﬁ½  \n") != ("▁ﬁ½▁▁\n" if ours else "▁▁ﬁ½▁▁\n"):
        raise ValueError("this SentencePiece model rewrites text before it cuts it, which nanogptx does not export")
    ids = range(own.vocab_size)
    plain = [i for i in ids if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))]
    pieces = dict(zip(ids, processor.id_to_piece(list(ids))))
    pieces |= {i: pieces[i].replace(mark, " ") for i in plain if ours}
    vocab = {piece: i for i, piece in pieces.items()}
    scores = dict.fromkeys(ids, -1e4) | {i: processor.get_score(i) for i in plain}  # nobody writes "<s>" by chance
    if [scores[i] for i in plain] == [-rank for rank in range(len(plain))]:
        known = {pieces[i] for i in plain}
        cuts = [(pieces[i][:at], pieces[i][at:]) for i in plain for at in range(1, len(pieces[i]))]
        model = {"type": "BPE", "unk_token": pieces[0], "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                 "merges": [pair for pair in cuts if known.issuperset(pair)]}  # fmt: skip
    elif any(scores[i] >= 0 for i in plain):  # a logarithm of a probability is not
        raise ValueError("this SentencePiece model has symbols of its user's, which nanogptx does not export")
    else:
        model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": [(pieces[i], scores[i]) for i in ids]}
    words = [split_at({"Regex": tokenizer.PIECE_WORDS.pattern})] if ours else []
    # subtle: where a letter of "<s>" has no piece, a text that spells it out would be cheaper as the special token
    letters = sorted(set("".join(pieces[i] for i in set(ids).difference(plain))) - vocab.keys())
    words += [split_at({"Regex": "|".join(map(re.escape, letters))})] if letters else []
    to_marks = [{"type": "Prepend", "prepend": mark}, {"type": "Replace", "pattern": {"String": " "}, "content": mark}]
    to_text = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if not ours:
        to_text = [{"type": "Replace", "pattern": {"String": mark}, "content": " "}, *to_text]
        to_text.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None if ours else {"type": "Sequence", "normalizers": to_marks},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words} if words else None,
        "decoder": {"type": "Sequence", "decoders": to_text},
        "model": model,
    }


def special_names(own: Tokenizer) -> dict[int, str]:
    """The special tokens by id: bos, eos and, in SentencePiece, unk; one for both in GPT-2."""
    if isinstance(own, SentencePieceTokenizer):
        return {i: own.processor.id_to_piece(i) for i in (own.processor.unk_id(), own.bos_id, own.eos_id)}
    return dict(zip((own.bos_id, own.eos_id), getattr(own, "specials", tokenizer.SPECIALS)))


def tokenizer_to_hf(own: Tokenizer) -> dict:
    """The contents of tokenizer.json. A bos of its own is put in front of a text, as our models expect it."""
    kinds = {BPETokenizer: bpe_to_hf, CharTokenizer: char_to_hf, SentencePieceTokenizer: sentencepiece_to_hf}
    names, template = special_names(own), None
    if own.bos_id != own.eos_id:
        bos, a, b = names[own.bos_id], {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
        front = {"SpecialToken": {"id": bos, "type_id": 0}}
        special = {bos: {"id": bos, "ids": [own.bos_id], "tokens": [bos]}}
        template = {"type": "TemplateProcessing", "single": [front, a], "pair": [front, a, b]}
        template["special_tokens"] = special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": name, **flags} for i, name in sorted(names.items())]
    return {"version": "1.0", "added_tokens": added, "post_processor": template, **kinds[type(own)](own)}


def tokenizer_from_hf(path: Path) -> Tokenizer:
    """Our tokenizer that a tokenizer.json describes, if it is byte-level BPE or a list of characters.

    It is accepted if writing it gives the same file again, but for what does not change the ids.
    """
    theirs = read_json(path)
    try:
        model, added = theirs["model"], {token["content"]: token["id"] for token in theirs["added_tokens"]}
        model["vocab"] = vocab = {token: i for token, i in model["vocab"].items() if token not in added}
        if model["type"] == "BPE":
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            own = BPETokenizer([[vocab.get(part, -1) for part in pair] for pair in pairs], sorted(added, key=added.get))
        else:
            own = CharTokenizer("".join(vocab))
        ours = tokenizer_to_hf(own)
        facts = [(f["model"]["type"], f["model"]["vocab"], f["normalizer"], {"use_regex": True, **f["pre_tokenizer"]})
                 for f in (ours, theirs)]  # fmt: skip
        same = facts[0] == facts[1] and added == {token: i for i, token in special_names(own).items()}
        same &= not any(map(model.get, "dropout ignore_merges continuing_subword_prefix end_of_word_suffix".split()))
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is of no kind that nanogptx has ({error})") from None
    if not same:
        raise ValueError(f"{path} is neither byte-level BPE as GPT-2 has it nor one of nanogptx's own")
    return own


# ----------------------------------------------------------------------------------------------------------------------
# Whole directories


def read(folder: Path, own: Tokenizer | None = None) -> Saved:
    """A model and its tokenizer (unless that is given) from a directory; ValueError if we have no such model."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json, as Hugging Face's models have it")
    architecture, shape = read_config(folder / "config.json")
    if own is None:
        plain = (folder / "tokenizer.model").exists() or (folder / "merges.txt").exists()
        if not plain and not (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder} has no tokenizer: checkpoint.py import takes one with --tokenizer")
        own = load_tokenizer(folder) if plain else tokenizer_from_hf(folder / "tokenizer.json")
    if own.vocab_size > shape["vocab_size"]:
        raise ValueError(f"{folder}: the tokenizer has {own.vocab_size} ids, and the model {shape['vocab_size']}")
    return Saved(architecture, shape, from_hf(architecture, shape, read_shards(folder), folder), own)


def write(saved: Saved, out: Path, dtype: torch.dtype | None = None, keep_padding: bool = False) -> None:
    """Write a directory that transformers loads; ValueError if it has no class for the model.

    `dtype`: another number format than the tensors have. Ids beyond the tokenizer's are cut off, unless `keep_padding`.
    """
    architecture, shape, own = saved.architecture, dict(saved.shape), saved.tokenizer
    position = {"gpt2": "learned", "tinyllama": "rope"}[architecture]
    if shape.get("position", position) != position:
        raise ValueError(f"transformers has {architecture} with position = {position} only, not {shape['position']}")
    if own.vocab_size > (n_rows := len(saved.tensors["embed.weight"])):
        raise ValueError(f"the tokenizer has {own.vocab_size} ids, and the model {n_rows}")
    if not keep_padding:
        shape["vocab_size"] = own.vocab_size
    rows = {"embed.weight": shape["vocab_size"], "head.weight": shape["vocab_size"]}
    tensors = {name: t[: rows.get(name, len(t))].to(dtype or t.dtype) for name, t in saved.tensors.items()}
    model_type, kind = {"gpt2": ("gpt2", "GPT2LMHeadModel"), "tinyllama": ("llama", "LlamaForCausalLM")}[architecture]
    names, number = special_names(own), str(tensors["embed.weight"].dtype).removeprefix("torch.")
    ids = {"bos_token_id": own.bos_id, "eos_token_id": own.eos_id}
    config = {"model_type": model_type, "architectures": [kind], "dtype": number, "torch_dtype": number}
    # Text that spells a special token out is text, as in our tokenizers.
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[own.bos_id],
             "eos_token": names[own.eos_id], "model_max_length": ARCHITECTURES[architecture][0](**shape).block_size,
             "clean_up_tokenization_spaces": False, "split_special_tokens": True}  # fmt: skip
    with new_folder(out) as new:
        write_safetensors(new / "model.safetensors", to_hf(architecture, tensors))
        write_json(new / "config.json", config | options_of(architecture, shape) | ids)
        write_json(new / "generation_config.json", ids | {"pad_token_id": own.eos_id})
        write_json(new / "tokenizer.json", tokenizer_to_hf(own))
        write_json(new / "tokenizer_config.json", words)
        if isinstance(own, SentencePieceTokenizer):
            own.save(new / own.file_name)  # llama.cpp reads this one
