"""One iteration of training: the discriminator's update and the generator's, on the model's device."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsid import cuda_graph
from simsid.config import TrainingConfig
from simsid.data import augment
from simsid.distributed import ProcessGroup
from simsid.errors import DeviceMemoryError
from simsid.kernels.ranges import stage
from simsid.models.losses import adversarial_loss, reconstruction_loss
from simsid.models.model import Model, Reconstruction
from simsid.precision import choose_precision
from simsid.training.guard import NonFiniteGuard
from simsid.training.parallel import DiscriminatorPair, data_parallel, synchronize_batch_norms

LOSSES = ("real", "fake", "student", "adversarial", "teacher", "distillation", "divergence")
"""Every loss by name: the discriminator's two, which every iteration has, then the generator's; no model has all."""

ITERATION_STREAM = 2
"""Keeps what an iteration draws apart from the order of the images, which uses the stream 1 of the same seed."""


class TrainingStep:
    """Updates a model, one iteration per call, without waiting for the device.

    Every iteration updates the discriminator (real, then fake, each normalized with its own batch); every
    `generator_every`-th then updates encoder, student and teacher ("the generator") on the same reconstruction. All
    random numbers of an iteration derive from its number and `config.seed`. Source: SimSID, sections 3.5 and 4.2.

    The losses are summed on the device and read by `means`. A loss or gradient that is not finite blocks all updates
    from there on; `check` raises it (on a CPU after every call). On a GPU each of the two kinds of iteration is
    captured once as a CUDA graph and replayed (`config.cuda_graph`).

    Args:
        model: trained in place, on its device; its convolutions are converted to channels-last.
        config: a `TrainingConfig`; None is the papers'.
        group: the ranks that train together, each on its shard of every batch: gradients are averaged
            (`DistributedDataParallel`), and the queue receives the queries of all ranks in rank order. Their iterations
            are not captured.
    """

    def __init__(self, model: Model, config: TrainingConfig | None = None, group: ProcessGroup | None = None) -> None:
        self.model = model
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = config = with_chosen_precision(config or TrainingConfig(), model)
        self.group = group = group or ProcessGroup()
        self.device = model.device
        synchronize_batch_norms(model, config.sync_batchnorm and group.size > 1)
        self.optimizers = _optimizers(model, config)
        self.counts: dict[str, int] = {}
        self.guard = NonFiniteGuard(dict(model.named_parameters()), len(LOSSES) + 1, group)
        self._sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=self.device)
        # Forward passes: the model's, the discriminator's on a real and a fake batch, and its own on one batch.
        self._reconstruct: Callable[..., Reconstruction] = model
        self._discriminate: Callable[..., tuple[Tensor, Tensor]] = DiscriminatorPair(model.discriminator)
        self._logits: Callable[..., Tensor] = model.discriminator
        if group.size > 1:
            self._reconstruct, self._discriminate = data_parallel(model)
        if config.compile:
            self._reconstruct = torch.compile(self._reconstruct, dynamic=False)
            self._discriminate = torch.compile(self._discriminate, dynamic=False)
            self._logits = torch.compile(self._logits, dynamic=False)
        self._graphs: dict[bool, cuda_graph.CapturedGraph] = {}
        self._use_graph = config.cuda_graph and self.device.type == "cuda" and group.size == 1

    def __call__(self, images: Tensor, number: int) -> None:
        """Run iteration `number` on this rank's shard of a batch: `[B, 1, H, W]` in -1..1, not yet augmented.

        Raises:
            DeviceMemoryError: the GPU has too little memory for the batch.
            NonFiniteError: on a CPU, where a loss or a gradient is not finite.
        """
        try:
            self._run(images, number)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device} ran out of memory in an iteration of {len(images)} images, {images.shape[2]} x "
                f"{images.shape[3]} pixels; choose a batch_size below {self.config.batch_size}, "
                f'precision="bfloat16", or a device with more free memory'
            ) from error
        if self.device.type == "cpu":
            self.check()

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of both optimizers."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    # In place: a captured iteration reads it from this address.
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

    def reset(self, sums: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None) -> None:
        """Set the sums and counts to zero, or to those that an earlier `sums` and `counts` returned."""
        self.counts = dict(counts or {})
        self._sums.copy_(torch.tensor([(sums or {}).get(name, 0.0) for name in LOSSES], dtype=torch.float64))

    def check(self) -> None:
        """Wait for the device and raise what was not finite; see `NonFiniteGuard.check`."""
        self.guard.check()

    def _run(self, images: Tensor, number: int) -> None:
        config, group = self.config, self.group
        seed_generators(_seed(config.seed, ITERATION_STREAM, number), self.device)
        with stage("augmentation"):
            draws = None
            if group.size > 1:
                # The augmentation of an image does not depend on the number of ranks.
                draws = group.shard(torch.rand(len(images) * group.size, 3))
                seed_generators(_seed(config.seed, ITERATION_STREAM, number, group.rank), self.device)
            images = augment(images, translate=config.translate, scale=config.scale, draws=draws)
            images = images.contiguous(memory_format=torch.channels_last)
        with_generator = number % config.generator_every == 0
        self.guard.iteration.fill_(number)
        with stage("iteration of both" if with_generator else "iteration of the discriminator"):
            graph = self._graph(images, with_generator) if self._use_graph else None
            if graph is not None:
                graph(images)
            else:
                self._iterate(images, with_generator)
        for name in self._trained(with_generator):
            self.counts[name] = self.counts.get(name, 0) + 1

    def _trained(self, with_generator: bool) -> tuple[str, ...]:
        """Return the losses of an iteration."""
        if not with_generator:
            return LOSSES[:2]
        config = self.model.config
        absent = {"adversarial"} if not config.adversarial else set()
        absent |= set() if config.variational else {"divergence"}
        absent |= set() if config.distillation else {"teacher", "distillation"}
        return tuple(name for name in LOSSES if name not in absent)

    def _iterate(self, images: Tensor, with_generator: bool) -> None:
        config, model = self.config, self.model
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
        terms: dict[str, Tensor] = {}
        with autocast:
            with torch.set_grad_enabled(with_generator):
                outputs = self._reconstruct(images, teacher=with_generator and model.teacher is not None)
            if with_generator:
                terms = _reconstruction_terms(images, outputs)
            with stage("discriminator"):
                real, fake = self._discriminate(images, outputs.student.detach())
            losses = {"real": adversarial_loss(real, real=True), "fake": adversarial_loss(fake, real=False)}
        total = config.discriminator_weight * (losses["real"] + losses["fake"])
        # Inspect the generator's terms too: a bad one must stop the iteration before the discriminator is updated.
        self._update("discriminator", total, {**terms, **losses})

        if with_generator:
            # Without this the generator's backward pass would also compute gradients of the discriminator's weights.
            model.discriminator.requires_grad_(False)
            try:
                if model.config.adversarial:
                    with autocast, stage("discriminator"):
                        terms["adversarial"] = adversarial_loss(self._logits(outputs.student), real=True)
                weighted = [getattr(config, f"{name}_weight") * term for name, term in terms.items()]
                self._update("generator", torch.stack(weighted).sum(), terms)
            finally:
                model.discriminator.requires_grad_(True)
            losses |= terms
            if model.queue is not None and outputs.query is not None:
                model.queue.push(self.group.gather(outputs.query.detach()), unless=self.guard.flag.bool())
        zero = total.new_zeros(())
        values = torch.stack([losses.get(name, zero).detach() for name in LOSSES]).double()
        self._sums += self.group.mean(values)

    def _update(self, side: str, total: Tensor, losses: dict[str, Tensor]) -> None:
        """Apply one optimizer step, unless a loss or a gradient, of this or any earlier update, is not finite."""
        optimizer: Any = self.optimizers[side]
        optimizer.zero_grad(set_to_none=True)
        with stage(f"{side} backward"):
            total.backward()
        with stage(f"{side} optimizer"):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.guard.inspect({**losses, f"weighted {side}": total}, parameters)
            optimizer.found_inf = self.guard.flag
            optimizer.step()

    def _graph(self, images: Tensor, with_generator: bool) -> cuda_graph.CapturedGraph | None:
        """Return the captured iteration; None where it cannot be captured. Its warm-up runs leave no trace."""
        graph = self._graphs.get(with_generator)
        if graph is not None and graph.inputs[0].shape == images.shape:
            return graph
        # On the host: on the GPU, a second copy of weights and moments would be the peak of its memory.
        # Detached: copies with a graph would keep the parameters' gradient nodes, which belong to the present stream.
        before = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in self._state()}
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                graph = cuda_graph.capture(
                    lambda inputs: self._iterate(inputs, with_generator),
                    [images],
                    after_warmup=lambda: self._restore(before),
                    share_memory_with=next(iter(self._graphs.values()), None),
                )
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"the iteration cannot be captured as a CUDA graph and runs eagerly: {reason}", stacklevel=2)
            self._restore(before)
            self._use_graph = False
            return None
        self._graphs[with_generator] = graph
        return graph

    def _state(self) -> list[Tensor]:
        """Return every tensor that an iteration changes."""
        moments = [
            tensor
            for optimizer in self.optimizers.values()
            for state in optimizer.state.values()
            for tensor in state.values()
        ]
        return [*self.model.parameters(), *self.model.buffers(), *moments, self._sums, *self.guard.state]

    @torch.no_grad()
    def _restore(self, before: dict[int, Tensor]) -> None:
        for tensor in self._state():
            if id(tensor) in before:
                tensor.copy_(before[id(tensor)])
            else:
                # The optimizers created this moment in a warm-up run; moments start at zero.
                tensor.zero_()
        # Free the warm-up gradients: the graph has its own, and both would not fit into memory side by side.
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def with_chosen_precision(config: TrainingConfig, model: Model) -> TrainingConfig:
    """Return the configuration with the precision that `"auto"` stands for on the model's device."""
    dtype = next(model.parameters()).dtype
    return dataclasses.replace(config, precision=choose_precision(config.precision, model.device, dtype))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`; `torch.manual_seed` would seed every other GPU's too."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _reconstruction_terms(images: Tensor, outputs: Reconstruction) -> dict[str, Tensor]:
    """Return the generator's losses that need no discriminator."""
    with stage("losses"):
        terms = {"student": reconstruction_loss(images, outputs.student)}
        if outputs.teacher is not None and outputs.distillation is not None:
            terms["teacher"] = reconstruction_loss(images, outputs.teacher)
            terms["distillation"] = outputs.distillation
        if outputs.divergence is not None:
            terms["divergence"] = outputs.divergence
        return terms


def _optimizers(model: Model, config: TrainingConfig) -> dict[str, torch.optim.Adam]:
    """Return the optimizers of the two sides; the generator's side is encoder, student and teacher."""
    on_cuda = model.device.type == "cuda"

    def adam(parameters: Iterable[Any], **options: Any) -> torch.optim.Adam:
        # A learning rate in a tensor can change between replays of a CUDA graph.
        rate = torch.tensor(config.learning_rate, device=model.device) if on_cuda else config.learning_rate
        return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.999), fused=True, capturable=on_cuda, **options)

    discriminator = list(model.discriminator.parameters())
    known = set(discriminator)
    generator: list[Any] = [parameter for parameter in model.parameters() if parameter not in known]
    if config.decay == "except_items":
        items = {parameter for name, parameter in model.named_parameters() if name.endswith("memory.items")}
        generator = [{"params": [parameter for parameter in generator if parameter not in items]}]
        generator += [{"params": list(items), "weight_decay": 0.0}] if items else []
    options = {"weight_decay": config.generator_weight_decay, "decoupled_weight_decay": config.decay == "decoupled"}
    return {
        "generator": adam(generator, eps=1e-7, **options),
        "discriminator": adam(discriminator, eps=1e-8),
    }
