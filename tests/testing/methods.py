"""Objects of the kinds Pass, Search, Probe, Decoder, Protocol, Data and Codec: sound ones, and one that breaks each promise."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from typing import ClassVar

import torch
from torch import Tensor, nn

from laconic.core.passes import Decision
from laconic.core.record import Record
from laconic.testing import Example, Ints

CALLS = itertools.count()


class Gain(nn.Module):
    """Multiplies every feature by its own number."""

    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Gated(nn.Module):
    """A linear layer, a gain, another linear layer; the gain can go into the first."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gain = Gain(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain(self.first(x)))


class Tied(nn.Module):
    """Two linear layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Foreign(nn.Module):
    """A gain after something that is no linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Tanh()
        self.gain = Gain(4)

    def forward(self, x):
        return self.gain(self.first(x))


class FoldGain:
    """The sound pass: w' = diag(gain) w, b' = gain b, and the gain becomes the identity."""

    id: ClassVar[str] = "fold_gain"
    stage: ClassVar[str] = "fold"
    scope: ClassVar[str] = "module"
    needs: ClassVar[frozenset[str]] = frozenset()

    def plan(self, structure, model):
        if not isinstance(getattr(model, "gain", None), Gain):
            return Decision({}, {})
        if not isinstance(model.first, nn.Linear):
            return Decision({}, {"gain": "what comes before it is no linear layer"})
        return Decision({"first": {"gain": "gain"}}, {})

    def solve(self, path, decision, ctx):
        return Record("fold_batchnorm", path, {"gain": decision.units[path]["gain"]})

    def apply(self, model, record):
        layer, gain = model.get_submodule(record.path), model.get_submodule(record.data["gain"]).gain
        with torch.no_grad():
            layer.weight.mul_(gain[:, None])
            layer.bias.mul_(gain)
        model.set_submodule(record.data["gain"], nn.Identity())


class NoStage(FoldGain):
    stage = "fold it"


class PlansFromValues(FoldGain):
    def plan(self, structure, model):
        big = model.gain.gain.is_meta or bool((model.gain.gain > 0).all())
        return super().plan(structure, model) if big and not model.gain.gain.is_meta else Decision({}, {})


class SilentPlan(FoldGain):
    def plan(self, structure, model):
        return Decision(super().plan(structure, model).units, {"last": ""})


class SolvesInPlace(FoldGain):
    def solve(self, path, decision, ctx):
        with torch.no_grad():
            ctx.model.first.weight.mul_(0.5)
        return super().solve(path, decision, ctx)


class RandomRecord(FoldGain):
    def solve(self, path, decision, ctx):
        record = super().solve(path, decision, ctx)
        record.data["loss"] = next(CALLS)
        return record


class ForgetsBias(FoldGain):
    def apply(self, model, record):
        bias = model.first.bias.detach().clone()
        super().apply(model, record)
        model.first.bias = nn.Parameter(bias * 0.5)


class RemembersInObject(FoldGain):
    SHIFTS: ClassVar[itertools.count] = itertools.count()

    def apply(self, model, record):
        super().apply(model, record)
        with torch.no_grad():
            model.first.bias.add_(next(self.SHIFTS))


class NeedsValues(FoldGain):
    def apply(self, model, record):
        if model.first.weight.is_meta:
            return
        super().apply(model, record)


class TouchesOthers(FoldGain):
    def apply(self, model, record):
        super().apply(model, record)
        with torch.no_grad():
            model.last.bias.add_(1)


class LeavesSilently(FoldGain):
    def plan(self, structure, model):
        return Decision(super().plan(structure, model).units, {})


class Halve(FoldGain):
    """Halves a weight in place, wherever it is used."""

    def plan(self, structure, model):
        return Decision({"first.weight": {}}, {}) if isinstance(model, Tied) else Decision({}, {"gain": "no"})

    def solve(self, path, decision, ctx):
        return Record("fold_batchnorm", path, {"aliases": ["last.weight"]})

    def apply(self, model, record):
        with torch.no_grad():
            model.first.weight.mul_(0.5)


class CutsTie(Halve):
    def apply(self, model, record):
        model.first.weight = nn.Parameter(model.first.weight.detach() * 0.5)


def a_pass(kind: type, *traits: str, model: type[nn.Module] = Gated, **stated) -> Example:
    stated = {"refused": lambda: (Foreign(), [torch.zeros(3, 4)], "gain"), **stated}
    return Example(
        kind, kind="Pass", traits=traits, inputs=lambda g: [model(), torch.randn(3, 4, generator=g)], stated=stated
    )


class Bits:
    """The space of (a, b, c, d) with every entry 0 or 1."""

    def sample(self, generator):
        return tuple(torch.randint(0, 2, (4,), generator=generator).tolist())

    def __contains__(self, candidate):
        return isinstance(candidate, tuple) and len(candidate) == 4 and set(candidate) <= {0, 1}


class ThreesToo(Bits):
    def sample(self, generator):
        return tuple((3 * torch.randint(0, 2, (4,), generator=generator)).tolist())


def agreement(candidate) -> float:
    """How many places agree with the optimum."""
    return sum(a == b for a, b in zip(candidate, (1, 0, 1, 1), strict=True))


class RandomSearch:
    """Asks for two random candidates at a time, thirty times; the sound strategy that the broken ones change."""

    def __init__(self, space, seed: int):
        self.space, self.generator = space, torch.Generator().manual_seed(seed)
        self.left, self.found = 30, (-math.inf, ())

    def ask(self):
        if not self.left:
            return []
        self.left -= 1
        return [self.draw(), self.draw()]

    def draw(self):
        return self.space.sample(self.generator)

    def tell(self, candidate, result):
        self.found = max(self.found, (result, candidate))

    def best(self):
        return self.found[1]

    def state_dict(self):
        return {"left": self.left, "found": self.found, "random": self.generator.get_state()}

    def load_state_dict(self, state):
        self.left, self.found = state["left"], state["found"]
        self.generator.set_state(state["random"])


class OtherEachRun(RandomSearch):
    def __init__(self, space, seed):
        super().__init__(space, seed + next(CALLS))


class StartsAgain(RandomSearch):
    def load_state_dict(self, state):
        self.left = state["left"]


class Leaves(RandomSearch):
    def draw(self):
        return tuple(2 * v for v in super().draw())


class Minimizes(RandomSearch):
    def tell(self, candidate, result):
        super().tell(candidate, -result)


class NeverEvaluated(RandomSearch):
    def draw(self):
        return (0, 0, 0, 0)

    def best(self):
        return (1, 0, 1, 1)


class AsksAfterTheEnd(RandomSearch):
    def __init__(self, space, seed):
        super().__init__(space, seed)
        self.paused = False

    def ask(self):
        if self.left == 10 and not self.paused:
            self.paused = True
            return []
        return super().ask()


def search(kind: type = RandomSearch, space=None) -> Example:
    return Example(
        lambda space, seed: kind(space, seed),
        kind="Search",
        inputs=[space or Bits(), agreement],
        stated={"optimum": (1, 0, 1, 1), "evaluations": 100},
        name=kind.__name__,
    )


class Finding:
    def __init__(self, table, cost="one pass over the parameters"):
        self.table, self.cost = table, cost

    def plot(self) -> str:
        return '<svg xmlns="http://www.w3.org/2000/svg"><rect width="1" height="1"/></svg>'


class Norms:
    """The norm of every parameter."""

    def __call__(self, model: nn.Module, data: Tensor) -> Finding:
        with torch.no_grad():
            model(data)
        return Finding([{"name": n, "norm": float(p.detach().norm())} for n, p in model.named_parameters()])


class LeavesEvaluation(Norms):
    def __call__(self, model, data):
        return super().__call__(model.eval(), data)


class LeavesHook(Norms):
    def __call__(self, model, data):
        model.register_forward_hook(lambda *_: None)
        return super().__call__(model, data)


class ChangesData(Norms):
    def __call__(self, model, data):
        return super().__call__(model, data.add_(1))


class TensorInTable(Norms):
    def __call__(self, model, data):
        return Finding([{"name": n, "norm": p.norm()} for n, p in model.named_parameters()])


class EmptyTable(Norms):
    def __call__(self, model, data):
        return Finding([])


class NoSvg(Norms):
    def __call__(self, model, data):
        finding = super().__call__(model, data)
        finding.plot = lambda: "<svg><rect></svg>"
        return finding


class Free(Norms):
    def __call__(self, model, data):
        return Finding(super().__call__(model, data).table, cost="")


class OtherTable(Norms):
    def __call__(self, model, data):
        return Finding([{"call": next(CALLS)}])


def probe(kind: type = Norms) -> Example:
    def inputs(generator):
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
        return [model, torch.randn(2, 3, generator=generator)]

    return Example(kind, kind="Probe", inputs=inputs)


def markov(generator: torch.Generator):
    """Log-probabilities that depend on the last token alone, over four tokens."""
    table = torch.randn(4, 4, generator=generator).log_softmax(-1)
    return lambda tokens: table[tokens[:, -1]]


class Beam:
    """Beam search over four tokens; 0 ends; wide enough for three steps to be exhaustive."""

    width, steps = 64, 3

    def __call__(self, step, start):
        beams, done = [((), 0.0)], []
        for index in range(self.steps):
            longer = []
            for tokens, score in beams:
                row = step(torch.cat([start, torch.tensor(tokens, dtype=torch.long)])[None])[0]
                longer += [((*tokens, v), score + float(row[v])) for v in self.allowed(row)]
            longer.sort(key=lambda pair: -pair[1])
            longer = longer[: self.width]
            last = index == self.steps - 1
            done += [pair for pair in longer if pair[0][-1] == 0 or last]
            beams = [pair for pair in longer if pair[0][-1] != 0]
        return self.finish([(torch.tensor(t), s) for t, s in sorted(done, key=lambda pair: -pair[1])])

    def allowed(self, row):
        return range(len(row))

    def finish(self, found):
        return found


class Greedy(Beam):
    width = 1

    def allowed(self, row):
        return [int(row.argmin())]


class WrongScores(Beam):
    def finish(self, found):
        return [(t, s / len(t)) for t, s in found]


class NotSorted(Beam):
    def finish(self, found):
        return found[::-1]


class GoesOn(Beam):
    def finish(self, found):
        return [(torch.cat([t, torch.tensor([1])]), s) for t, s in found]


class OtherEachDecode(Beam):
    def finish(self, found):
        return found[next(CALLS) % 3 :]


class ChangesStart(Beam):
    def __call__(self, step, start):
        found = super().__call__(step, start)
        start.add_(1)
        return found


class Sample:
    """Ancestral sampling."""

    temperature = 1.0

    def __call__(self, step, start, generator):
        tokens: list[int] = []
        while len(tokens) < 3 and (not tokens or tokens[-1] != 0):
            row = step(torch.cat([start, torch.tensor(tokens, dtype=torch.long)])[None])[0] / self.temperature
            tokens.append(int(torch.multinomial(row.softmax(-1), 1, generator=generator)))
        return [(torch.tensor(tokens), 0.0)]


class Cold(Sample):
    temperature = 0.2


def decoder(kind: type = Beam, *traits: str, reference=None) -> Example:
    return Example(
        kind,
        kind="Decoder",
        traits=traits,
        inputs=lambda g: [markov(g), torch.tensor([1])],
        stated={"vocabulary": 4, "end": 0, "steps": 3},
        reference=reference,
    )


class ClassMeans:
    """The mean of every class so far, in float64."""

    def __init__(self):
        self.sums = torch.zeros(3, 4, dtype=torch.float64)
        self.counts = torch.zeros(3, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        self.sums.index_add_(0, y, x.double())
        self.counts.index_add_(0, y, torch.ones(len(y), dtype=torch.float64))

    def predict(self, x: Tensor) -> Tensor:
        return -torch.cdist(x.double(), self.sums / self.counts.clamp(min=1)[:, None])

    def state_dict(self):
        return {"sums": self.sums.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state):
        self.sums, self.counts = state["sums"], state["counts"]


class Recent(ClassMeans):
    """Older batches count less: the order matters."""

    def update(self, x, y):
        self.sums *= 0.5
        self.counts *= 0.5
        super().update(x, y)


class OtherEachPrediction(ClassMeans):
    def predict(self, x):
        return super().predict(x) + next(CALLS)


class LearnsNothing(ClassMeans):
    def update(self, x, y):
        pass


class LosesCounts(ClassMeans):
    def load_state_dict(self, state):
        self.sums = state["sums"]


class ChangesStream(ClassMeans):
    def update(self, x, y):
        super().update(x.mul_(2), y)


def protocol(kind: type = ClassMeans, order: str = "order:independent") -> Example:
    def inputs(generator):
        stream = [
            (torch.randn(5, 4, generator=generator), torch.randint(0, 3, (5,), generator=generator)) for _ in range(6)
        ]
        return [stream, torch.randn(7, 4, generator=generator)]

    return Example(kind, kind="Protocol", traits=(order,), inputs=inputs)


class Shuffled:
    """Every index of ten once, in an order of the seed and the epoch."""

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return 10

    def __iter__(self):
        self.epoch += 1
        return iter(self.order(torch.Generator().manual_seed(1000 * self.seed + self.epoch)))

    def order(self, generator):
        return torch.randperm(10, generator=generator).tolist()


class GlobalOrder(Shuffled):
    def order(self, generator):
        return torch.randperm(10).tolist()


class IgnoresSeed(Shuffled):
    def __init__(self, seed):
        super().__init__(0)


class OneTooFar(Shuffled):
    def order(self, generator):
        return [i + 1 for i in super().order(generator)]


class DropsOne(Shuffled):
    def order(self, generator):
        return super().order(generator)[:-1]


class AnotherRandom(Shuffled):
    """Repeats from its seed, but by way of torch's global numbers."""

    def order(self, generator):
        torch.manual_seed(self.seed)
        return torch.randperm(10).tolist()


class Jitter:
    """Adds noise and clips to [-1, 1]."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return (x + torch.rand(x.shape, generator=generator)).clamp(-1, 1)


class NotClipped(Jitter):
    def __call__(self, x, generator):
        return x + 3 * torch.rand(x.shape, generator=generator)


class Crops(Jitter):
    def __call__(self, x, generator):
        return super().__call__(x, generator)[:-1]


class JitterInPlace(Jitter):
    def __call__(self, x, generator):
        return super().__call__(x.mul_(0.5), generator)


class PythonRandom(Jitter):
    def __call__(self, x, generator):
        return super().__call__(x * random.SystemRandom().random(), generator)


def sampler(kind: type = Shuffled) -> Example:
    return Example(lambda seed: kind(seed), kind="Data", traits=("sampler",), stated={"size": 10}, name=kind.__name__)


def transform(kind: type = Jitter) -> Example:
    return Example(kind, kind="Data", traits=("transform",), inputs=[(3, 4)], stated={"range": (-1, 1)})


class Zipped:
    """int64 tensors as bytes: number of dimensions, shape, checksum, deflated values."""

    def encode(self, message: Tensor) -> bytes:
        body = zlib.compress(message.numpy().tobytes())
        head = b"".join(size.to_bytes(4, "big") for size in (message.ndim, *message.shape))
        return (head + body) + zlib.crc32(head + body).to_bytes(4, "big")

    def decode(self, packed: bytes) -> Tensor:
        if len(packed) < 8 or zlib.crc32(packed[:-4]) != int.from_bytes(packed[-4:], "big"):
            raise ValueError(f"the checksum of {len(packed)} bytes is wrong")
        return self.parse(packed[:-4])

    def parse(self, packed):
        ndim = min(int.from_bytes(packed[:4], "big"), 4)
        shape = [int.from_bytes(packed[4 * i + 4 : 4 * i + 8], "big") for i in range(ndim)]
        values = zlib.decompress(packed[4 * ndim + 4 :])
        return (
            torch.frombuffer(bytearray(values), dtype=torch.int64).view(shape) if values else torch.zeros(shape).long()
        )


class LosesByte(Zipped):
    def decode(self, packed):
        return super().decode(packed) & 0x7F


class Salted(Zipped):
    def encode(self, message):
        salt = next(CALLS).to_bytes(4, "big")
        return salt + super().encode(message)

    def decode(self, packed):
        return super().decode(packed[4:])


class Padded(Zipped):
    def encode(self, message):
        return super().encode(message) + bytes(4096)

    def decode(self, packed):
        return super().decode(packed[:-4096])


class FillsUp(Zipped):
    def decode(self, packed):
        try:
            return super().decode(packed)
        except ValueError:
            return torch.zeros(1)


class IgnoresTail(Zipped):
    def encode(self, message):
        packed = super().encode(message)
        return len(packed).to_bytes(4, "big") + packed

    def decode(self, packed):
        return super().decode(packed[4 : 4 + int.from_bytes(packed[:4], "big")])


class Unchecked(Zipped):
    def encode(self, message):
        return super().encode(message)[:-4]

    def decode(self, packed):
        return self.parse(packed)


class Raw:
    """One byte per value, with nothing to notice damage by but the length."""

    def encode(self, message: bytes) -> bytes:
        return len(message).to_bytes(4, "big") + message

    def decode(self, packed: bytes) -> bytes:
        if len(packed) < 4 or len(packed) != 4 + int.from_bytes(packed[:4], "big"):
            raise ValueError(f"{len(packed)} bytes are not what their head says")
        return packed[4:]


def codec(kind: type, *traits: str) -> Example:
    messages = [Ints((5, 3), 1000), Ints((0,), 2), torch.tensor([2**62, -(2**62)])]
    return Example(kind, kind="Codec", traits=traits, inputs=messages, stated={"bound": lambda m: 8 * m.numel() + 64})


def raw(*traits: str) -> Example:
    return Example(
        Raw, kind="Codec", traits=traits, inputs=[b"", bytes(range(256))], stated={"bound": lambda m: len(m) + 4}
    )


def tied(kind: type = Halve) -> Example:
    return a_pass(kind, model=Tied, bound=0.9)


def augmented(step, start):
    """The sequences of `Beam` with the scores of `WrongScores`, in its order."""
    return [(t, s / len(t)) for t, s in Beam()(step, start)]


SOUND = [
    a_pass(FoldGain, "exact"),
    a_pass(FoldGain, bound=1e-5),
    tied(),
    search(),
    probe(),
    decoder(),
    decoder(WrongScores, "augmented", reference=augmented),
    decoder(Sample, "sampling"),
    protocol(),
    protocol(Recent, "order:dependent"),
    sampler(),
    transform(),
    codec(Zipped, "checksum"),
    raw(),
]

BROKEN = [
    ("check_pass_declares", a_pass(NoStage, "exact"), "'fold it' is none of"),
    ("check_pass_plans_from_shapes", a_pass(PlansFromValues, "exact"), "skeleton on meta is another"),
    ("check_pass_plans_from_shapes", a_pass(SilentPlan, "exact"), "without a reason"),
    ("check_pass_solving_changes_nothing", a_pass(SolvesInPlace, "exact"), "solve changed the parameters"),
    ("check_pass_solving_changes_nothing", a_pass(RandomRecord, "exact"), "different records"),
    ("check_pass_output", a_pass(ForgetsBias, "exact"), "computes something else"),
    ("check_pass_output", a_pass(ForgetsBias, bound=1e-3), "0.001 is stated"),
    ("check_pass_applies_again", a_pass(RemembersInObject, "exact"), "make another model"),
    ("check_pass_applies_on_meta", a_pass(NeedsValues, "exact"), "on meta ['gain.gain'] are other"),
    ("check_pass_leaves_the_rest_alone", a_pass(TouchesOthers, "exact"), "['last.bias'] changed"),
    ("check_pass_refuses_what_it_cannot_do", a_pass(LeavesSilently, "exact"), "without a word"),
    ("check_pass_keeps_ties", tied(CutsTie), "are not any more"),
    ("check_search_space_samples_inside", search(space=ThreesToo()), "which is not in it"),
    ("check_search_repeats_from_seed", search(OtherEachRun), "same seed"),
    ("check_search_resumes", search(StartsAgain), "resumed search"),
    ("check_search_stays_inside", search(Leaves), "not in the space"),
    ("check_search_finds_optimum", search(Minimizes), "not (1, 0, 1, 1)"),
    ("check_search_finds_optimum", search(NeverEvaluated), "never evaluated"),
    ("check_search_keeps_budget", search(AsksAfterTheEnd), "asks again"),
    ("check_probe_changes_nothing", probe(LeavesEvaluation), "changed the training"),
    ("check_probe_changes_nothing", probe(LeavesHook), "changed the hooks"),
    ("check_probe_changes_nothing", probe(ChangesData), "changed the data"),
    ("check_probe_table", probe(TensorInTable), "JSON cannot write"),
    ("check_probe_table", probe(EmptyTable), "not a list of rows"),
    ("check_probe_plot", probe(NoSvg), "no well-formed SVG"),
    ("check_probe_cost", probe(Free), "say what it took"),
    ("check_probe_repeats", probe(OtherTable), "different tables"),
    ("check_decoder_agrees_with_brute_force", decoder(Greedy), "the score is"),
    ("check_decoder_agrees_with_brute_force", decoder(Cold, "sampling"), "frequencies are off"),
    ("check_decoder_scores", decoder(WrongScores), "the score is"),
    ("check_decoder_scores", decoder(NotSorted), "best first"),
    ("check_decoder_sequences", decoder(GoesOn), "goes on after the end"),
    ("check_decoder_repeats", decoder(OtherEachDecode), "two runs"),
    ("check_decoder_repeats", decoder(ChangesStart), "the start was changed"),
    ("check_protocol_repeats", protocol(OtherEachPrediction), "another result"),
    ("check_protocol_learns", protocol(LearnsNothing), "changes nothing"),
    ("check_protocol_resumes", protocol(LosesCounts), "resumed after"),
    ("check_protocol_order", protocol(Recent), "another order"),
    ("check_protocol_order", protocol(ClassMeans, "order:dependent"), "give the same result"),
    ("check_protocol_keeps_stream", protocol(ChangesStream), "changed in place"),
    ("check_data_repeats_from_seed", sampler(GlobalOrder), "something else"),
    ("check_data_repeats_from_seed", transform(PythonRandom), "something else"),
    ("check_data_depends_on_seed", sampler(IgnoresSeed), "every seed gives the same"),
    ("check_data_bounded", sampler(OneTooFar), "the index 10"),
    ("check_data_bounded", transform(NotClipped), "leave [-1, 1]"),
    ("check_data_length", sampler(DropsOne), "its length is 10, and epoch 0 yields 9"),
    ("check_data_length", transform(Crops), "(3, 4) is stated"),
    ("check_data_keeps_input", transform(JitterInPlace), "changed in place"),
    ("check_data_keeps_input", sampler(AnotherRandom), "global random numbers"),
    ("check_codec_round_trip", codec(LosesByte, "checksum"), "does not come back"),
    ("check_codec_repeats", codec(Salted), "the second time"),
    ("check_codec_bounded", codec(Padded), "are stated"),
    ("check_codec_refuses_truncated", codec(FillsUp), "without a word"),
    ("check_codec_refuses_extended", codec(IgnoresTail), "without a word"),
    ("check_codec_survives_damage", codec(Unchecked), "damage at byte"),
    ("check_codec_notices_damage", raw("checksum"), "without a word"),
]
