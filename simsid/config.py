"""The choices that make a model and its training, and the published presets."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from simsid.errors import ConfigError
from simsid.fields import check_fields, from_dict, replaced, require

WIDEST = 16
"""The deepest feature map has at most this many times `width` channels."""
PAPERS_SCORE = "discriminator_per_image"
"""The signal that both papers evaluate: the logit of the discriminator on the reconstruction."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a model's shape, its look-ups and how images are prepared for it.

    Source: SimSID (arXiv 2403.08689), section 3 and table II; SQUID (arXiv 2111.13495), section 3 and table 2.
    """

    image_size: int = 128
    """Height and width of the square image the model sees, pixels."""
    patches: int = 4
    """Patches along one side, P; the image has P * P locations."""
    width: int = 32
    """Channels of the first feature map; the deepest has 16 times as many."""
    discriminator_width: int = 16
    """Channels of the discriminator's first feature map; each of the four further ones has twice as many."""
    levels: int = 4
    """Encoder blocks of stride 2, and up blocks of each generator."""
    skip_levels: int = 2
    """Deepest up blocks with a skip connection; more would let the image bypass the memories."""
    merge_levels: int = 2
    """Last up blocks, which work on the map of the whole image, after the patches are merged."""
    items: int = 100
    """Items a location has in the in-painting block's memory, N."""
    decoder_items: int = 100
    """Items a location has in each decoder memory."""
    decoder_memories: int = 2
    """Up blocks of the student that are followed by a memory, counted from the deepest."""
    topk: int = 5
    """Items the shrinkage keeps, k."""
    threshold: Literal["inclusive", "exclusive"] = "inclusive"
    """Keep the k most probable items (the papers), or those strictly above the k-th (the released code)."""
    shrinkage: Literal["topk", "hard", "none"] = "topk"
    """Gumbel top-k; a fixed threshold on the probability (MemAE); or every item by its probability."""
    hard_threshold: float = 0.01
    """Probability below which `shrinkage="hard"` drops an item; useful between 1 / items and 3 / items."""
    gumbel_noise: bool = False
    """Add Gumbel noise to the similarities in training, which makes the selection a sample."""
    temperature: float = 1.0
    """Divides the similarities."""
    space_aware: bool = True
    """One set of items for each location; else one set that every location queries."""
    memory: Literal["matrix", "queue"] = "matrix"
    """The in-painting block's memory: learned items (SimSID) or the latest real features (SQUID)."""
    decoder_memory: Literal["patch", "subpatch"] = "patch"
    """Decoder memories by patch location (the papers) or by quarter of each patch (the released code)."""
    inpainting: Literal["attention", "convolution", "memory", "none"] = "attention"
    """How neighbors restore a patch: by attention, a 3x3 convolution, not at all (memory only), or no block."""
    pixel_inpainting: float = 0.0
    """Fraction of the input patches zeroed in training."""
    border: Literal["zero", "mask"] = "zero"
    """A neighbor outside the grid takes part as a zero feature (the released code), or not at all."""
    heads: int = 8
    """Heads of the neighbor attention."""
    dropout: float = 0.0
    """Dropout rate of the in-painting block's feed-forward part."""
    rho: float = 1.0
    """Probability that a feature position keeps the in-painting block's output in training; SQUID: 0.95."""
    distillation: bool = True
    """Train a teacher generator and pull the student's features towards its own."""
    adversarial: bool = True
    """Train the generator against the discriminator too; else the discriminator is trained, and moves nothing."""
    variational: bool = False
    """Draw the deepest features from a normal distribution, as a variational autoencoder; without in-painting only."""
    stop_gradient: bool = True
    """Keep the teacher's gradient out of the encoder."""
    signal: str = "standardized_residual"
    """The anomaly signal that `score` and thresholds use, a name of `simsid.models.signals.SIGNALS`. The papers use
    `discriminator_per_image`; after short trainings of small networks the default detects far better
    (docs/results.md)."""
    aspect: Literal["stretch", "pad", "crop"] = "stretch"
    """How an image that is not square becomes square; the papers stretch it."""
    intensity: Literal["auto", "range", "minmax"] = "auto"
    """How stored pixel values become -1..1; see `simsid.data.Preprocessing`."""

    def __post_init__(self) -> None:
        """Refuse a configuration that cannot be built, naming the field."""
        # At 32 pixels and fewer the discriminator's last map is one position, which has no variance.
        at_least = {"image_size": 33, "patches": 1, "width": 1, "levels": 1, "skip_levels": 0, "merge_levels": 0}
        at_least |= {"items": 1, "decoder_items": 1, "decoder_memories": 0, "topk": 1, "heads": 1}
        at_least["discriminator_width"] = 1
        check_fields(self, at_least)
        for name in ("skip_levels", "merge_levels", "decoder_memories"):
            require(getattr(self, name) <= self.levels, name, f"at most levels = {self.levels}", getattr(self, name))
        require(0 < self.temperature < math.inf, "temperature", "a positive number", self.temperature)
        for name in ("rho", "pixel_inpainting", "hard_threshold"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        if self.variational:
            require(self.inpainting == "none", "inpainting", "'none' in a variational autoencoder", self.inpainting)
        step = self.patches * 2**self.levels
        require(
            self.image_size % step == 0,
            "image_size",
            f"a multiple of patches * 2**levels = {step}, so that every patch can be halved {self.levels} times",
            self.image_size,
        )
        if self.inpainting != "none" or self.variational:
            require(
                self.deepest_channels % 4 == 0,
                "width",
                f"such that the deepest channels ({self.deepest_channels}) divide by 4",
                self.width,
            )
        if self.inpainting == "attention":
            require(
                self.bottleneck_features % self.heads == 0,
                "heads",
                f"a divisor of the {self.bottleneck_features} bottleneck features",
                self.heads,
            )

    @property
    def locations(self) -> int:
        """L, patches of an image."""
        return self.patches**2

    @property
    def patch_size(self) -> int:
        """S, pixels along a patch's side."""
        return self.image_size // self.patches

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of skip 0, 1, …, levels - 1 and of the deepest feature map."""
        return tuple(self.width * min(2**level, WIDEST) for level in range(self.levels + 1))

    @property
    def deepest_channels(self) -> int:
        """C, channels of the deepest feature map."""
        return self.channels[-1]

    @property
    def bottleneck_features(self) -> int:
        """D of the in-painting block: C/4 channels times the positions of a patch's deepest map."""
        return self.deepest_channels // 4 * (self.patch_size // 2**self.levels) ** 2

    def replace(self, **changes: object) -> "Config":
        """Return a copy with `changes`; an unknown field is an error that lists the known ones."""
        return replaced(self, changes)

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "Config":
        """Rebuild a configuration from `to_dict`; absent fields keep their defaults, unknown ones are an error."""
        return from_dict(cls, values)

    @classmethod
    def simsid(cls, **changes: object) -> "Config":
        """SimSID: 4 x 4 patches, learned items, attention, two decoder memories."""
        return cls().replace(**changes)

    @classmethod
    def squid(cls, **changes: object) -> "Config":
        """SQUID: 2 x 2 patches, 200 items a region, memory queue, masked shortcut with rho = 0.95."""
        return cls(patches=2, items=200, decoder_items=200, memory="queue", rho=0.95).replace(**changes)

    @classmethod
    def digit_anatomy(cls, **changes: object) -> "Config":
        """DigitAnatomy at a laptop's size: 96 pixels, 3 x 3 patches, 3 levels, width 8, scored by focal residual.

        Two items a look-up: where grids are augmented, the network learns to mix a blank cell of five, so that missing
        digits go unnoticed. The temperature keeps more items in use, which a short training at a high learning rate
        otherwise abandons. The discriminator is as narrow as the generators: at its usual width it takes a fifth of the
        training.
        """
        base = cls(image_size=96, patches=3, levels=3, width=8, discriminator_width=4, topk=2, temperature=8.0)
        return base.replace(signal="focal_residual").replace(**changes)

    @classmethod
    def memae(cls, **changes: object) -> "Config":
        """MemAE (arXiv 1904.02639) in this network: one shared memory with hard shrinkage, no skips, no teacher."""
        base = cls(
            space_aware=False,
            shrinkage="hard",
            inpainting="memory",
            decoder_memories=0,
            skip_levels=0,
            distillation=False,
            adversarial=False,
            signal="residual",
        )
        return base.replace(**changes)

    @classmethod
    def autoencoder(cls, **changes: object) -> "Config":
        """The plain autoencoder with the same encoder and decoder: no memory, no in-painting, no skips, no teacher."""
        plain: dict[str, Any] = {"decoder_memories": 0, "skip_levels": 0, "distillation": False, "adversarial": False}
        return cls(inpainting="none", signal="residual", **plain).replace(**changes)

    @classmethod
    def vae(cls, **changes: object) -> "Config":
        """The variational autoencoder (arXiv 1312.6114): the plain one with deepest features drawn at random."""
        return cls.autoencoder(variational=True).replace(**changes)

    @classmethod
    def ablation(cls, name: str, **changes: object) -> "Config":
        """Return the component study's configuration `name`: one part of SimSID (or SQUID) taken away or exchanged.

        Source: SimSID, table II; SQUID, table 2. The names are `no_space_aware`, `no_skip`, `no_inpainting`,
        `no_hierarchical_memory`, `no_distillation`, `no_stop_gradient`, `no_shrinkage`, `memory_queue`,
        `conv_inpainting`, `pixel_inpainting` and `no_masked_shortcut`.
        """
        if name not in ABLATIONS:
            raise ConfigError(f"ablation must be one of {', '.join(ABLATIONS)}, got {name!r}")
        preset, taken = ABLATIONS[name]
        return preset(**taken).replace(**changes)


ABLATIONS: dict[str, tuple[Callable[..., Config], dict[str, object]]] = {
    "no_space_aware": (Config.simsid, {"space_aware": False}),
    "no_skip": (Config.simsid, {"skip_levels": 0}),
    "no_inpainting": (Config.simsid, {"inpainting": "none"}),
    "no_hierarchical_memory": (Config.simsid, {"decoder_memories": 0}),
    "no_distillation": (Config.simsid, {"distillation": False}),
    "no_stop_gradient": (Config.simsid, {"stop_gradient": False}),
    "no_shrinkage": (Config.simsid, {"shrinkage": "none"}),
    "memory_queue": (Config.simsid, {"memory": "queue"}),
    "conv_inpainting": (Config.simsid, {"inpainting": "convolution"}),
    "pixel_inpainting": (Config.simsid, {"inpainting": "none", "pixel_inpainting": 0.25}),
    "no_masked_shortcut": (Config.squid, {"rho": 1.0}),
}

PRESETS: dict[str, Callable[..., Config]] = {
    "simsid": Config.simsid,
    "squid": Config.squid,
    "digit_anatomy": Config.digit_anatomy,
    "memae": Config.memae,
    "autoencoder": Config.autoencoder,
    "vae": Config.vae,
}


ConfigName = Literal[tuple(ABLATIONS)]  # type: ignore[valid-type]
PresetName = Literal[
    "simsid",
    "squid",
    "digit_anatomy",
    "memae",
    "autoencoder",
    "vae",
    "features",
    "feature_knn",
    "location_knn",
    "padim",
    "patchcore",
    "pixel_knn",
    "pixel_pca",
    "pixel_isolation_forest",
]
"""Names of `simsid.models.presets.PRESETS`, which a test compares; here, since that module needs PyTorch."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. Source: SimSID, section 4.2; SQUID, section 4 (implementation details)."""

    epochs: int = 200
    """Passes over the training images; also the length of the cosine schedule."""
    batch_size: int = 16
    """Images of an iteration, of all processes together; images that do not fill a batch are left out of an epoch."""
    learning_rate: float = 1e-4
    """Adam's learning rate in the first epoch, both sides."""
    final_learning_rate: float = 2e-5
    """Where the cosine schedule ends."""
    generator_every: int = 2
    """The generator is updated at iterations 0, n, 2n, …; the discriminator at every one."""
    teacher_weight: float = 0.01
    """Weight of the teacher's reconstruction error in the generator's loss."""
    student_weight: float = 10.0
    """Weight of the student's reconstruction error."""
    distillation_weight: float = 0.001
    """Weight of the distance between the student's and the teacher's features."""
    adversarial_weight: float = 0.005
    """Weight of the adversarial loss, by which the generator is trained to look real to the discriminator."""
    divergence_weight: float = 0.1
    """Weight of a variational autoencoder's divergence from the standard normal distribution, in nats a pixel."""
    discriminator_weight: float = 0.005
    """Weight of the discriminator's loss."""
    generator_weight_decay: float = 1e-5
    """Weight decay of encoder, student and teacher."""
    decay: Literal["coupled", "except_items", "decoupled"] = "coupled"
    """How those weights decay: by a term of the gradient, which Adam scales to full steps where there is no other
    gradient (the papers); likewise, but never the memory items; or apart from the gradient, as AdamW does."""
    translate: float = 0.05
    """Augmentation: largest translation, as a fraction of the side."""
    scale: float = 0.05
    """Augmentation: largest relative change of scale."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of convolutions and products. `"bfloat16"` is autocast; `"auto"` is bfloat16 on a CPU with
    instructions for it, else float32. Validation and calibration have a precision of their own, that of scores."""
    cuda_graph: bool = True
    """On one GPU, capture the iterations as CUDA graphs and replay them; otherwise launch every kernel by itself."""
    compile: bool = False
    """Compile the networks with `torch.compile`, which takes minutes before the first iteration."""
    sync_batchnorm: bool = False
    """With several processes, normalize with the global batch's statistics; otherwise with each shard's own."""
    criterion: Literal["auto", "auc", "reconstruction", "memory_distance", "synthetic", "last"] = "auto"
    """What chooses the epoch that is kept: validation AUC of the model's signal (the papers; needs labeled anomalies);
    of held-out normal images alone, reconstruction error, memory distance, or AUC of the signal against copies with a
    pasted patch; or the last. `"auto"`: AUC where validation has anomalies, else `"reconstruction"`."""
    patience: int = 0
    """Stop after this many epochs without a better criterion; 0 never."""
    seed: int = 0
    """Seed of everything drawn in training."""
    checkpoint_seconds: float = 30.0
    """Age of the written training state, in seconds, at which a new one is written; 0: every iteration."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with."""
        check_fields(self, {"epochs": 1, "batch_size": 1, "generator_every": 1, "patience": 0, "seed": 0})
        for name in (entry.name for entry in dataclasses.fields(self) if entry.name.endswith("_weight")):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        for name in ("learning_rate", "final_learning_rate", "generator_weight_decay", "checkpoint_seconds"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        for name in ("translate", "scale"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "TrainingConfig":
        """Rebuild a configuration from `to_dict`; absent fields keep their defaults, unknown ones are an error."""
        return from_dict(cls, values)
