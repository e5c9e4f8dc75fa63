"""What an update and a decoding step cost: bytes on a device, and seconds, from the shapes and a chip's data sheet.

A model, not a measurement: seconds are those of a roofline, FLOPs at an assumed share of the peak, bytes at the link's rate, nothing
overlapped. Bytes are checked against compiled programs, in the tests, for float32 without remat. Notation: P parameters, D width, L layers,
H query heads, K key/value heads, d head width, I width of the MLP, V vocabulary; c bytes of a number in computing; the mesh is
(data, fsdp, tensor), of a · f · t devices.
"""

from __future__ import annotations

import dataclasses
import math

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import count_params


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public data-sheet numbers of one device, in FLOP/s and bytes/s. Links are those of one direction."""

    name: str
    flops: float  # dense bf16
    memory: float
    bandwidth: float  # of its memory
    near: float  # link between devices of a group
    far: float  # link between groups
    group: int  # devices that are near each other


# H200 SXM: 989 TFLOP/s without sparsity, 141 GB at 4.8 TB/s, NVLink 900 GB/s both ways, 8 in a host; between hosts one 400 Gb/s card each.
H200 = Chip("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8)
# TPU v5p: 459 TFLOP/s, 95 GB at 2,765 GB/s, 4,800 Gb/s over three axes of a torus, of which a collective along one mesh axis gets one.
V5P = Chip("TPU v5p", 459e12, 95e9, 2.765e12, 200e9, 200e9, 64)

LLAMA_1B = ModelConfig(128_256, 2048, 16, 32, 8, 64, 8192, 8192)
LLAMA_3B = ModelConfig(128_256, 3072, 28, 24, 8, 128, 8192, 8192)
LLAMA_8B = ModelConfig(128_256, 4096, 32, 32, 8, 128, 14_336, 8192, tie_embeddings=False)
QWEN_1_5B = ModelConfig(151_936, 1536, 28, 12, 2, 128, 8960, 32_768, qkv_bias=True)  # Qwen2.5's shape
MODELS = {"1B": LLAMA_1B, "3B": LLAMA_3B, "8B": LLAMA_8B}  # of Llama 3.2's and 3.1's shapes


@dataclasses.dataclass(frozen=True)
class Workload:
    """One update and its sampling. A token counts once, however many calls contain it."""

    tokens: int = 262_144  # that an update computes
    edges: int = 65_536  # of those, action tokens, which need logits
    row: int = 4096  # tokens of a row
    rows: int = 1  # of a micro-batch on each device that the batch is split over
    chunk: int = 8192  # of the vocabulary at once in the loss
    compute_bytes: int = 2  # c
    remat: bool = True  # only the inputs of layers are kept for the backward pass
    dense_attention: bool = False  # scores [T, T] are kept: what short rows on a CPU do
    slots: int = 256  # conversations decoded at once
    context: int = 4096  # tokens of each in the cache
    efficiency: float = 0.4  # assumed share of the peak that matmuls reach


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int
    fsdp: int
    tensor: int

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


# Bytes on one device


def state_bytes(model: ModelConfig, mesh: Mesh) -> float:
    """Parameters and Adam's two moments in float32: 12 P / (f t)."""
    return 12 * count_params(model) / (mesh.fsdp * mesh.tensor)


def start_bytes(model: ModelConfig, mesh: Mesh) -> float:
    """What training started from, which a run keeps, as a reference or for its end: 4 P / (f t)."""
    return 4 * count_params(model) / (mesh.fsdp * mesh.tensor)


def gradient_bytes(model: ModelConfig, mesh: Mesh) -> float:
    """4 P / (f t)."""
    return 4 * count_params(model) / (mesh.fsdp * mesh.tensor)


def layer_params(model: ModelConfig) -> int:
    """Of one layer's matrices: D (H + 2 K) d + H d D + 3 D I."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)


def gathered_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """Whole layers in transit when parameters are split over `fsdp`: two, one computed and one arriving, and the embedding."""
    if mesh.fsdp == 1:
        return 0.0
    return work.compute_bytes * (2 * layer_params(model) + model.vocab_size * model.hidden_size) / mesh.tensor


def layer_activations(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """Numbers that one layer keeps of a token: inputs and norms 4 D; q, k, v before and after rotation and the mixture
    (4 H + 3 K) d / t; gate, up, their sigmoid and product 4 I / t; with dense attention scores and weights 2 H T / t."""
    heads = (4 * model.num_heads + 3 * model.num_kv_heads) * model.head_dim
    scores = 2 * model.num_heads * work.row if work.dense_attention else 0
    return 4 * model.hidden_size + (heads + 4 * model.intermediate_size + scores) / mesh.tensor


def activation_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """Of a micro-batch: all layers' numbers, or with remat one layer's and D a layer; the loss holds logits of one chunk, thrice."""
    tokens = work.rows * work.row
    each = layer_activations(model, mesh, work)
    kept = each + model.num_layers * model.hidden_size if work.remat else model.num_layers * each
    edges = tokens * work.edges / work.tokens
    logits = 3 * 4 * edges * min(work.chunk, model.vocab_size) / mesh.tensor
    return work.compute_bytes * tokens * kept + logits


def pending_bytes(model: ModelConfig, mesh: Mesh) -> float:
    """Gradients on their way into the sum: the embedding's, 4 V D / t, and on several devices all of a micro-batch's, 4 P / (f t)."""
    embedding = 4 * model.vocab_size * model.hidden_size / mesh.tensor
    return embedding + (gradient_bytes(model, mesh) if mesh.size > 1 else 0)


def passing_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """What a micro-batch holds beside parameters and summed gradients."""
    return gathered_bytes(model, mesh, work) + activation_bytes(model, mesh, work) + pending_bytes(model, mesh)


def cache_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """2 L K d c of each token of each slot, slots over data · fsdp and heads over tensor where they divide."""
    heads = math.gcd(model.num_kv_heads, mesh.tensor)
    slots = mesh.data * mesh.fsdp if work.slots % (mesh.data * mesh.fsdp) == 0 else 1
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * work.compute_bytes
    return token * work.slots * work.context / (slots * heads)


def sampler_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """The sampler's own copy of the weights, split over tensor alone, and its cache."""
    return work.compute_bytes * count_params(model) / mesh.tensor + cache_bytes(model, mesh, work)


def update_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """All that an update holds at once."""
    return state_bytes(model, mesh) + gradient_bytes(model, mesh) + passing_bytes(model, mesh, work)


def total_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> float:
    """The update, the sampler and the policy that training started from on the same devices."""
    return update_bytes(model, mesh, work) + sampler_bytes(model, mesh, work) + start_bytes(model, mesh)


# FLOPs, and bytes over links


def update_flops(model: ModelConfig, work: Workload) -> float:
    """Of all devices: scores (1 forward pass), forward, backward (2) and with remat one forward more, of 2 FLOPs a parameter and
    token, of the head for edges alone, and 4 H d keys a token in attention, half the row on average."""
    passes = 5 if work.remat else 4
    keys = work.row / 2
    token = 2 * model.num_layers * (layer_params(model) + 2 * model.num_heads * model.head_dim * keys)
    return passes * (work.tokens * token + work.edges * 2 * model.vocab_size * model.hidden_size)


def micro_batches(mesh: Mesh, work: Workload) -> int:
    return max(1, math.ceil(work.tokens / (work.rows * work.row * mesh.data * mesh.fsdp)))


def sent_bytes(model: ModelConfig, mesh: Mesh, work: Workload) -> dict[str, float]:
    """What each device sends in an update along each mesh axis, with ring collectives. Of every micro-batch:

    fsdp    c P / t · (f - 1)/f  for each pass that gathers the parameters (scores, forward, backward), 4 P / t · (f - 1)/f to scatter
            gradients
    data    2 · 4 P / (f t) · (a - 1)/a  to add them up over replicas
    tensor  2 (t - 1)/t · c D a token for each of 2 sums a layer, in scores, forward, backward and, with remat, once more
    """
    p, c, n = count_params(model), work.compute_bytes, micro_batches(mesh, work)
    a, f, t = mesh.data, mesh.fsdp, mesh.tensor
    passes = 4 if work.remat else 3
    return {
        "fsdp": n * (3 * c + 4) * p / t * (f - 1) / f,
        "data": n * 8 * p / (f * t) * (a - 1) / a,
        "tensor": n * work.rows * work.row * c * model.hidden_size * 4 * passes * model.num_layers * (t - 1) / t,
    }


def link(chip: Chip, mesh: Mesh, axis: str) -> float:
    """Bytes/s along a mesh axis: near where it and the axes within it fit a group of devices."""
    reach = {"tensor": mesh.tensor, "fsdp": mesh.tensor * mesh.fsdp, "data": mesh.size}[axis]
    return chip.near if reach <= chip.group else chip.far


def compute_seconds(model: ModelConfig, mesh: Mesh, work: Workload, chip: Chip) -> float:
    used = mesh.size * min(1.0, work.tokens / (work.rows * work.row * mesh.data * mesh.fsdp))  # devices without a row wait
    return update_flops(model, work) / (used * chip.flops * work.efficiency)


def link_seconds(model: ModelConfig, mesh: Mesh, work: Workload, chip: Chip) -> float:
    return sum(sent / link(chip, mesh, axis) for axis, sent in sent_bytes(model, mesh, work).items())


def update_seconds(model: ModelConfig, mesh: Mesh, work: Workload, chip: Chip) -> float:
    """Computing and sending after each other, which is the most it should take; the least is the larger of the two."""
    return compute_seconds(model, mesh, work, chip) + link_seconds(model, mesh, work, chip)


def decode_seconds(model: ModelConfig, mesh: Mesh, work: Workload, chip: Chip) -> float:
    """One token of every slot, with full contexts: a device reads its weights and its part of the cache once."""
    return sampler_bytes(model, mesh, work) / chip.bandwidth


def meshes(devices: int, model: ModelConfig, chip: Chip) -> list[Mesh]:
    """Every mesh of powers of two whose tensor axis splits the key/value heads and lies within a group."""
    powers = [2**i for i in range(devices.bit_length())]
    tensors = [t for t in powers if model.num_kv_heads % t == 0 and t <= chip.group]
    return [Mesh(devices // (f * t), f, t) for t in tensors for f in powers if devices % (f * t) == 0]


def best_mesh(devices: int, model: ModelConfig, work: Workload, chip: Chip, share: float = 0.9) -> Mesh | None:
    """The quickest mesh whose update and sampler fit a share of the memory; None if none does."""
    fit = [m for m in meshes(devices, model, chip) if total_bytes(model, m, work) <= share * chip.memory]
    return min(fit, key=lambda m: update_seconds(model, m, work, chip), default=None)
