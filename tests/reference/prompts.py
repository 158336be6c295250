"""Oracle of prompts: token ids of the Hugging Face chat() and of Megatron, from whole strings.

In: a question and the number of tiles of each image. Out: token ids with the real `<|vision_pad|>`
at each image position. Source: chat() of modeling_nvlm_d.py and the template chatml of
conversation.py in nvidia/NVLM-D-72B; run_text_generation.py in Megatron-LM's examples/multimodal
and its MultimodalTokenizer, at branch NVLM-1.0. As in the originals, special tokens in the question
are parsed; the product deliberately differs there.
A question may hold `<image>` once per image, in order; without one the images come first. A
conversation holds it in the user's turns.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"
PAD = "<|vision_pad|>"
DEFAULT_SYSTEM = "Answer the questions."


def load_tokenizer(tokenizer_json: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json))


def tile_tags(num_tiles: int) -> list[str]:
    """Regular tiles first, the thumbnail last; a single tile is called the thumbnail."""
    return [f"<tile_{k}>" for k in range(1, num_tiles)] + ["<tile_global_thumbnail>"]


def hugging_face_string(
    question: str, num_tiles: list[int], tokens_per_tile: int, system: str = DEFAULT_SYSTEM
) -> str:
    """The string chat() tokenises: no newline after <|im_end|>."""
    content = _with_markers(question, len(num_tiles))
    for n in num_tiles:
        tiles = "".join(tag + PAD * tokens_per_tile for tag in tile_tags(n))
        content = content.replace(IMAGE, f"<Image>{tiles}</Image>", 1)
    return (
        f"<|im_start|>system\n{system}<|im_end|>"
        f"<|im_start|>user\n{content}<|im_end|>"
        f"<|im_start|>assistant\n"
    )


def hugging_face(
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    num_tiles: list[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
) -> list[int]:
    """One tokenizer call on the complete string, so `<Image><tile_1>` merges '><'."""
    return _ids(tokenizer, hugging_face_string(question, num_tiles, tokens_per_tile, system))


def megatron(
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    num_tiles: list[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
) -> list[int]:
    """Newline after each <|im_end|>; `<image>` is an added token, so the text is cut there.

    Each tag is tokenised alone, as its embeddings are put before its tile's. Megatron
    itself asserts a single image with tile tags; several follow the same rule here.
    """
    content = _with_markers(question, len(num_tiles)).replace(IMAGE, f"<Image>{IMAGE}</Image>")
    text = (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{content}<|im_end|>\n"
        f"<|im_start|>assistant\n"
    )
    pads = [tokenizer.convert_tokens_to_ids(PAD)] * tokens_per_tile
    before, *after = text.split(IMAGE)
    out = _ids(tokenizer, before)
    for n, piece in zip(num_tiles, after, strict=True):
        for tag in tile_tags(n):
            out += _ids(tokenizer, tag) + pads
        out += _ids(tokenizer, piece)
    return out


def hugging_face_conversation(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
    num_tiles: list[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
) -> list[int]:
    """chat() with a history: turns are (user, its words), (assistant, its words), ..."""
    text = f"<|im_start|>system\n{system}<|im_end|>"
    for role, words in turns:
        text += f"<|im_start|>{role}\n{words}<|im_end|>"
    text += "<|im_start|>assistant\n"
    assert text.count(IMAGE) == len(num_tiles)
    for n in num_tiles:
        tiles = "".join(tag + PAD * tokens_per_tile for tag in tile_tags(n))
        text = text.replace(IMAGE, f"<Image>{tiles}</Image>", 1)
    return _ids(tokenizer, text)


def megatron_conversation(
    tokenizer: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
    num_tiles: list[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
) -> list[int]:
    """Qwen2's chat template, a newline after each turn, over Megatron's image tokens."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for role, words in turns:
        text += f"<|im_start|>{role}\n{words}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    pads = [tokenizer.convert_tokens_to_ids(PAD)] * tokens_per_tile
    before, *after = text.replace(IMAGE, f"<Image>{IMAGE}</Image>").split(IMAGE)
    out = _ids(tokenizer, before)
    for n, piece in zip(num_tiles, after, strict=True):
        for tag in tile_tags(n):
            out += _ids(tokenizer, tag) + pads
        out += _ids(tokenizer, piece)
    return out


def _with_markers(question: str, num_images: int) -> str:
    if IMAGE not in question:
        question = f"{IMAGE}\n" * num_images + question
    assert question.count(IMAGE) == num_images, f"{num_images} images for {question!r}"
    return question


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
