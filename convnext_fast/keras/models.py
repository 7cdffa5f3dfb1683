"""transformers' TensorFlow classes as Keras 3 models: a model and a classifier of V1, and the same of V2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import torch
from keras import ops

from ..config import ConvNextConfig, ConvNextV2Config
from .fused import ON_TORCH
from .layers import ConvNextMainLayer, dense
from .losses import mean_of, sample_losses
from .outputs import BaseModelOutput, ImageClassifierOutput
from .weights import load_pretrained, save_pretrained

_INPUTS = ("pixel_values", "labels")


class TFConvNextPreTrainedModel(keras.Model):
    """What both models share."""

    config_class = ConvNextConfig
    base_model_prefix = "convnext"
    main_input_name = "pixel_values"
    main_output_name: str

    def __init__(self, config: ConvNextConfig, add_pooling_layer: bool, name: str | None, dtype: Any):
        super().__init__(name=name, dtype=dtype)
        expected = self.config_class
        if not isinstance(config, expected) or config.version != expected.version:
            raise TypeError(f"config is a {type(config).__name__}: expected a convnext_fast.{expected.__name__}")
        self.config = config
        self.add_pooling_layer = add_pooling_layer
        name = self.base_model_prefix
        setattr(self, name, ConvNextMainLayer(config, add_pooling_layer, name=name, dtype=self.dtype_policy))

    @property
    def main_layer(self) -> ConvNextMainLayer:
        """Stem, stages and pooling: ``convnext`` or, of V2, ``convnextv2``."""
        return getattr(self, self.base_model_prefix)

    def build(self, input_shape: Any = None) -> None:
        """Make the weights, whose shapes follow from the configuration; ``input_shape`` has no effect."""
        self.main_layer.build((None, self.config.num_channels, None, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `call`, which has the arguments."""
        return super().__call__(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})

    def _run(self, pixel_values: Any, output_hidden_states: bool | None) -> BaseModelOutput:
        _check_image(pixel_values, self.config)
        states, pooled = self.main_layer(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        hidden = tuple(map(_channels_first, states)) if output_hidden_states else None
        return BaseModelOutput(
            last_hidden_state=_channels_first(states[-1]), pooler_output=pooled, hidden_states=hidden
        )

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        if getattr(self.config, "return_dict", True) if return_dict is None else return_dict:
            return output
        hidden = output.hidden_states or ()
        return (*(value for key, value in output.items() if key != "hidden_states"), *hidden)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """As in `keras.Model`; labels may also be in the inputs.

        ``y``: a mapping by names of outputs, or what the main output is compared with.
        """
        return super().compute_loss(x, *self._compared(x, y, y_pred), sample_weight, training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """As in `keras.Model`; see `compute_loss`."""
        return super().compute_metrics(x, *self._compared(x, y, y_pred), sample_weight)

    def _compared(self, x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
        """(targets, outputs) by the names of the outputs that ``y`` has targets for."""
        y = x.get("labels") if y is None and isinstance(x, Mapping) else y
        targets = dict(y) if isinstance(y, Mapping) else {self.main_output_name: y}
        if "labels" in targets:
            targets[self.main_output_name] = targets.pop("labels")
        unknown = [name for name in targets if name not in y_pred]
        if unknown:
            raise ValueError(f"y has targets for {unknown}: expected some of the outputs {list(y_pred)}, or labels")
        return targets, {name: y_pred[name] for name in targets}

    def get_config(self) -> dict[str, Any]:
        """Arguments from which `from_config` makes the same model, with new weights."""
        return {"name": self.name, "dtype": keras.dtype_policies.serialize(self.dtype_policy)} | {
            "config": self.config.to_dict()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The inverse of `get_config`."""
        return cls(**{**config, "config": cls.config_class.from_dict(config["config"])})

    from_pretrained = classmethod(load_pretrained)
    save_pretrained = save_pretrained

    def export(self, filepath: str | Path, format: str = "tf_saved_model", **options: Any) -> None:
        """Write a program for images of ``config.image_size``, as `keras.Model.export` does.

        Its input is ``pixel_values``, (N, num_channels, H, W), and its outputs have the names of the model's.
        """
        shape = self.config.num_channels, *self.config.image_shape
        image = keras.Input(shape, name="pixel_values", dtype="float32")
        program = keras.Model(image, dict(self(image, return_dict=True)))
        program.export(filepath, format, **options)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters."""
        variables = self.trainable_weights if only_trainable else self.weights
        return sum(math.prod(variable.shape) for variable in variables)


@keras.saving.register_keras_serializable("convnext_fast")
class TFConvNextModel(TFConvNextPreTrainedModel):
    """The model without a classifier.

    Args:
        config: the architecture.
        add_pooling_layer: whether there is a ``pooler_output``.
        name, dtype: as in `keras.Model`; ``dtype`` is a policy such as "mixed_bfloat16".
    """

    main_output_name = "pooler_output"

    def __init__(
        self, config: ConvNextConfig, *, add_pooling_layer: bool = True, name: str | None = None, dtype: Any = None
    ):
        super().__init__(config, add_pooling_layer, name, dtype)
        self.build()

    def call(
        self,
        pixel_values: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Images to a `BaseModelOutput`.

        Args:
            pixel_values: (N, num_channels, H, W), floating: a tensor or array of any framework, a list of one, or a
                dictionary with this name.
            output_hidden_states: also return the outputs of the stem and of each stage; None: see the configuration.
            return_dict: False returns a tuple, in which every hidden state is an entry.
            training: whether drop path is active.

        Raises:
            TypeError, ValueError: the inputs have another structure, dtype or shape.
        """
        pixel_values, _ = _unpacked(pixel_values, None, _INPUTS[:1])
        return self._returned(self._run(pixel_values, output_hidden_states), return_dict)

    def get_config(self) -> dict[str, Any]:
        """See the base class."""
        return super().get_config() | {"add_pooling_layer": self.add_pooling_layer}


@keras.saving.register_keras_serializable("convnext_fast")
class TFConvNextForImageClassification(TFConvNextPreTrainedModel):
    """`TFConvNextModel` with a linear classifier on the pooled features.

    Args: as `TFConvNextModel`. A configuration with no labels makes a model without a classifier, whose logits are the
    pooled features.
    """

    main_output_name = "logits"

    def __init__(self, config: ConvNextConfig, *, name: str | None = None, dtype: Any = None):
        super().__init__(config, True, name, dtype)
        self.num_labels = config.num_labels
        self.classifier = None
        if config.num_labels:
            self.classifier = dense(config.num_labels, config.initializer_range, "classifier", self.dtype_policy)
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """See the base class."""
        super().build()
        if self.classifier is not None:
            self.classifier.build((None, self.config.hidden_sizes[-1]))

    def call(
        self,
        pixel_values: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Any = None,
        training: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Images to an `ImageClassifierOutput`, with the loss of each sample, (N,), where labels are given.

        Args: as in `TFConvNextModel.call`, and ``labels``, also in the dictionary: see `losses.sample_losses`.

        Raises:
            TypeError, ValueError: the inputs or labels have another structure, dtype, shape or range.
        """
        pixel_values, labels = _unpacked(pixel_values, labels, _INPUTS)
        base = self._run(pixel_values, output_hidden_states)
        logits = base.pooler_output if self.classifier is None else self.classifier(base.pooler_output)
        loss = None if labels is None else sample_losses(labels, logits, self.config.problem_type)[0]
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=base.hidden_states)
        return self._returned(output, return_dict)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The model's own loss if `compile` was given none: the mean over all samples whose label is not −100."""
        if getattr(self, "loss", None) is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        targets, outputs = self._compared(x, y, y_pred)
        if targets.get("logits") is None:
            raise ValueError("no labels: expected them in y, or as labels in the inputs")
        own = mean_of(*sample_losses(targets["logits"], outputs["logits"], self.config.problem_type), sample_weight)
        return own + sum(map(ops.sum, self.losses))


@keras.saving.register_keras_serializable("convnext_fast")
class TFConvNextV2Model(TFConvNextModel):
    """`TFConvNextModel` for ConvNeXt V2, with the same arguments and outputs, and ``grn`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"


@keras.saving.register_keras_serializable("convnext_fast")
class TFConvNextV2ForImageClassification(TFConvNextForImageClassification):
    """`TFConvNextForImageClassification` for ConvNeXt V2; the same arguments and outputs, and ``grn`` in each block."""

    config_class = ConvNextV2Config
    base_model_prefix = "convnextv2"


def _plain(value: Any) -> Any:
    """Mappings become dictionaries, and PyTorch's tensors become arrays for other backends."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) and not ON_TORCH:
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return value


def _unpacked(first: Any, labels: Any, names: tuple[str, ...]) -> tuple[Any, Any]:
    """``pixel_values`` and ``labels`` of the first argument, a tensor, a list of one, or a dictionary."""
    if isinstance(first, Mapping):
        unknown = [name for name in first if name not in names]
        if unknown:
            raise ValueError(f"the inputs hold {', '.join(map(str, unknown))}: expected {' and '.join(names)}")
        labels = first.get("labels", labels)
        first = first.get("pixel_values")
    elif isinstance(first, (list, tuple)):
        if len(first) != 1:
            raise ValueError(f"the inputs are a list of {len(first)}: expected [pixel_values]")
        first = first[0]
    if first is None:
        raise ValueError("there are no pixel_values: expected images (N, num_channels, H, W)")
    return first, labels


def _check_image(image: Any, config: ConvNextConfig) -> None:
    if not hasattr(image, "shape"):
        raise TypeError(f"pixel_values is a {type(image).__name__}: expected a tensor (N, {config.num_channels}, H, W)")
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(image.dtype)):
        raise TypeError(f"pixel_values has dtype {image.dtype}: expected floats (rescale and normalise the image)")
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[1] not in (config.num_channels, None):
        raise ValueError(f"pixel_values has shape {shape}: expected (N, {config.num_channels}, H, W)")
    least = [side << (config.num_stages - 1) for side in config.patch_shape]
    if any(side is not None and side < limit for side, limit in zip(shape[2:], least, strict=True)):
        raise ValueError(f"pixel_values is {shape[2]}×{shape[3]} pixels: expected at least {least[0]}×{least[1]}")


def _channels_first(x: Any) -> Any:
    return ops.transpose(x, (0, 3, 1, 2))
