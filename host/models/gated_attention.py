"""The gated class-attention block of GCAB: one class token per task, and gates that reserve units for their task.

Cotogni et al. 2025, IJCV 133, arXiv:2211.12292; the gates are those of hard attention to the task (HAT), Serra et al.
2018, arXiv:1801.01423. `gcab` puts the block behind its encoder.

As in the authors' code: v is masked through its input only (their figure masks it after the projection, too), and the
newest task keeps its soft gate in evaluation, at the scale 800, where it is all but binary.

Where we differ:
- An optimizer step cannot move reserved entries (`reserved_held`); there, weight decay does.
- Each task's gates are parameters of their own, frozen with their task. There, all share one embedding table, which
  decays.
- In the inference form every task has weights of its own, with the gates folded in and unused hidden units removed.
  The class token is a parameter, so its query is a constant: query and keys become one linear map from a token to a
  score per head, and values are computed from the pooled tokens. What is soft in the newest task's gates stays soft.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from host.models.convit import initialize
from host.models.deploy import make_linear

S_MAX = 800.0
"""The largest scale of the gates, and the one in evaluation."""
COSH_LIMIT = 50.0
EMBEDDING_LIMIT = 6.0


def annealed_scale(batch_index: int, num_batches: int) -> float:
    """The scale s of the gates for one batch of an epoch, from 1 / 800 linearly towards 800."""
    return 1 / S_MAX + (S_MAX - 1 / S_MAX) * batch_index / num_batches


class GatedClassAttentionBlock(nn.Module):
    """Tokens [B, N, D] to one vector [B, D], as the class token of a task sees them.

    Gates of task t: m0 [D] = sigmoid(s e0) on everything D wide, m2 [H] = sigmoid(s e2) on the MLP's hidden units.
    For all tasks but the newest they are binary: 1 where e > 0.

    Args:
        hidden_dim: H.

    Attributes:
        gate_scale: s in training; whoever trains sets it, see `annealed_scale`.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, hidden_dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (embed_dim // num_heads) ** -0.5
        self.gate_scale = S_MAX
        self.norm1 = nn.LayerNorm(embed_dim)
        self.q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v = nn.Linear(embed_dim, embed_dim, bias=False)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop_path = DropPath(drop_path)
        self.cls_tokens, self.e0, self.e2 = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.apply(initialize)

    @property
    def num_tasks(self) -> int:
        return len(self.cls_tokens)

    def add_task(self) -> None:
        """Append a class token and gates; freeze those of the tasks before."""
        for parameters in (self.cls_tokens, self.e0, self.e2):
            parameters.requires_grad_(False)
        like = self.fc1.weight
        self.cls_tokens.append(nn.init.trunc_normal_(like.new_empty(self.fc1.in_features), std=0.02))
        self.e0.append(nn.init.normal_(like.new_empty(self.fc1.in_features)))
        self.e2.append(nn.init.normal_(like.new_empty(self.fc1.out_features)))

    def gates(self, task: int) -> tuple[Tensor, Tensor]:
        """m0 [D] and m2 [H] of one task."""
        if task < self.num_tasks - 1:
            return self._binary(self.e0[task]), self._binary(self.e2[task])
        scale = self.gate_scale if self.training else S_MAX
        return (scale * self.e0[task]).sigmoid(), (scale * self.e2[task]).sigmoid()

    def forward(self, tokens: Tensor, task: int) -> Tensor:
        m0, m2 = self.gates(task)
        cls_token = self.cls_tokens[task].expand(len(tokens), 1, -1)  # [B, 1, D]
        x = self.norm1(torch.cat((cls_token, tokens), dim=1)) * m0  # [B, N + 1, D]
        q, k, v = self._heads(self.q(x[:, :1]) * m0), self._heads(self.k(x) * m0), self._heads(self.v(x))
        attention = (q * self.scale @ k.transpose(2, 3)).softmax(dim=-1)  # [B, heads, 1, N + 1]
        pooled = (attention @ v).transpose(1, 2).flatten(2) * m0  # [B, 1, D]
        x = cls_token + self.drop_path(self.proj(pooled) * m0)
        hidden = F.gelu(self.fc1(self.norm2(x) * m0)) * m2  # [B, 1, H]
        return (x + self.drop_path(self.fc2(hidden) * m0))[:, 0]

    def cumulative_masks(self, num_tasks: int | None = None) -> tuple[Tensor, Tensor]:
        """Which units any of the first `num_tasks` tasks uses, 1 or 0 as [D] and [H]; by default all but the newest."""
        count = self.num_tasks - 1 if num_tasks is None else num_tasks
        masks = []
        for embeddings in (self.e0, self.e2):
            mask = torch.zeros_like(embeddings[0], requires_grad=False)
            for embedding in embeddings[:count]:
                mask = torch.maximum(mask, self._binary(embedding))
            masks.append(mask)
        return masks[0], masks[1]

    def reserved(self, num_tasks: int | None = None) -> dict[str, Tensor]:
        """By parameter name, 1 at the entries that those tasks read and 0 elsewhere."""
        m0, m2 = self.cumulative_masks(num_tasks)
        square = torch.outer(m0, m0)
        return {
            **{f"{name}.weight": square for name in ("q", "k", "v", "proj")},
            "proj.bias": m0,
            "fc1.weight": torch.outer(m2, m0),
            "fc1.bias": m2,
            "fc2.weight": torch.outer(m0, m2),
            "fc2.bias": m0,
        }

    def reserved_fraction(self, num_tasks: int | None = None) -> float:
        """The share of the block's gated parameters that is reserved, 0 to 1."""
        masks = self.reserved(num_tasks).values()
        return float(sum(mask.sum() for mask in masks)) / sum(mask.numel() for mask in masks)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """After backward: no gradient at reserved entries."""
        for name, mask in self.reserved().items():
            gradient = self.get_parameter(name).grad
            if gradient is not None:
                gradient.mul_(1 - mask)

    @torch.no_grad()
    def compensate_gradients(self) -> None:
        """After backward: undo what the scale did to the gradients of the newest gates (HAT)."""
        for embedding in (self.e0[-1], self.e2[-1]):
            if embedding.grad is not None:
                steepness = (self.gate_scale * embedding).clamp(-COSH_LIMIT, COSH_LIMIT).cosh() + 1
                embedding.grad.mul_(S_MAX / self.gate_scale * steepness / (embedding.cosh() + 1))

    @contextmanager
    def reserved_held(self) -> Iterator[None]:
        """Around an optimizer step: reserved entries keep their bits, and the newest gates stay within +-6.

        A zero gradient alone does not hold them: momentum of the task before and weight decay move them still.
        """
        reserved = {name: mask.bool() for name, mask in self.reserved().items()}
        before = {name: self.get_parameter(name).detach().clone() for name in reserved}
        yield
        with torch.no_grad():
            for name, mask in reserved.items():
                parameter = self.get_parameter(name)
                parameter.copy_(torch.where(mask, before[name], parameter))
            for embedding in (self.e0[-1], self.e2[-1]):
                embedding.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]

    @staticmethod
    def _binary(embedding: Tensor) -> Tensor:
        return (embedding > 0).to(embedding)


class FoldedClassAttention(nn.Module):
    """One task's class attention with its gates in the weights: normalized tokens [B, N, D] to [B, D]."""

    values: Tensor
    cls_token: Tensor
    cls_input: Tensor

    @torch.no_grad()
    def __init__(self, block: GatedClassAttentionBlock, task: int) -> None:
        super().__init__()
        m0, m2 = block.gates(task)
        used = m2 > 0
        used[m2.argmax()] = True  # a layer without units cannot be exported
        cls_token = block.cls_tokens[task]
        cls_input = block.norm1(cls_token)
        heads = (block.num_heads, -1)
        query = (block.q(cls_input * m0) * m0 * block.scale).unflatten(0, heads)  # [heads, D / heads]
        keys = (m0[:, None] * block.k.weight * m0).unflatten(0, heads)  # [heads, D / heads, D]
        values = (m0[:, None] * block.v.weight * m0).unflatten(0, heads)  # [heads, D / heads, D]
        self.scores = make_linear(torch.einsum("hc,hcd->hd", query, keys))
        self.register_buffer("values", values.transpose(1, 2).contiguous())  # [heads, D, D / heads]
        self.register_buffer("cls_token", cls_token[None])  # [1, D]
        self.register_buffer("cls_input", cls_input[None, None])  # [1, 1, D]
        self.proj = make_linear(m0[:, None] * block.proj.weight, block.proj.bias * m0)
        self.norm2 = block.norm2
        self.fc1 = make_linear((block.fc1.weight * m0)[used], block.fc1.bias[used])
        self.fc2 = make_linear((m0[:, None] * block.fc2.weight * m2)[:, used], block.fc2.bias * m0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls_input.expand(len(x), -1, -1), x), dim=1)  # [B, N + 1, D]
        attention = self.scores(x).transpose(1, 2).softmax(dim=-1)  # [B, heads, N + 1]
        pooled = (attention @ x).transpose(0, 1)  # [heads, B, D]
        pooled = (pooled @ self.values).transpose(0, 1).flatten(1)  # [B, D]
        x = self.cls_token + self.proj(pooled)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FoldedBlock(nn.Module):
    """The inference form of the block: the same call, with weights for each task."""

    def __init__(self, block: GatedClassAttentionBlock) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.tasks = nn.ModuleList(FoldedClassAttention(block, task) for task in range(block.num_tasks))

    def forward(self, tokens: Tensor, task: int) -> Tensor:
        return self.tasks[task](self.norm1(tokens))
