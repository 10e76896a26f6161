"""`pc_codec`: lossless compression by a probabilistic circuit: a tree of hidden variables with exact probabilities.

Variables x_1 .. x_V with C values each hang on a tree; every x_v has a hidden z_v with M states, and z_v depends on the
z of its parent (a hidden Chow-Liu tree, HCLT):

    theta_v (M, M)   theta_v[i, j] = P(z_v = j | z_parent = i); the root uses row 0
    leaf_v (M, C)    leaf_v[j, a] = P(x_v = a | z_v = j)
    t_v[j] = leaf_v[j, x_v] prod_(children u) m_u[j]        (an unobserved x_v: factor 1)
    m_v[i] = sum_j theta_v[i, j] t_v[j]                     p(x) = m_root[0]

- Structure: the maximum spanning tree of pairwise mutual information (Chow and Liu, 1968), rooted at its centre.
- Learning: EM. The expected counts ("flows") are the derivatives F = d log p / d log theta, exact by autograd; then
  theta <- (1 - eta) theta + eta normalized(F + alpha / M), and likewise for leaves with alpha / C.
- Coding: variables in pre-order of the tree. The belief b_v = P(z_v | all that is coded so far) follows from that of
  the parent by one product with theta_v, and what a finished subtree says goes back up as m_v. So all V conditional
  distributions of a row cost O(V M (M + C)) together. Each becomes 16-bit frequencies for an entropy coder (rANS).

Encoder and decoder must have the same frequencies to the bit. So the codec freezes the circuit to 16-bit integers, and
beliefs are integers below 2^24 in float64: every sum of products stays below 2^53 and is exact in any order, divisions
are correctly rounded. The same bytes come out on any machine, with any number of threads, for any batch.

A message is packed as crc32 (4 bytes, over the codec's integers and all that follows), rows (LEB128), rANS state (5
bytes), rANS bytes. It costs -log2 p(x) bits, about 10 bytes, and what rounding to 16 bits costs.

Source: "Lossless Compression with Probabilistic Circuits", Liu, Mandt, Van den Broeck, 2021, arXiv 2111.11632; the tree
is that of "Tractable Regularization of Probabilistic Circuits", Liu, Van den Broeck, 2021, arXiv 2106.02264. rANS:
"Asymmetric numeral systems", Duda, 2013, arXiv 1311.2540. Code for circuits: Tractables/pyjuice, Apache-2.0; the coder
of the authors is not public. We differ: one pass over the tree instead of O(log V) cached marginals for each variable;
integers, as above; a hidden variable for tree leaves too (`leaf_latents=False` gives theirs).

Use it for many small records of one kind (pictures, rows of tables), where the circuit is paid for once. For single
files, and for large natural pictures, general compressors or neural ones with larger contexts do better.

Example:
    >>> import torch
    >>> from laconic.generate import PCCodec, learn_hclt
    >>> x = torch.arange(64).remainder(4)[:, None] + torch.tensor([0, 1, 2])
    >>> circuit = learn_hclt(x, categories=6, latents=4, steps=30)
    >>> codec = PCCodec(circuit)
    >>> packed = codec.encode(x)
    >>> len(packed) < 40, torch.equal(codec.decode(packed), x)
    (True, True)
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.errors import BadInput

ROOT = -1

# Of the codec's integers: parameters, beliefs, frequencies. M 2^(24 + 16) must stay below 2^53.
PARAMETER_BITS, BELIEF_BITS, FREQUENCY_BITS = 16, 24, 16
MOST_LATENTS = 2 ** (52 - BELIEF_BITS - PARAMETER_BITS)
# The state of the rANS coder lies in [2^32, 2^40) between symbols, and bytes go in and out.
STATE_LOW, STATE_BYTES = 1 << 32, 5
CRC_BYTES = 4


def chow_liu_tree(x: Tensor, categories: int, *, pseudocount: float = 0.1, levels: int = 16) -> list[int]:
    """Parent of each variable in the maximum spanning tree of mutual information; -1 for the root, the tree's centre.

    Args:
        x: (N, V) in 0 .. categories - 1.
        categories: C.
        pseudocount: what is added to the counts of a pair of variables, over all cells together.
        levels: where there are more categories, neighbours are merged to this many for the counts.

    Raises:
        ValueError: x is of another shape or has other values.
    """
    _check_rows(x, categories)
    information = _mutual_information(x, categories, pseudocount, levels)
    neighbours = _spanning_tree(information)
    return _rooted(neighbours, _centre(neighbours))


class HCLT(nn.Module):
    """A hidden Chow-Liu tree: (N, V) whole numbers -> log p (N,). Trains by EM, or by gradient as any module.

    Parameters are unnormalized logs: theta_v = softmax(transition[v]) and leaf_v = softmax(emission[v]), over rows.

    Args:
        parents: of each variable; -1 for the one root.
        latents: M, states of a hidden variable.
        categories: C, values of a variable.
        leaf_latents: whether the tree's leaves have a hidden variable of their own, or depend on their parent's.
        perturbation: initial logits are uniform in [-perturbation, 0].

    Raises:
        ValueError: the parents are no tree, or a size is not positive.
    """

    def __init__(
        self,
        parents: Sequence[int],
        latents: int = 16,
        categories: int = 256,
        *,
        leaf_latents: bool = True,
        perturbation: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float64,
    ):
        super().__init__()
        for name, value in (("latents", latents), ("categories", categories)):
            if value < 1:
                raise ValueError(f"pc_codec: {name} is {value}: it must be at least 1")
        self.parents = [int(parent) for parent in parents]
        self.order = _pre_order(self.parents)
        self.latents, self.categories, self.leaf_latents = latents, categories, leaf_latents
        table = torch.empty(len(self.parents), latents, latents + categories, device=device, dtype=dtype)
        transition, emission = table.uniform_(-perturbation, 0).split((latents, categories), dim=2)
        self.transition, self.emission = nn.Parameter(transition.clone()), nn.Parameter(emission.clone())

    @property
    def theta(self) -> Tensor:
        """(V, M, M) rows of probabilities."""
        return self.transition.detach().softmax(-1)

    @property
    def leaf(self) -> Tensor:
        """(V, M, C) rows of probabilities."""
        return self.emission.detach().softmax(-1)

    @torch.no_grad()
    def set_probabilities(self, theta: Tensor, leaf: Tensor) -> None:
        """Take theta (V, M, M) and leaf (V, M, C) over; zeros are allowed."""
        self.transition.copy_(theta.log())
        self.emission.copy_(leaf.log())

    def owns_latent(self, variable: int) -> bool:
        """Whether a variable has a hidden one of its own, instead of depending on its parent's."""
        return self.leaf_latents or self.parents[variable] == ROOT or variable in self.parents

    def forward(self, x: Tensor) -> Tensor:
        return self.log_prob(x)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p (N,) of the observed variables, the others summed out.

        Args:
            x: (N, V); what stands at unobserved places does not matter.
            observed: (N, V) booleans; all by default.

        Raises:
            ValueError: x or `observed` is of another shape.
        """
        return self._log_prob(x, observed, self.transition.log_softmax(-1), self.emission.log_softmax(-1))

    def flows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expected counts, summed over the rows x (N, V): of theta (V, M, M) and of leaf (V, M, C)."""
        logs = [self.theta.log().requires_grad_(), self.leaf.log().requires_grad_()]
        with torch.enable_grad():
            total = self._log_prob(x, None, *logs).sum()
        of_theta, of_leaf = torch.autograd.grad(total, logs)
        return of_theta, of_leaf

    def em_step(self, x: Tensor, *, step_size: float = 1.0, pseudocount: float = 0.1) -> None:
        """One step of EM on the rows x (N, V), in place.

        Args:
            x: all rows, or a batch of them with a smaller step.
            step_size: eta in (0, 1]: how far to go from the present probabilities to those of the batch.
            pseudocount: alpha, shared out over each row of theta and of leaf.

        Raises:
            ValueError: a value of x, `step_size` or `pseudocount` cannot be right.
        """
        _check_rows(x, self.categories)
        if not 0 < step_size <= 1 or not pseudocount >= 0:
            raise ValueError(
                f"pc_codec: a step of {step_size} in (0, 1] and a pseudocount of {pseudocount} of at least 0"
            )
        moved = []
        for old, flow in zip((self.theta, self.leaf), self.flows(x), strict=True):
            counts = flow + pseudocount / flow.shape[-1]
            total = counts.sum(-1, keepdim=True)
            new = torch.where(total > 0, counts / total, old)  # a state that never occurs says nothing
            moved.append((1 - step_size) * old + step_size * new)
        self.set_probabilities(*moved)

    def _log_prob(self, x: Tensor, observed: Tensor | None, log_theta: Tensor, log_leaf: Tensor) -> Tensor:
        for name, tensor in (("x", x), ("observed", observed)):
            if tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != len(self.parents)):
                raise ValueError(f"pc_codec: {name} is (N, {len(self.parents)}), not {tuple(tensor.shape)}")
        if observed is not None:
            x = x.where(observed, 0)
        variables = torch.arange(len(self.parents), device=x.device)
        factors = log_leaf.transpose(1, 2)[variables, x.long()]  # (N, V, M)
        if observed is not None:
            factors = factors.where(observed[..., None], 0.0)
        states = list(factors.unbind(1))
        for v in reversed(self.order[1:]):  # children first
            message = _log_product(states[v], log_theta[v]) if self.owns_latent(v) else states[v]
            states[self.parents[v]] = states[self.parents[v]] + message
        root = self.order[0]
        return _log_product(states[root], log_theta[root, :1]).squeeze(1)

    def extra_repr(self) -> str:
        return f"variables={len(self.parents)}, latents={self.latents}, categories={self.categories}"


def learn_hclt(
    x: Tensor,
    categories: int,
    *,
    latents: int = 16,
    steps: int = 50,
    batch_size: int | None = None,
    step_size: float | None = None,
    pseudocount: float = 0.1,
    leaf_latents: bool = True,
    seed: int = 0,
) -> HCLT:
    """Structure from the data, then EM.

    Args:
        x: (N, V) in 0 .. categories - 1.
        categories: C.
        latents: M.
        steps: of EM.
        batch_size: rows of a step, drawn anew each time; all by default.
        step_size: eta; 1 where a step sees all rows, else 0.1.
        pseudocount: alpha of each step.
        leaf_latents: see `HCLT`.
        seed: of the first parameters and of the batches.

    Raises:
        ValueError: x is of another shape, has other values or no rows.
    """
    _check_rows(x, categories)
    if not len(x):
        raise ValueError("pc_codec: there are no rows to learn from")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        circuit = HCLT(chow_liu_tree(x, categories), latents, categories, leaf_latents=leaf_latents)
    whole = batch_size is None or batch_size >= len(x)
    eta = (1.0 if whole else 0.1) if step_size is None else step_size
    for _ in range(steps):
        rows = x if whole else x[torch.randperm(len(x), generator=generator)[:batch_size]]
        circuit.em_step(rows, step_size=eta, pseudocount=pseudocount)
    return circuit


def quantize_pmf(pmf: np.ndarray, bits: int = FREQUENCY_BITS) -> np.ndarray:
    """Frequencies f (..., C) of int64 that sum to 2^bits, none of them 0.

        f_a = 1 + floor(pmf_a (2^bits - C)), and what is left goes to the largest

    Args:
        pmf: (..., C) probabilities in float64.
        bits: of the total.

    Raises:
        ValueError: there are more categories than 2^bits.
    """
    total, categories = 1 << bits, pmf.shape[-1]
    if categories > total:
        raise ValueError(f"pc_codec: {categories} categories do not fit {bits} bits")
    frequencies = 1 + np.floor(pmf * (total - categories)).astype(np.int64)
    left = total - frequencies.sum(-1, keepdims=True)
    at = pmf.argmax(-1)[..., None]
    np.put_along_axis(frequencies, at, np.take_along_axis(frequencies, at, -1) + left, -1)
    return frequencies


class PCCodec:
    """The codec of a circuit: messages are tensors (N, V) of int64 in 0 .. C - 1.

    Args:
        circuit: what it takes its probabilities from, now and for good; later training does not change the codec.

    Raises:
        ValueError: there are more hidden states or categories than the integers allow.
    """

    def __init__(self, circuit: HCLT):
        if circuit.latents > MOST_LATENTS or circuit.categories > 1 << FREQUENCY_BITS:
            raise ValueError(
                f"pc_codec: {circuit.latents} latents and {circuit.categories} categories cannot be coded exactly: at "
                f"most {MOST_LATENTS} and {1 << FREQUENCY_BITS} can"
            )
        owners = [circuit.owns_latent(v) for v in range(len(circuit.parents))]
        self._set(circuit.parents, owners, _integers(circuit.theta), _integers(circuit.leaf))

    def state_dict(self) -> dict[str, Tensor]:
        """The codec's integers: what a reader on another machine needs."""
        return {
            "parents": torch.tensor(self.parents),
            "owners": torch.tensor(self.owners),
            "theta": torch.from_numpy(self.theta.astype(np.int32)),
            "leaf": torch.from_numpy(self.leaf.astype(np.int32)),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> PCCodec:
        """The codec that `state_dict` was taken of: bytes of one are read by the other."""
        codec = cls.__new__(cls)
        tables = (state[name].numpy().astype(np.int64) for name in ("theta", "leaf"))
        codec._set(state["parents"].tolist(), state["owners"].tolist(), *tables)
        return codec

    @property
    def model_bytes(self) -> int:
        """Bytes of the parameters that are used, two for each: what a reader needs besides the messages."""
        variables, latents, categories = self.leaf.shape
        rows = latents * (sum(self.owners) - 1) + 1
        return PARAMETER_BITS // 8 * (rows * latents + variables * latents * categories)

    def encode(self, message: Tensor) -> bytes:
        """The message, packed.

        Raises:
            ValueError: it has another shape, or values that the circuit does not know.
        """
        _check_rows(message, self.leaf.shape[2], len(self.parents))
        rows = message.numpy(force=True).astype(np.int64)
        walk, chosen = self._walk(len(rows)), []
        here = np.arange(len(rows))
        variable, frequencies = next(walk)
        while True:
            symbols = rows[:, variable]
            ends = frequencies.cumsum(1)[here, symbols]
            sizes = frequencies[here, symbols]
            chosen.append((sizes.tolist(), (ends - sizes).tolist()))
            try:
                variable, frequencies = walk.send(symbols)
            except StopIteration:
                break
        body = _leb128(len(rows)) + _rans_encode(chosen)
        return self._crc(body).to_bytes(CRC_BYTES, "little") + body

    def decode(self, packed: bytes) -> Tensor:
        """The message.

        Raises:
            BadInput: the bytes are damaged, or of another codec.
        """
        if len(packed) < CRC_BYTES:
            raise BadInput(f"pc_codec: {len(packed)} bytes are too few for a checksum of {CRC_BYTES}")
        body = packed[CRC_BYTES:]
        if int.from_bytes(packed[:CRC_BYTES], "little") != self._crc(body):
            raise BadInput("pc_codec: the checksum is another: the bytes are damaged, or another circuit packed them")
        count, at = _read_leb128(body)
        decoder = _RansDecoder(body, at)
        rows = np.zeros((count, len(self.parents)), np.int64)
        walk = self._walk(count)
        variable, frequencies = next(walk)
        while True:
            rows[:, variable] = symbols = decoder.symbols(frequencies)
            try:
                variable, frequencies = walk.send(symbols)
            except StopIteration:
                break
        decoder.finish()
        return torch.from_numpy(rows)

    def _walk(self, count: int) -> Generator[tuple[int, np.ndarray], np.ndarray, None]:
        """Pre-order over the tree: gives (variable, frequencies (N, C)) and is sent the symbols (N,) that stand there.

        Encoder and decoder both go this way, so they cannot come to different frequencies.
        """
        beliefs: dict[int, np.ndarray] = {}  # P(z_v | what is coded so far), up to a factor
        products: dict[int, np.ndarray] = {}  # t_v, up to a factor
        for entering, v in self.visits:
            parent = self.parents[v]
            if not entering:
                message = products[v] @ self.theta[v].T if self.owners[v] else products[v]
                for table in (beliefs, products):
                    table[parent] = _scaled(table[parent] * _scaled(message))
                del beliefs[v], products[v]
                continue
            if parent == ROOT:
                beliefs[v] = np.repeat(self.theta[v][:1], count, axis=0)
            else:
                beliefs[v] = _scaled(beliefs[parent] @ self.theta[v]) if self.owners[v] else beliefs[parent]
            weights = beliefs[v] @ self.leaf[v]
            symbols = yield v, quantize_pmf(weights / weights.sum(1, keepdims=True))
            products[v] = self.leaf[v][:, symbols].T
            beliefs[v] = _scaled(beliefs[v] * products[v])

    def _set(self, parents: list[int], owners: list[bool], theta: np.ndarray, leaf: np.ndarray) -> None:
        self.parents, self.owners = parents, owners
        self.theta, self.leaf = theta.astype(np.float64), leaf.astype(np.float64)
        self.visits = _visits(parents)
        about = np.array([*leaf.shape, *parents, *owners], "<i8").tobytes()
        self.fingerprint = zlib.crc32(about + theta.astype("<i4").tobytes() + leaf.astype("<i4").tobytes())

    def _crc(self, body: bytes) -> int:
        return zlib.crc32(body, self.fingerprint)


class _RansDecoder:
    """Reads symbols from `packed`, from byte `at` on, in the order in which the encoder was given them."""

    def __init__(self, packed: bytes, at: int):
        self.packed, self.at = packed, at + STATE_BYTES
        if len(packed) < self.at:
            raise BadInput(f"pc_codec: {len(packed) - at} bytes are too few for a state of {STATE_BYTES}")
        self.state = int.from_bytes(packed[at : self.at], "big")

    def symbols(self, frequencies: np.ndarray) -> np.ndarray:
        """The next symbol of each row, for frequencies (N, C)."""
        bounds = np.pad(frequencies.cumsum(1), ((0, 0), (1, 0))).tolist()
        found = np.empty(len(bounds), np.int64)
        mask = (1 << FREQUENCY_BITS) - 1
        for n, row in enumerate(bounds):
            slot = self.state & mask
            symbol = bisect_right(row, slot) - 1
            found[n] = symbol
            self.state = (row[symbol + 1] - row[symbol]) * (self.state >> FREQUENCY_BITS) + slot - row[symbol]
            while self.state < STATE_LOW:
                if self.at == len(self.packed):
                    raise BadInput("pc_codec: the bytes stop before the message does")
                self.state = self.state << 8 | self.packed[self.at]
                self.at += 1
        return found

    def finish(self) -> None:
        """Require that nothing is left, and that the state is where the encoder began."""
        if self.at != len(self.packed) or self.state != STATE_LOW:
            raise BadInput("pc_codec: the bytes do not end where the message does")


def _rans_encode(chosen: list[tuple[list[int], list[int]]]) -> bytes:
    """Pack (frequencies, starts) of the symbols: a stack, so the last symbol goes in first and comes out last."""
    state, out = STATE_LOW, bytearray()
    ceiling = STATE_LOW >> FREQUENCY_BITS << 8
    for sizes, starts in reversed(chosen):
        for size, start in zip(reversed(sizes), reversed(starts), strict=True):
            while state >= ceiling * size:
                out.append(state & 255)
                state >>= 8
            state = (state // size << FREQUENCY_BITS) + state % size + start
    return state.to_bytes(STATE_BYTES, "big") + bytes(reversed(out))


def _leb128(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_leb128(packed: bytes) -> tuple[int, int]:
    """The number at the beginning, and where it ends."""
    number = 0
    for i, byte in enumerate(packed[:9]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, i + 1
    raise BadInput("pc_codec: the number of rows does not end")


def _scaled(x: np.ndarray) -> np.ndarray:
    """Rows of positive whole numbers below 2^53, brought to 1 .. 2^24: exact up to one rounding per value."""
    return np.maximum(np.floor(x * 2.0**BELIEF_BITS / x.max(1, keepdims=True)), 1.0)


def _integers(probabilities: Tensor) -> np.ndarray:
    """Probabilities as 1 .. 2^16 - 1: none is impossible, each fits two bytes."""
    wide = (probabilities.cpu().double() * 2.0**PARAMETER_BITS).round()
    return wide.clamp(1, 2**PARAMETER_BITS - 1).long().numpy()


def _log_product(log_states: Tensor, log_rows: Tensor) -> Tensor:
    """log(exp(log_states) exp(log_rows)^T), (N, M) and (K, M) -> (N, K), without overflow."""
    top = log_states.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(log_states.dtype).min)
    return ((log_states - top).exp() @ log_rows.exp().T).log() + top


def _check_rows(x: Tensor, categories: int, variables: int | None = None) -> None:
    if x.ndim != 2 or x.is_floating_point() or x.shape[1] != (variables or x.shape[1]) or not x.shape[1]:
        raise ValueError(
            f"pc_codec: whole numbers (N, {variables or 'V'}) are needed, not {tuple(x.shape)} of {x.dtype}"
        )
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < categories:
        raise ValueError(
            f"pc_codec: values go from {int(x.min())} to {int(x.max())}, and 0 .. {categories - 1} are known"
        )


def _mutual_information(x: Tensor, categories: int, pseudocount: float, levels: int) -> np.ndarray:
    """(V, V) in nats, of values merged to at most `levels`."""
    count, variables = x.shape
    k = min(categories, levels)
    hot = nn.functional.one_hot(x.long() * k // categories, k).double().flatten(1)  # (N, V k)
    information = np.zeros((variables, variables))
    for v in range(variables):
        joint = hot[:, v * k : (v + 1) * k].T @ hot + pseudocount / k**2
        joint = (joint / (count + pseudocount)).unflatten(1, (variables, k)).transpose(0, 1)  # (V, k, k)
        outer = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
        information[v] = torch.xlogy(joint, joint / outer).nan_to_num(0.0).sum((1, 2)).numpy()
    return information


def _spanning_tree(weights: np.ndarray) -> list[list[int]]:
    """Neighbours in the maximum spanning tree of a complete graph, by Prim's method."""
    variables = len(weights)
    neighbours: list[list[int]] = [[] for _ in range(variables)]
    best, link = weights[0].copy(), np.zeros(variables, np.int64)
    outside = np.ones(variables, bool)
    outside[0] = False
    for _ in range(variables - 1):
        v = int(np.where(outside, best, -np.inf).argmax())
        neighbours[v].append(int(link[v]))
        neighbours[link[v]].append(v)
        outside[v] = False
        closer = weights[v] > best
        best, link = np.where(closer, weights[v], best), np.where(closer, v, link)
    return neighbours


def _centre(neighbours: list[list[int]]) -> int:
    """A vertex from which the farthest is nearest: the middle of a longest path."""
    end = _path_to_farthest(neighbours, 0)[-1]
    path = _path_to_farthest(neighbours, end)
    return path[len(path) // 2]


def _path_to_farthest(neighbours: list[list[int]], start: int) -> list[int]:
    parents = _rooted(neighbours, start)
    depths = [0] * len(parents)
    for v in _pre_order(parents)[1:]:
        depths[v] = depths[parents[v]] + 1
    path = [max(range(len(parents)), key=depths.__getitem__)]
    while path[-1] != start:
        path.append(parents[path[-1]])
    return path[::-1]


def _rooted(neighbours: list[list[int]], root: int) -> list[int]:
    parents = [ROOT] * len(neighbours)
    stack = [root]
    while stack:
        v = stack.pop()
        for u in neighbours[v]:
            if u != parents[v]:
                parents[u] = v
                stack.append(u)
    return parents


def _visits(parents: Sequence[int]) -> list[tuple[bool, int]]:
    """Depth first: (True, v) where v is entered, (False, v) where its subtree is left; the root is not left."""
    children: list[list[int]] = [[] for _ in parents]
    roots = []
    for v, parent in enumerate(parents):
        if parent == ROOT:
            roots.append(v)
        elif 0 <= parent < len(parents):
            children[parent].append(v)
        else:
            raise ValueError(
                f"pc_codec: the parent of variable {v} is {parent}, and there are {len(parents)} variables"
            )
    if len(roots) != 1:
        raise ValueError(f"pc_codec: a tree has one root (parent {ROOT}), not {len(roots)}")
    visits, stack = [], [(True, roots[0])]
    while stack:
        entering, v = stack.pop()
        visits.append((entering, v))
        if entering:
            if v != roots[0]:
                stack.append((False, v))
            stack += [(True, u) for u in reversed(children[v])]
    if sum(entering for entering, _ in visits) < len(parents):
        raise ValueError("pc_codec: the parents have a cycle: they are no tree")
    return visits


def _pre_order(parents: Sequence[int]) -> list[int]:
    """Parents before their children; ends that hang on a cycle are refused."""
    return [v for entering, v in _visits(parents) if entering]


CARD = Card(
    id="pc_codec",
    title="Lossless Compression with Probabilistic Circuits",
    authors="Liu, Mandt, Van den Broeck",
    year=2021,
    source="arXiv 2111.11632; the circuit is that of arXiv 2106.02264",
    family="generate",
    summary="Compresses records without loss by the exact conditional probabilities of a tree of hidden variables.",
    objects={"HCLT": "Model", "PCCodec": "Codec"},
    traits={"PCCodec": ("checksum",)},
    use="For many small records of one kind, such as pictures or rows of a table, that share one model.",
    avoid="For single files, where the circuit itself costs more than it saves, and for large natural pictures.",
    vectors=("pc_codec",),
    code="circuits: github.com/Tractables/pyjuice, Apache-2.0; the authors' coder is not public",
    claim={
        "text": "Pictures that were not trained on take fewer bits per pixel than with the best of zlib, bz2 and lzma, "
        "which are given the training pictures too; the circuit itself is not counted, as in the paper.",
        "metric": "bits per pixel",
        "direction": "lower",
        "margin": 0.3,
        "arms": ("general compressor", "pc_codec"),
        "seeds": 5,
        "minutes": 4,
        "task": "digits",
    },
)
