"""What the models under transformers' names share: loading, saving, checkpointing, and what the Trainer needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints.load_save import load_model, save_model
from ..config import ConvNextConfig
from ..files import local_path
from ..huggingface.hub import push
from ..huggingface.virtual_subclass import VirtualSubclass
from .huggingface_layers import ConvNextEncoder, ConvNextStage
from .outputs import ModelOutput
from .switches import ConvNextSwitches, init_weights
from .whole_runs import is_untouched

Output = TypeVar("Output", bound=ModelOutput)


class ConvNextPreTrainedModel(VirtualSubclass, ConvNextSwitches):
    """Base of the models. For transformers' Trainer, ``isinstance`` takes it for a ``PreTrainedModel`` of transformers.

    Args:
        config: the architecture.
        fused: run the fused ops; False runs plain eager PyTorch. Assign ``model.fused`` to switch.
        device, dtype: of the parameters.
    """

    transformers_base = "transformers.modeling_utils", "PreTrainedModel"
    config_class = ConvNextConfig
    base_model_prefix = "convnext"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    checkpoint_format = "transformers"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ("ConvNextEmbeddings", "ConvNextStage", "ConvNextLayer", "Downsample")
    # transformers' own code reads these attributes of every model class. Here they are empty.
    model_tags = _keys_to_ignore_on_save = None
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = frozenset()
    all_tied_weights_keys: ClassVar[dict[str, str]] = {}
    can_generate = _can_set_attn_implementation = _can_set_experts_implementation = classmethod(lambda cls: False)

    def __init__(
        self,
        config: ConvNextConfig,
        *,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kind = self.config_class
        if not isinstance(config, kind) or config.version != kind.version:
            raise TypeError(f"config is a {type(config).__name__}: expected a convnext_fast.{kind.__name__}")
        config.validate()
        self.config = config
        self._make(config, fused, device=device, dtype=dtype)

    def _make(self, config: ConvNextConfig, fused: bool, **factory: Any) -> None:
        """Make the layers of the model. A user's own subclass makes them in its constructor."""

    def post_init(self) -> None:
        """Initialise the weights that are not loaded yet, and enable checkpointing if the configuration says so."""
        init_weights(self, self.config.initializer_range)
        if vars(self.config).get("gradient_checkpointing"):
            self.gradient_checkpointing_enable()

    def _states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the stem and of each stage."""
        embeddings, encoder, states = self.embeddings, self.encoder, None
        if is_untouched(encoder, (ConvNextEncoder.forward,)):
            states = self.run_whole((embeddings, *encoder.stages), pixel_values)
        return encoder(embeddings(pixel_values)) if states is None else tuple(states)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, **options: Any) -> Any:
        """A model with the weights of a folder, file or hub id; see `load_model`."""
        return load_model(cls, pretrained_model_name_or_path, **options)

    @classmethod
    def _from_config(cls, config: ConvNextConfig, dtype: torch.dtype | str | None = None, **options: Any) -> Any:
        """A new model, as ``AutoModel.from_config`` of transformers makes it."""
        options = {name: value for name, value in options.items() if name not in ("attn_implementation", "torch_dtype")}
        config = config.amended(**({} if dtype is None else {"dtype": dtype}))
        return cls(config, dtype=config.dtype, **options)

    def save_pretrained(
        self, save_directory: str | Path, *, is_main_process: bool = True, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write ``config.json`` and the weights.

        Args:
            save_directory: made if it is missing.
            is_main_process: False, in all processes but one, writes nothing.
            push_to_hub: also call `push_to_hub`; ``repo_id`` is the folder's name unless given.
            **options: those of `save_model`, such as ``max_shard_size``, and of `hub.push`. ``save_function``,
                ``save_peft_format`` and ``save_original_format``, from transformers, have no effect.
        """
        options = {name: value for name, value in options.items() if name not in _NO_EFFECT_ON_SAVING}
        upload = {name: options.pop(name) for name in UPLOAD if name in options}
        if not is_main_process:
            return
        save_model(self, save_directory, **options)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": local_path(save_directory).name, **upload}, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload ``config.json`` and the weights to a Hugging Face hub repository.

        ``options``: those of `hub.push` and of `save_model`.
        """
        upload = {name: options.pop(name) for name in UPLOAD if name in options}
        return push(lambda folder: save_model(self, folder, **options), repo_id, **upload)

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def name_or_path(self) -> str:
        """Where the weights were loaded from."""
        return self.config.name_or_path

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; ``exclude_embeddings``, from transformers, has no effect here."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, with ``return_buffers``, of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Raise an error that names PEFT's own way to add an adapter, which works with these models."""
        raise NotImplementedError("add_adapter is not supported: use peft.get_peft_model(model, adapter_config)")

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute whole blocks in the backward pass; ``recompute`` is cheaper.

        ``gradient_checkpointing_kwargs``: further arguments of `torch.utils.checkpoint.checkpoint`.

        Raises:
            ValueError: ``every_n_layers`` is not 1, or ``offload`` is True: neither is supported.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(f"every_n_layers={every_n_layers}, offload={offload}: expected 1 and False")
        self._set_checkpointing({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self._set_checkpointing(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any stage recomputes its blocks."""
        return any(m.checkpointing is not None for m in self.modules() if isinstance(m, ConvNextStage))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """transformers' newer name for `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    activation_checkpointing_disable = gradient_checkpointing_disable
    is_activation_checkpointing = is_gradient_checkpointing

    def _set_checkpointing(self, options: dict[str, Any] | None) -> None:
        for module in self.modules():
            if isinstance(module, ConvNextStage):
                module.checkpointing = options

    def _wanted_states(self, asked: Any) -> Any:
        return self.config.output_hidden_states if asked is None else asked

    def _hidden_states(self, states: tuple[Tensor, ...], asked: Any) -> tuple[Tensor | None, ...] | None:
        """The states to return: all; None; or all, with None in place of those whose index is not in ``asked``."""
        wanted = self._wanted_states(asked)
        if isinstance(wanted, bool):
            return states if wanted else None
        count = len(states)
        chosen = {i % count for i in ([wanted] if isinstance(wanted, int) else wanted) if -count <= i < count}
        return tuple(state if i in chosen else None for i, state in enumerate(states))

    def _returned(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


_NO_EFFECT_ON_SAVING = ("save_function", "save_peft_format", "save_original_format")
UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
"""The options of `hub.push`."""
