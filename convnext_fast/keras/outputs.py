"""The outputs of the PyTorch models, `BaseModelOutput` and `ImageClassifierOutput`, as trees for Keras's backends.

TensorFlow knows mappings, and PyTorch these classes. They are registered here for JAX and for optree, which Keras uses.
"""

from __future__ import annotations

from typing import Any

import keras

from ..models.outputs import BaseModelOutput, ImageClassifierOutput, ModelOutput


def _register(cls: type[ModelOutput]) -> None:
    def flatten(output: ModelOutput) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        return tuple(output.values()), tuple(output.keys())

    def unflatten(keys: tuple[str, ...], values: Any) -> ModelOutput:
        return cls(**dict(zip(keys, values, strict=True)))

    if keras.backend.backend() == "jax":
        import jax

        def flatten_with_keys(output: ModelOutput) -> tuple[Any, tuple[str, ...]]:
            values, keys = flatten(output)
            return [(jax.tree_util.DictKey(k), v) for k, v in zip(keys, values, strict=True)], keys

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    if keras.backend.backend() != "torch":
        import optree

        optree.register_pytree_node(cls, lambda o: (*flatten(o), tuple(o.keys())), unflatten, namespace="keras")


for _cls in (BaseModelOutput, ImageClassifierOutput):
    _register(_cls)
