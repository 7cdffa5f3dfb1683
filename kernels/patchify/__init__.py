"""The stem and the downsampling layer: convolutions of non-overlapping patches, with their LayerNorm."""

from .bwd import downsample_bwd as downsample_bwd
from .bwd import stem_bwd as stem_bwd
from .fwd import downsample_fwd as downsample_fwd
from .fwd import fold_downsample as fold_downsample
from .fwd import stem_fwd as stem_fwd
