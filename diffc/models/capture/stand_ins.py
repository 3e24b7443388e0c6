"""What takes the places of a pipeline's other components, so that it calls its backbone within milliseconds.

They are no modules of torch, and have no weights: a tokenizer of words, encoders that give noise of the right width,
a VAE that is its configuration only. A pipeline reads their attributes from the real configurations.
"""

from __future__ import annotations

from typing import Any

_WORDS = 99
_TEXT = "m['content'] if m['content'] is string else m['content'][0]['text']"
_TEMPLATE = "{% for m in messages %}{{ " + _TEXT + " }} {% endfor %}"


def words(count: int) -> str:
    """A prompt of that many tokens of `tokenizer`."""
    return " ".join(f"w{i % _WORDS}" for i in range(count))


def tokenizer(length: int) -> Any:
    """A tokenizer whose tokens are words; `length` is the most that it gives when asked to cut."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(_WORDS)}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=length,
    )
    found.chat_template = _TEMPLATE
    return found


class Answer(dict[str, Any]):
    """What an encoder of transformers returns: by attribute, by name and by position."""

    def __init__(self, order: tuple[str, ...], **values: Any):
        super().__init__(values)
        self._order = order

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return dict.__getitem__(self, name)
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return dict.__getitem__(self, self._order[key] if isinstance(key, int) else key)


class TextEncoder:
    """Noise in the shape of what an encoder with this `config` gives; `projects`: it ends with a projection."""

    def __init__(self, config: Any, *, projects: bool):
        import torch

        self.config, self._projects = config, projects
        self.dtype, self.device = torch.float32, torch.device("cpu")
        text = getattr(config, "text_config", None) or config
        self._width = next(getattr(text, n) for n in ("hidden_size", "d_model") if hasattr(text, n))
        self._layers = next(getattr(text, n) for n in ("num_hidden_layers", "num_layers") if hasattr(text, n))
        self.text_model = self.model = self.language_model = self.encoder = self

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Answer:
        """Noise for every token, and for the whole prompt."""
        import torch

        noise = torch.Generator().manual_seed(0)
        states = torch.randn(*input_ids.shape, self._width, generator=noise).to(self.dtype)
        pooled_width = getattr(self.config, "projection_dim", self._width) if self._projects else self._width
        pooled = torch.randn(len(input_ids), pooled_width, generator=noise).to(self.dtype)
        first = "text_embeds" if self._projects else "last_hidden_state"
        return Answer(
            (first, "last_hidden_state" if self._projects else "pooler_output", "hidden_states"),
            last_hidden_state=states,
            hidden_states=(states,) * (self._layers + 1),
            pooler_output=pooled,
            text_embeds=pooled,
        )

    def final_layer_norm(self, states: Any) -> Any:
        """The last norm of a CLIP encoder, which pipelines call for --clip-skip."""
        return states

    def parameters(self) -> Any:
        """As a module of torch: one value, which tells type and place."""
        import torch

        return iter([torch.zeros(1, dtype=self.dtype)])

    def modules(self) -> Any:
        """As a module of torch that has no layers."""
        return iter([])

    def named_parameters(self) -> Any:
        """As a module of torch."""
        return iter([("none", next(self.parameters()))])

    def eval(self) -> TextEncoder:
        """As a module of torch."""
        return self

    def to(self, *_: Any, **__: Any) -> TextEncoder:
        """As a module of torch."""
        return self


class Vae:
    """A VAE that is its configuration, and the attributes that its class computes from it."""

    def __init__(self, cls: Any, config: dict[str, Any]):
        import torch
        from accelerate import init_empty_weights

        with init_empty_weights():
            self._real = cls.from_config(config)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class Backbone:
    """Takes the backbone's place: notes what it is called with, and ends the run of the pipeline.

    `read` has the plain attributes that were read beside the config, by name; of lists of modules the lengths.
    """

    def __init__(self, real: Any, calls: list[dict[str, Any]] | None = None):
        """`calls`: the notes of another backbone of the pipeline, whose calls count as this one's."""
        import torch

        self.real, self.calls = real, [] if calls is None else calls
        self.read: dict[str, Any] = {}
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["real"], name)
        if isinstance(value, bool | int | float | str):
            self.read[name] = value
        elif type(value).__name__ == "ModuleList":
            self.read[name] = [None] * len(value)  # pipelines count blocks
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Note the arguments by name. Raises Enough, always."""
        from inspect import signature

        bound = signature(type(self.real).forward).bind(self.real, *args, **kwargs)
        given = {k: v for k, v in bound.arguments.items() if k not in ("self", "return_dict")}
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        self.calls.append(given)
        raise Enough


class Enough(Exception):
    """The backbone was called; the rest of the pipeline need not run."""
