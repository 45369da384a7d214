"""Text generation with a bundle.

generator = load("out/")
print(generator.generate("The sea is", max_new_tokens=32).text)
for piece in generator.stream("Tell me a joke.", chat=True): print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemini.errors import RequestError
from gemini.runtime import chat as chats
from gemini.runtime import prefixes
from gemini.runtime.bundle import Bundle
from gemini.runtime.checks import cache_dtype, check_graph, checked_rows
from gemini.runtime.decoder import Decoder, LiveDecoders
from gemini.runtime.fields import damaged
from gemini.runtime.generate import Inference, OnToken, generate_tokens, new_token_limit
from gemini.runtime.options import GenerationOptions, OptionArgs, make_options
from gemini.runtime.pace import StepCosts
from gemini.runtime.prefixes import PrefixCache
from gemini.runtime.schema import DecoderModel
from gemini.runtime.scoring import all_logits
from gemini.runtime.session import Graph
from gemini.runtime.tokenizer import TextTokenizer
from gemini.runtime.transcript import Generation, Transcript, pieces

if TYPE_CHECKING:
    from jinja2 import Template
    from llguidance import LLTokenizer

    from gemini.runtime.speculate import Drafter, Speculator

Prompt = str | Sequence[str] | chats.Messages
Speculate: TypeAlias = "Literal['lookup'] | TextGenerator | None"


class TextGenerator:
    """A session for text generation. Every generation has its own cache, so several may be in flight."""

    def __init__(self, bundle: Bundle, graph: Graph, tokenizer: TextTokenizer | None) -> None:
        """``tokenizer=None``: token ids alone go in and come out."""
        model = bundle.manifest.model
        if not isinstance(model, DecoderModel):
            raise damaged("the manifest describes no decoder")
        check_graph(graph, model)
        self.bundle, self.graph, self.model = bundle, graph, model
        self.device, self.threads = graph.device, graph.threads
        self._tokenizer = tokenizer
        self.eos = frozenset(bundle.manifest.generation.eos_token_ids)
        try:
            make_options(bundle.manifest.generation.defaults, {})
        except RequestError as error:
            raise damaged(f"a generation default is impossible: {error.cause}") from error
        self._live, self._costs = LiveDecoders(), StepCosts()
        self._prefixes: PrefixCache | None = None
        self._benchmark: Decoder | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """RequestError if the bundle was loaded without it."""
        if self._tokenizer is None:
            raise RequestError(
                "This bundle was loaded without its tokenizer.",
                "Give token ids (generate_ids, decoder, logits), or load it without skip_tokenizer.",
            )
        return self._tokenizer

    def generate(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        speculate: Speculate = None,
        **options: Unpack[OptionArgs],
    ) -> Generation | list[Generation]:
        """Answer one prompt (a text or a conversation of role/content messages) or a list of texts.

        ``chat=True`` wraps each text as a user message in the bundle's chat template. Options that are not
        given come from the bundle. RequestError for empty or too long prompts and impossible options.

        ``speculate`` needs fewer calls of the model for one prompt without beams (docs/speculation.md):
        "lookup" drafts tokens from the prompt and the answer so far, a smaller session with the same
        tokenizer drafts its own.
        """
        prompts, single = self._prompts(prompt, chat)
        chosen = self._options(options)
        transcript = Transcript(self.tokenizer, chosen, self.eos, len(prompts))
        speculator = self.speculator(speculate, prompts, chosen)
        tokens, reasons = self._run(prompts, chosen, transcript, speculator)
        results = transcript.finished(tokens, reasons, [len(prompt) for prompt in prompts])
        if speculator is not None:
            results = [replace(results[0], speculation=speculator.counts)]
        return results[0] if single else results

    def stream(
        self,
        prompt: str | chats.Messages,
        *,
        chat: bool = False,
        speculate: Speculate = None,
        **options: Unpack[OptionArgs],
    ) -> Iterator[str]:
        """The text of :meth:`generate` for one prompt, piece by piece, in whole characters.

        The prompt and the options are checked by this call, before the first piece is asked for.
        """
        prompts, single = self._prompts(prompt, chat)
        if not single:
            raise RequestError("A stream takes one prompt.", "Use generate() for a list of prompts.")
        chosen = self._options(options)
        checked_rows(prompts, self.model)
        limit = new_token_limit(prompts, chosen, self.model.context_length)
        speculator = self.speculator(speculate, prompts, chosen)
        inference = self._inference(chosen, limit)
        return pieces(inference, prompts, self.tokenizer, chosen, self.eos, limit, speculator)

    def generate_ids(
        self,
        ids: Sequence[Sequence[int]],
        options: GenerationOptions | None = None,
        on_token: OnToken | None = None,
        speculator: Speculator | None = None,
    ) -> list[list[int]]:
        """New token ids (the end token included) for prompts of token ids, without any text.

        ``on_token(row, token)`` sees every token and ends the row by returning True. ``speculator``: a new
        one of :meth:`speculator`, for these ids and options.
        """
        return self._run(ids, options or self._options({}), on_token, speculator)[0]

    def speculator(
        self, speculate: Speculate, prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> Speculator | None:
        """What drafts for one generation and counts; RequestError for what cannot be drafted for or by."""
        if speculate is None:
            return None
        if len(prompts) != 1 or options.searches:
            raise RequestError(
                "Speculation follows a single row.", "Give one prompt and no beams, or leave speculate out."
            )
        from gemini.runtime.draft_model import ModelDrafter
        from gemini.runtime.lookup import LookupDrafter
        from gemini.runtime.speculate import Speculator

        drafter: Drafter
        if isinstance(speculate, TextGenerator):
            self._check_draft(speculate)
            drafter = ModelDrafter(speculate.decoder(), prompts[0], options, self._costs)
        elif speculate == "lookup":
            drafter = LookupDrafter(prompts[0], self._costs)
        else:
            raise RequestError(
                f"speculate is {str(speculate)[:80]!r}.", 'Give "lookup" or a loaded text generator.'
            )
        return Speculator(drafter, self._costs)

    def logits(self, ids: ArrayLike, lengths: ArrayLike | None = None) -> NDArray[np.float32]:
        """Logits float32 (B, S, V) of every position of ids (B, S); see :func:`scoring.all_logits`."""
        return all_logits(self.graph, self.model, ids, lengths)

    def decoder(self, new_tokens: int = 0) -> Decoder:
        """A fresh batch over this session, with a cache planned for ``new_tokens`` after the prompt."""
        decoder = Decoder(self.graph, self.model, new_tokens, prefixes=self._prefixes)
        self._live.add(decoder)
        return decoder

    def prefill(self, ids: Sequence[Sequence[int]], new_tokens: int = 0) -> NDArray[np.float32]:
        """Start the session's own batch; logits (B, V). With :meth:`step`, what a benchmark measures."""
        if self._benchmark is not None:
            self._benchmark.close()
        self._benchmark = self.decoder(new_tokens)
        return self._benchmark.prefill(ids)

    def step(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Append a token to each row of the session's own batch; logits (B, V)."""
        if self._benchmark is None:
            raise RequestError("A step came before any prefill.", "Call prefill first.")
        return self._benchmark.step(tokens)

    def keep_prefixes(self, max_bytes: int) -> None:
        """Keep the caches of finished single prompts from now on, up to so many bytes; 0 forgets them all.

        A prompt that begins like one before, its answer included, is then computed from there on. Needs a
        bundle with a shared cache (`gemini.runtime.prefixes`).
        """
        kept = PrefixCache(max_bytes)
        if max_bytes and self.model.cache != "shared":
            raise RequestError("This bundle's cache cannot be begun from a prefix.", "Leave it out.")
        for prefix in self._prefixes.held() if self._prefixes is not None else ():
            kept.keep(prefix)
        self._prefixes = kept if max_bytes else None

    def save_prefixes(self, path: str | Path) -> None:
        """Write all kept prefixes to a file for :meth:`restore_prefixes`, whole or not at all."""
        prefixes.save(path, self._kept.held(), self.bundle.manifest.digest)

    def restore_prefixes(self, path: str | Path) -> None:
        """Keep the prefixes of a file too. BundleError if it is damaged or of another bundle."""
        kept, dtype = self._kept, cache_dtype(self.graph)
        for prefix in prefixes.read(path, self.bundle.manifest.digest, self.model, dtype):
            kept.keep(prefix)

    def render_chat(self, messages: chats.Messages, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, by the bundle's chat template."""
        return chats.render_chat(self._template, messages, self._special_tokens, add_generation_prompt)

    def memory(self) -> dict[str, int]:
        """Bytes: "weights" on disk; of all batches in flight what :meth:`Decoder.memory` says; "prefixes"."""
        kept = 0 if self._prefixes is None else self._prefixes.nbytes
        return {"weights": self.bundle.weight_bytes, **self._live.memory(), "prefixes": kept}

    def close(self) -> None:
        """Free the caches. The session itself is freed with the object."""
        self._live.close()
        self._benchmark = None

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        on_token: OnToken | None,
        speculator: Speculator | None = None,
    ) -> tuple[list[list[int]], list[str]]:
        checked_rows(prompts, self.model)
        limit = new_token_limit(prompts, options, self.model.context_length)
        if self.model.cache == "shared" or len({len(prompt) for prompt in prompts}) == 1:
            inference = self._inference(options, limit)
            return generate_tokens(inference, prompts, options, self.eos, limit, on_token, speculator)
        rows, reasons = [], []
        for row, prompt in enumerate(prompts):  # a concatenated cache has one length for all rows
            seeded = options if options.seed is None else replace(options, seed=options.seed + row)

            def forward(_: int, token: int, row: int = row) -> bool | None:
                return on_token(row, token) if on_token is not None else None

            inference = self._inference(seeded, limit)
            tokens, reason = generate_tokens(inference, [prompt], seeded, self.eos, limit, forward)
            rows += tokens
            reasons += reason
        return rows, reasons

    def _check_draft(self, draft: TextGenerator) -> None:
        """RequestError unless both models read and write the same tokens."""
        alike = draft.model.vocab_size == self.model.vocab_size and (
            draft.tokenizer is self.tokenizer
            or draft.tokenizer.inner.get_vocab() == self.tokenizer.inner.get_vocab()
        )
        if not alike:
            raise RequestError(
                "The draft model has another vocabulary.", "Give a smaller model of the same tokenizer."
            )

    @property
    def _kept(self) -> PrefixCache:
        if self._prefixes is None:
            raise RequestError("No prefixes are kept.", "Call keep_prefixes first.")
        return self._prefixes

    def _inference(self, options: GenerationOptions, new_tokens: int) -> Inference:
        """A fresh batch, behind the grammar that the options ask for."""
        decoder = self.decoder(new_tokens)
        if not options.constrained:
            return decoder
        from gemini.runtime.constrain import Constrained, Grammar

        return Constrained(decoder, Grammar(self._vocabulary, options))

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from gemini.runtime.constrain import read_vocabulary

        return read_vocabulary(self.tokenizer, self.model.vocab_size, self.eos)

    def _options(self, given: OptionArgs | Mapping[str, Any]) -> GenerationOptions:
        chosen = make_options(self.bundle.manifest.generation.defaults, given)
        if chosen.begin:
            raise RequestError(
                "This model has no encoder: an answer goes on where its prompt ends.",
                "Write what it is to begin with at the end of the prompt.",
            )
        return chosen

    def _prompts(self, prompt: Prompt, chat: bool) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether there was just one."""
        bos = self.bundle.manifest.generation.bos_token_id
        if isinstance(prompt, str):
            texts, single = [prompt], True
        elif isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            return [self.tokenizer.encode(self.render_chat(prompt), False)], True  # type: ignore[arg-type]
        elif (
            isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(text, str) for text in prompt)
        ):
            texts, single = [str(text) for text in prompt], False
        else:
            raise RequestError("The prompt is neither a text nor a list of texts.", "Give at least one str.")
        if not chat:
            return [self.tokenizer.encode(text, True, bos) for text in texts], single
        if not all(texts):
            raise RequestError("The prompt is empty.", "Give at least one character.")
        rendered = [self.render_chat([{"role": "user", "content": text}]) for text in texts]
        return [self.tokenizer.encode(text, False) for text in rendered], single

    @cached_property
    def _template(self) -> Template:
        if not self.bundle.has(chats.TEMPLATE_NAME):
            raise RequestError("This bundle has no chat template.", "Use a plain prompt (without chat).")
        return chats.compile_template(self.bundle.text(chats.TEMPLATE_NAME))

    @property
    def _special_tokens(self) -> dict[str, str]:
        info = self.bundle.manifest.generation
        eos = info.eos_token_ids[0] if info.eos_token_ids else None
        ids = {"bos_token": info.bos_token_id, "eos_token": eos, "pad_token": info.pad_token_id}
        return {name: text for name, i in ids.items() if (text := self.tokenizer.token(i)) is not None}
