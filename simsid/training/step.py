"""One iteration of training: both updates on the model's device, with nothing read back before it is asked for."""

import warnings

import numpy as np
import torch
from torch import Tensor

from simsid import cuda_graph
from simsid.config import TrainingConfig
from simsid.data import augment
from simsid.distributed import ProcessGroup
from simsid.errors import NonFiniteError
from simsid.kernels.ranges import stage
from simsid.models.losses import adversarial_loss, reconstruction_loss
from simsid.models.model import Model, Reconstruction
from simsid.training.parallel import DiscriminatorPair, data_parallel, synchronize_batch_norms

LOSSES = ("real", "fake", "student", "generator", "teacher", "distillation")
"""Every loss by name: the discriminator's first, which every iteration has, then the generator's."""

ALONE, DISCRIMINATOR, GENERATOR = range(3)
"""The updates that can find something not finite: the discriminator's in an iteration that leaves the generator alone,
in one that trains both, and the generator's."""


class TrainingStep:
    """Updates a model, an iteration a call, without waiting for the device.

    Every iteration updates the discriminator (real, then fake, each normalised with its own batch); every
    `generator_every`-th then updates the generator on the same reconstruction. What is drawn in an iteration comes from
    its number and `config.seed` alone. Source: SimSID, section 3.5 and 4.2.

    The losses are summed where they arise and read by `means`. A loss or gradient that is not finite stops all updates
    from there on, on the device; `check` (on a CPU every call) raises it. On a GPU the two kinds of iteration are
    recorded once each as a CUDA graph and replayed (`config.cuda_graph`).

    Args:
        model: trained in place, on the device it is on; its convolutions are laid out channels-last.
        config: a `TrainingConfig`; None is the papers'.
        group: the processes that train together, each on its share of every batch: gradients are averaged
            (`DistributedDataParallel`), the queue takes all queries in rank order. Their iterations run eagerly.
    """

    def __init__(self, model: Model, config: TrainingConfig | None = None, group: ProcessGroup | None = None) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.config = config = config or TrainingConfig()
        self.group = group = group or ProcessGroup()
        self.device = model.device
        synchronize_batch_norms(model, config.sync_batchnorm and group.size > 1)
        self.optimizers = _optimizers(model, config)
        self.counts: dict[str, int] = {}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._generate, self._judge, self._fool = model, DiscriminatorPair(model.discriminator), model.discriminator
        if group.size > 1:
            self._generate, self._judge = data_parallel(model)
        if config.compile:
            calls = (self._generate, self._judge, self._fool)
            self._generate, self._judge, self._fool = (torch.compile(call, dynamic=False) for call in calls)
        self._sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=self.device)
        # What was not finite first: a flag that Adam's kernel reads, the iteration, the update, and what it looked at.
        self._bad = torch.zeros((), device=self.device)
        self._number, self._bad_number, self._bad_update = torch.zeros(3, dtype=torch.int64, device=self.device)
        self._bad_values = torch.zeros(len(LOSSES) + 1 + len(self._names), device=self.device)
        self._checked: dict[int, list[str]] = {}
        self._replays: dict[bool, cuda_graph.CapturedGraph] = {}
        self._record = config.cuda_graph and self.device.type == "cuda" and group.size == 1

    def __call__(self, images: Tensor, number: int) -> None:
        """Run iteration `number` on `[B, 1, H, W]` images in -1..1, this process's share, not yet augmented."""
        config, group = self.config, self.group
        seed_generators(_seed(config.seed, 2, number), self.device)
        with stage("augmentation"):
            draws = None
            if group.size > 1:
                draws = group.shard(torch.rand(len(images) * group.size, 3))
                seed_generators(_seed(config.seed, 2, number, group.rank), self.device)
            images = augment(images, translate=config.translate, scale=config.scale, draws=draws)
            images = images.contiguous(memory_format=torch.channels_last)
        with_generator = number % config.generator_every == 0
        self._number.fill_(number)
        with stage("iteration of both" if with_generator else "iteration of the discriminator"):
            self._run(images, with_generator)
        for name in self._trained(with_generator):
            self.counts[name] = self.counts.get(name, 0) + 1
        if self.device.type == "cpu":
            self.check()

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of both optimisers."""
        for optimizer in self.optimizers.values():
            group = optimizer.param_groups[0]
            if isinstance(group["lr"], Tensor):
                # In place: a recorded step reads it from where it is.
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def means(self) -> dict[str, float]:
        """Return each loss, unweighted, averaged over the iterations since the last `reset`; waits for the device."""
        return {name: total / self.counts[name] for name, total in self.sums().items()}

    def sums(self) -> dict[str, float]:
        """Return the sum of each loss over `counts[name]` iterations; waits for the device."""
        self.check()
        return {name: total for name, total in zip(LOSSES, self._sums.tolist()) if name in self.counts}

    def reset(self, sums: dict[str, float] | None = None, counts: dict[str, int] | None = None) -> None:
        """Begin the sums anew, or go on from those of an earlier `sums` and `counts`."""
        self.counts = dict(counts or {})
        self._sums.copy_(torch.tensor([(sums or {}).get(name, 0.0) for name in LOSSES], dtype=torch.float64))

    def check(self) -> None:
        """Wait for the device and raise what was not finite.

        Raises:
            NonFiniteError: naming the iteration, and the loss or the weights whose gradient it was.
        """
        if not self._bad.item():
            return
        update = int(self._bad_update)
        names = self._checked[update]
        values = dict(zip(names, self._bad_values.tolist()))
        name = next(name for name, value in values.items() if not np.isfinite(value))
        found = f"{name} is not finite" if name.startswith("gradient of") else f"{name} is {values[name]}"
        raise NonFiniteError(f"step {int(self._bad_number)}: the {found}; nothing was updated with it")

    def _trained(self, with_generator: bool) -> tuple[str, ...]:
        """Return the losses of an iteration, the first few of `LOSSES`."""
        if not with_generator:
            return LOSSES[:2]
        return LOSSES if self.model.teacher is not None else LOSSES[:4]

    def _run(self, images: Tensor, with_generator: bool) -> None:
        if not self._record:
            self._iterate(images, with_generator)
            return
        replay = self._replays.get(with_generator)
        if replay is None or replay.inputs[0].shape != images.shape:
            replay = self._recorded(images, with_generator)
        if replay is None:
            self._iterate(images, with_generator)
        else:
            replay(images)

    def _recorded(self, images: Tensor, with_generator: bool) -> "cuda_graph.CapturedGraph | None":
        """Record an iteration; whatever the rehearsals changed is put back."""
        # On the host: on the GPU, weights and moments once more would be the peak of its memory.
        before = {id(tensor): tensor.to("cpu", copy=True) for tensor in self._state()}
        try:
            # The random numbers that the rehearsals draw are put back too.
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                replay = cuda_graph.capture(
                    lambda inputs: self._iterate(inputs, with_generator),
                    [images],
                    after_warmup=lambda: self._put_back(before),
                    share_memory_with=next(iter(self._replays.values()), None),
                )
        except RuntimeError as error:
            warnings.warn(f"the step could not be recorded as a CUDA graph and runs eagerly: {error}", stacklevel=2)
            self._put_back(before)
            self._record = False
            return None
        self._replays[with_generator] = replay
        return replay

    def _state(self) -> list[Tensor]:
        """Return every tensor that an iteration changes."""
        own = [self._sums, self._bad, self._bad_number, self._bad_update, self._bad_values]
        moments = [
            tensor
            for optimizer in self.optimizers.values()
            for state in optimizer.state.values()
            for tensor in state.values()
        ]
        return [*self.model.parameters(), *self.model.buffers(), *moments, *own]

    @torch.no_grad()
    def _put_back(self, before: dict[int, Tensor]) -> None:
        for tensor in self._state():
            # What the optimisers made in the rehearsal starts at zero.
            if id(tensor) in before:
                tensor.copy_(before[id(tensor)])
            else:
                tensor.zero_()
        # Their memory, as much as the weights', would lie beside the recording's own.
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _iterate(self, images: Tensor, with_generator: bool) -> None:
        config, model = self.config, self.model
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
        with autocast:
            found = self._reconstruct(images, with_generator)
            terms = self._generator_terms(images, found) if with_generator else {}
            with stage("discriminator"):
                real, fake = self._judge(images, found.student.detach())
            losses = {"real": adversarial_loss(real, real=True), "fake": adversarial_loss(fake, real=False)}
        total = config.discriminator_weight * (losses["real"] + losses["fake"])
        # The generator's terms too: otherwise the discriminator would be updated before a bad one stops the training.
        self._update("discriminator", total, {**terms, **losses}, DISCRIMINATOR if with_generator else ALONE)

        if with_generator:
            # Frozen, so that the generator's backward pass computes no gradients of its weights.
            model.discriminator.requires_grad_(False)
            try:
                with autocast, stage("discriminator"):
                    terms["generator"] = adversarial_loss(self._fool(found.student), real=True)
                weighted = [getattr(config, f"{name}_weight") * term for name, term in terms.items()]
                self._update("generator", torch.stack(weighted).sum(), terms, GENERATOR)
            finally:
                model.discriminator.requires_grad_(True)
            losses |= terms
            if model.queue is not None:
                model.queue.push(self.group.gather(found.query.detach()), unless=self._bad.bool())
        names = self._trained(with_generator)
        values = torch.stack([losses[name].detach() for name in names]).double()
        self._sums[: len(names)] += self.group.mean(values)

    def _reconstruct(self, images: Tensor, with_generator: bool) -> Reconstruction:
        with torch.set_grad_enabled(with_generator):
            return self._generate(images, teacher=with_generator and self.model.teacher is not None)

    def _generator_terms(self, images: Tensor, found: Reconstruction) -> dict[str, Tensor]:
        with stage("losses"):
            terms = {"student": reconstruction_loss(images, found.student)}
            if found.teacher is not None:
                terms["teacher"] = reconstruction_loss(images, found.teacher)
                terms["distillation"] = found.distillation
            return terms

    def _update(self, side: str, total: Tensor, losses: dict[str, Tensor], update: int) -> None:
        """Apply one optimiser step, unless a loss or a gradient, of this or any earlier update, is not finite."""
        optimizer = self.optimizers[side]
        optimizer.zero_grad(set_to_none=True)
        with stage(f"{side} backward"):
            total.backward()
        with stage(f"{side} optimizer"):
            self._guard({**losses, f"weighted {side}": total}, optimizer.param_groups[0]["params"], update)
            optimizer.found_inf = self._bad
            optimizer.step()

    @torch.no_grad()
    def _guard(self, losses: dict[str, Tensor], parameters: list[Tensor], update: int) -> None:
        """Note on the device whether something is not finite; the first find stays."""
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm([parameter.grad for parameter in parameters])
        # Of the whole group, as the gradients are: all members stop at once, and for one reason.
        means = self.group.mean(torch.stack([loss.detach().float() for loss in losses.values()]))
        values = torch.cat([means, torch.stack(norms)])
        bad = ~values.isfinite().all()
        first = bad & (self._bad == 0)
        kept = self._bad_values[: len(values)]
        kept.copy_(torch.where(first, values, kept))
        self._bad_number.copy_(torch.where(first, self._number, self._bad_number))
        self._bad_update.masked_fill_(first, update)
        self._bad.masked_fill_(bad, 1.0)
        if update not in self._checked:
            self._checked[update] = [f"{name} loss" for name in losses]
            self._checked[update] += [f"gradient of {self._names[parameter]}" for parameter in parameters]


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and the device's own; `torch.manual_seed` would touch every other GPU's too."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _optimizers(model: Model, config: TrainingConfig) -> dict[str, torch.optim.Adam]:
    sides: dict[str, list[Tensor]] = {"generator": [], "discriminator": []}
    for name, parameter in model.named_parameters():
        sides["discriminator" if name.startswith("discriminator.") else "generator"].append(parameter)
    on_cuda = model.device.type == "cuda"
    options = {"betas": (0.5, 0.999), "fused": True, "capturable": on_cuda}

    def rate() -> float | Tensor:
        return torch.tensor(config.learning_rate, device=model.device) if on_cuda else config.learning_rate

    decay = config.generator_weight_decay
    return {
        "generator": torch.optim.Adam(sides["generator"], lr=rate(), eps=1e-7, weight_decay=decay, **options),
        "discriminator": torch.optim.Adam(sides["discriminator"], lr=rate(), eps=1e-8, **options),
    }
