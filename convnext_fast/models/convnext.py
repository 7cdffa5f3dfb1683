"""`ConvNext`: the drop-in model, with timm's contract and parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.load_save import load_model, save_model
from ..config import ConvNextConfig
from .fused_module import outputs_in_turn
from .layers import ConvNextBlock, Downsample, LayerNorm2d, Stage, Stem
from .switches import ConvNextSwitches, check_image, init_weights

POOLS = ("avg", "max", "")


class FeatureInfo(list):
    """The feature map of each stage: a list of dicts with ``num_chs``, ``reduction`` (stride) and ``module``."""

    def channels(self, index: int | None = None) -> Any:
        """Channels of one feature map, or of all."""
        return self._get("num_chs", index)

    def reduction(self, index: int | None = None) -> Any:
        """Stride of one feature map with respect to the image, or of all."""
        return self._get("reduction", index)

    def module_name(self, index: int | None = None) -> Any:
        """Name of the module that returns one feature map, or of all."""
        return self._get("module", index)

    def _get(self, key: str, index: int | None) -> Any:
        return [entry[key] for entry in self] if index is None else self[index][key]


class ConvNextStage(Stage):
    """A stage under timm's names: downsample, blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[ConvNextBlock], fused: bool):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.declare("downsample", "blocks", fused)


class Head(nn.Module):
    """Global pooling, LayerNorm, dropout, classifier."""

    def __init__(self, norm: nn.Module, channels: int, num_classes: int, pool: str, drop_rate: float, **factory: Any):
        super().__init__()
        self.pool_type = _check_pool(pool, num_classes)
        self.norm = norm
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(channels, num_classes, **factory) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C, H, W) to (N, num_classes), or (N, C) before the classifier; (N, C, H, W) with no pooling."""
        if self.pool_type == "":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x.mean((2, 3)) if self.pool_type == "avg" else x.amax((2, 3))
        x = self.drop(self.norm(x))
        return x if pre_logits else self.fc(x)


class ConvNext(ConvNextSwitches):
    """ConvNeXt ("A ConvNet for the 2020s") or ConvNeXt V2, with timm's methods and parameter names.

    Args:
        variant_or_config: a name from ``config.VARIANTS``, or a `ConvNextConfig` (for V2 a `ConvNextV2Config`).
        fused: run the fused ops; False runs plain eager PyTorch. Assign ``model.fused`` to switch.
        num_classes: 0 for no classifier. Default: 1000 for a variant, else the configuration's ``num_labels``.
        in_chans, drop_path_rate: default to the configuration's.
        drop_rate: dropout before the classifier.
        global_pool: "avg", "max", or "" to return the normalised feature map (with ``num_classes=0``).
        head_norm_first: normalise the feature map before pooling instead of the pooled features.
        features_only: return a list of feature maps instead of logits: those of the stages ``out_indices`` (0 to 3),
            in stage order. The model has no stages after the last one chosen.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    checkpoint_format = "timm"

    def __init__(
        self,
        variant_or_config: str | ConvNextConfig = "tiny",
        *,
        fused: bool = True,
        num_classes: int | None = None,
        in_chans: int | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        head_norm_first: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        config = self.config = _configuration(variant_or_config, num_classes, in_chans, drop_path_rate)
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate is {drop_rate}: expected a number in [0, 1)")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = config.num_labels
        self.num_features = self.head_hidden_size = config.hidden_sizes[-1]
        widths, eps = config.hidden_sizes, config.norm_eps
        self.stem = Stem(config.num_channels, widths[0], config.patch_shape, eps, fused, **factory)
        self.stages = nn.Sequential()
        for i, rates in enumerate(config.drop_path_rates):
            shrink = Downsample(widths[i - 1], widths[i], eps, fused, **factory) if i else nn.Identity()
            blocks = [
                ConvNextBlock(
                    widths[i],
                    act=config.activation,
                    layer_scale=config.layer_scale_init_value,
                    drop_path=rate,
                    eps=eps,
                    grn=config.version == 2,
                    fused=fused,
                    **factory,
                )
                for rate in rates
            ]
            self.stages.append(ConvNextStage(shrink, blocks, fused))
        stride = max(config.patch_shape)
        self.feature_info = FeatureInfo(
            {"num_chs": width, "reduction": stride << i, "module": f"stages.{i}"} for i, width in enumerate(widths)
        )
        self.features_only = features_only
        if features_only:
            self.out_indices = self._stage_indices(out_indices)
            self._remove_stages_from(max(self.out_indices) + 1)
            self.feature_info = FeatureInfo(self.feature_info[i] for i in self.out_indices)
        elif out_indices is not None:
            raise ValueError("out_indices chooses the maps of features_only=True: expected None without it")
        else:
            kind = LayerNorm2d if head_norm_first else nn.LayerNorm
            norm = kind(widths[-1], eps=config.layer_norm_eps, **factory)
            self.norm_pre, inner = (norm, nn.Identity()) if head_norm_first else (nn.Identity(), norm)
            self.head = Head(inner, widths[-1], self.num_classes, global_pool, drop_rate, **factory)
        init_weights(self, config.initializer_range)

    def _remove_stages_from(self, count: int) -> None:
        """Remove the stages from ``count`` on, in the configuration too."""
        del self.stages[count:]
        self.config = self.config.amended(
            num_stages=count,
            hidden_sizes=self.config.hidden_sizes[:count],
            depths=self.config.depths[:count],
            drop_path_rate=max((block.drop_path.rate for block in self.blocks()), default=0.0),
            out_features=[f"stage{i + 1}" for i in self.out_indices],
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) to the last feature map (N, C, H', W')."""
        check_image(x, self.config, "x")
        maps = self.run_whole((self.stem, self.stages), x, last=True)
        return self._final_norm(self.stages(self.stem(x)) if maps is None else maps[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last feature map to logits (N, num_classes), or to the pooled features (N, C) before the classifier."""
        self._require_head("forward_head")
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """Image (N, in_chans, H, W) to logits (N, num_classes); to a list of feature maps with ``features_only``."""
        if self.features_only:
            return self.forward_intermediates(x, self.out_indices, intermediates_only=True, stop_early=True)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The feature maps of the stages.

        Args:
            x: image (N, in_chans, H, W).
            indices: stages to return, by index; an int n means the last n; None means all.
            norm: apply the norm before pooling, if the model has one, to the last map.
            stop_early: do not run the stages after the last one requested.
            output_fmt: "NCHW" or "NHWC", the shape of the maps.
            intermediates_only: return only the list of maps; otherwise a pair: the last feature map, and the list.
        """
        check_image(x, self.config, "x")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW' or 'NHWC'")
        wanted = self._stage_indices(indices)
        last = len(self.stages) - 1
        run = max(wanted) + 1 if stop_early else last + 1
        layers = self.stem, *islice(self.stages, run)
        results = self.run_whole(layers, x) or outputs_in_turn(layers, x)
        maps = []
        for i, y in enumerate(results[1:]):
            if i in wanted:
                y = self._final_norm(y) if norm and i == last else y
                maps.append(y if output_fmt == "NCHW" else y.permute(0, 2, 3, 1))
        if intermediates_only:
            return maps
        return (self._final_norm(results[-1]) if run > last else results[-1]), maps

    def get_classifier(self) -> nn.Module:
        """The classifier: `torch.nn.Linear`, or Identity without classes."""
        self._require_head("get_classifier")
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or by none for 0; ``global_pool`` None keeps the pooling."""
        self._require_head("reset_classifier")
        pool = _check_pool(self.head.pool_type if global_pool is None else global_pool, num_classes)
        self.config = self.config.amended(num_labels=num_classes)
        self.num_classes = num_classes
        self.head.pool_type = pool
        like = self.stem[1].weight
        factory = {"device": like.device, "dtype": like.dtype}
        self.head.fc = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
        init_weights(self.head.fc, self.config.initializer_range)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute whole blocks in the backward pass (`torch.utils.checkpoint`); ``recompute`` is cheaper."""
        for stage in self.stages:
            stage.checkpointing = {"use_reentrant": False} if enable else None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into layer groups, for layer-wise learning-rate decay."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_pre", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: biases, norms and layer scales."""
        return {name for name, parameter in self.named_parameters() if parameter.dim() < 2}

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> ConvNext:
        """A model with the weights of a folder, file or hub id; see `load_model`."""
        return load_model(cls, source, **options)

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write ``config.json`` and ``model.safetensors``, by default in timm's format; see `save_model`."""
        save_model(self, directory, **options)

    def extra_repr(self) -> str:
        """The run-time switches, for `repr`."""
        return f"fused={self.fused}, recompute={self.recompute}"

    def _final_norm(self, x: Tensor) -> Tensor:
        return x if self.features_only else self.norm_pre(x)

    def _require_head(self, method: str) -> None:
        if self.features_only:
            raise ValueError(f"{method}() needs a head: this model was built with features_only=True")

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices is {indices}: expected 1 to {count} last stages, or a list of indices")
            return list(range(count - indices, count))
        chosen = [i + count if i < 0 else i for i in indices]
        if not chosen or any(not 0 <= i < count for i in chosen):
            raise ValueError(f"indices is {list(indices)}: expected stage indices from 0 to {count - 1}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"indices is {list(indices)}: expected each stage once")
        return sorted(chosen)


def _check_pool(pool: str, num_classes: int) -> str:
    if pool not in POOLS:
        raise ValueError(f"global_pool is {pool!r}: expected one of {POOLS}")
    if pool == "" and num_classes:
        raise ValueError(f"global_pool '' returns a feature map: expected num_classes=0, not {num_classes}")
    return pool


def _configuration(
    source: str | ConvNextConfig, num_classes: int | None, in_chans: int | None, drop_path_rate: float | None
) -> ConvNextConfig:
    """The configuration with the constructor's overrides."""
    if isinstance(source, str):
        config = ConvNextConfig.from_variant(source, num_labels=1000)
    elif isinstance(source, ConvNextConfig):
        config = source
    else:
        raise TypeError(f"expected the name of a variant or a ConvNextConfig, not a {type(source).__name__}")
    changes: dict[str, Any] = {"num_channels": in_chans, "drop_path_rate": drop_path_rate}
    if num_classes != config.num_labels:
        changes["num_labels"] = num_classes
    return config.amended(**{name: value for name, value in changes.items() if value is not None})
