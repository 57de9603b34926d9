"""Continuing prompts: one parallel prefill, then a step of fixed cost and state for every token."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from pydantic import Field

from jaxlm.data import Tokenizer
from jaxlm.inference.sampling import sample
from jaxlm.models.language_model import LanguageModel
from jaxlm.params import split
from jaxlm.schema import Schema, UserError

# Longer prompts are read in pieces of this many tokens, which bounds the memory of a prefill.
PREFILL = 2048


class SamplingSettings(Schema):
    """How continuations are drawn."""

    max_tokens: int = Field(256, description="Length of a continuation in tokens.")
    temperature: float = Field(1.0, description="Divides the logits; 0 takes the likeliest token.")
    top_k: int | None = Field(None, description="Draw from the k likeliest tokens.")
    top_p: float | None = Field(None, description="Draw from the likeliest tokens that hold this probability.")
    seed: int = Field(0, description="The same seed, prompts and model give the same text.")
    stop_at_end_of_text: bool = Field(True, description="A row ends with its document; otherwise it goes on.")

    def check(self) -> None:
        """Raises UserError, naming the setting, for values that mean nothing."""
        problems = {
            f"max_tokens={self.max_tokens}: generate at least one token": self.max_tokens >= 1,
            f"temperature={self.temperature}: give 0 (likeliest token) or more": self.temperature >= 0,
            f"top_k={self.top_k}: keep at least one token": self.top_k is None or self.top_k >= 1,
            f"top_p={self.top_p}: a probability above 0 and at most 1": self.top_p is None or 0 < self.top_p <= 1,
        }
        for problem, fine in problems.items():
            if not fine:
                raise UserError(problem)


def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], settings: SamplingSettings = SamplingSettings()
) -> list[str]:
    """The continuation of every prompt.

    Args:
      model: a trained model.
      tokenizer: the one it was trained with.
      prompts: texts of any lengths, read as one batch; each starts a document.

    Raises:
      UserError: for settings or prompts that do not fit the model.

    Example:
      >>> [text] = generate(run.model, run.tokenizer, ["def main("], SamplingSettings(temperature=0.8))
    """
    texts = [""] * len(prompts)
    for pieces in stream(model, tokenizer, prompts, settings):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    return texts


def stream(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], settings: SamplingSettings = SamplingSettings()
) -> Iterator[list[str]]:
    """As `generate`, a list of new pieces of text (one a prompt, often empty) at a time."""
    if not prompts:
        raise UserError("prompts: give at least one; an empty text starts an empty document")
    start = np.array([tokenizer.end_of_text])
    encoded = [np.concatenate([start, tokenizer.encode(prompt)]) for prompt in prompts]
    decoders = [tokenizer.stream_decoder() for _ in prompts]
    running = np.ones(len(prompts), bool)
    for tokens in generate_tokens(model, encoded, settings, vocab_size=tokenizer.vocab_size):
        if settings.stop_at_end_of_text:
            running &= tokens != tokenizer.end_of_text
        yield [d.push([int(t)]) if on else "" for d, t, on in zip(decoders, tokens, running, strict=True)]
        if not running.any():
            break
    yield [decoder.finish() for decoder in decoders]


def generate_tokens(
    model: LanguageModel, prompts: Sequence[Int[np.ndarray, _]], settings: SamplingSettings, *, vocab_size: int
) -> Iterator[Int[np.ndarray, B]]:
    """Yields `settings.max_tokens` times one new token a prompt.

    Raises:
      UserError: for settings that mean nothing, an empty prompt, or ids outside the vocabulary.
    """
    settings.check()
    _check_prompts(prompts, vocab_size, model.settings.vocab_size)
    graphdef, params = split(model)
    prefill, decode = _compiled(graphdef, settings.temperature, settings.top_k, settings.top_p, vocab_size)

    # Prompts are padded on the left with a document of their own, whose state the reset before the prompt drops; so all
    # rows end, and continue, at the same column.
    width = _padded_length(max(len(prompt) for prompt in prompts))
    # A call's first token continues the incoming state, so no prompt may begin where a piece of the prefill does.
    while any(width > len(prompt) and (width - len(prompt)) % PREFILL == 0 for prompt in prompts):
        width += 1
    tokens = np.zeros((len(prompts), width), np.int32)
    segment_ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
    state = model.init_state(len(prompts), length=width + settings.max_tokens)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(settings.seed), row))(jnp.arange(len(prompts)))

    for begin in range(0, width, PREFILL):
        piece = slice(begin, begin + PREFILL)
        token, state = prefill(params, tokens[:, piece], segment_ids[:, piece], state, keys)
    yield np.asarray(token)
    for position in range(1, settings.max_tokens):
        token, state = decode(params, token, state, keys, position)
        yield np.asarray(token)


@functools.lru_cache(maxsize=8)
def _compiled(graphdef: nnx.GraphDef, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int):
    """The jitted prefill and decode steps; kept, so that a second call compiles nothing."""
    draw = functools.partial(sample, valid=vocab_size, temperature=temperature, top_k=top_k, top_p=top_p)

    def pick(logits: Array, keys: Array, position: Array):
        return draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, position))

    @functools.partial(jax.jit, donate_argnums=3)
    def prefill(params, tokens, segment_ids, state, keys):
        logits, state = nnx.merge(graphdef, params).prefill(tokens, state, segment_ids)
        return pick(logits, keys, 0), state

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(params, token, state, keys, position):
        logits, state = nnx.merge(graphdef, params)(token[:, None], state)
        return pick(logits[:, 0], keys, position), state

    return prefill, decode


def _padded_length(length: int) -> int:
    """Few different lengths, so that few prefills are compiled: powers of two, then multiples of a piece."""
    if length > PREFILL:
        return -(-length // PREFILL) * PREFILL
    return max(16, 1 << (length - 1).bit_length())


def _check_prompts(prompts: Sequence[np.ndarray], vocab_size: int, model_vocab_size: int) -> None:
    if vocab_size > model_vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} ids but the model only {model_vocab_size}; use the tokenizer it was trained with"
        )
    for row, prompt in enumerate(prompts):
        prompt = np.asarray(prompt)
        if not len(prompt):
            raise UserError(f"prompt {row} has no tokens; start it with the end-of-text token")
        bad = np.flatnonzero((prompt < 0) | (prompt >= vocab_size))
        if len(bad):
            raise UserError(
                f"prompt {row}: token {prompt[bad[0]]} at position {bad[0]} is outside the vocabulary of {vocab_size}; "
                "encode it with the tokenizer that the model was trained with"
            )


def warnings(model: LanguageModel, prompt_length: int, total_length: int, trained_length: int) -> list[str]:
    """What a user should know about lengths, a line each; the result is well defined all the same.

    Args:
      prompt_length: tokens of the longest prompt.
      total_length: with its continuation.
      trained_length: `data.sequence_length` of the run.
    """
    mixers = [model.settings.mixer(name) for name in dict.fromkeys(model.settings.layer_names())]
    windows = [getattr(m, "window", None) for m in mixers if m.op == "attention"]
    limited = [window for window in windows if window is not None]
    notes = []
    if limited and prompt_length > min(limited):
        notes.append(
            f"the prompt has {prompt_length} tokens but windowed attention layers see the last {min(limited)}; what is "
            "before reaches the text through the other layers only"
        )
    if None in windows and total_length > trained_length:
        notes.append(
            f"prompt and continuation take {total_length} tokens, more than the {trained_length} that the attention layers "
            "were trained on; quality may fall beyond them"
        )
    return notes
