"""Inner widths of a vision transformer's blocks: equal as DeiT has them, or by the rule that NViT reads off pruning.

Yang et al. 2023, arXiv:2110.04869 (NViT): pruned blocks are narrow at both ends of a network and wide in the middle,
with less attention and more MLP than DeiT. ReViT is that rule as a network of its own.
"""

from dataclasses import dataclass

from host.errors import ModelError

HEAD_DIM = 64
"""Of every DeiT: the width of a head, which its softmax scale is made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWidths:
    """The inner widths of one block, as pruning may leave them.

    Attributes:
        num_heads: attention heads.
        qk_dim: width of query and key, per head.
        v_dim: width of the value, per head.
        mlp_dim: hidden width of the MLP.

    Raises:
        ModelError: one of them is below 1.
    """

    num_heads: int
    qk_dim: int
    v_dim: int
    mlp_dim: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ModelError(f"{name} of a block must be 1 or more, got {getattr(self, name)}")

    @property
    def qkv_dims(self) -> tuple[int, int, int]:
        """Widths of all heads' queries, keys and values together."""
        return self.num_heads * self.qk_dim, self.num_heads * self.qk_dim, self.num_heads * self.v_dim


def uniform_widths(depth: int, num_heads: int, head_dim: int, mlp_dim: int) -> tuple[BlockWidths, ...]:
    """The same widths in every block, as DeiT has them before pruning."""
    return (BlockWidths(num_heads=num_heads, qk_dim=head_dim, v_dim=head_dim, mlp_dim=mlp_dim),) * depth


def revit_widths(embed_dim: int, *, depth: int = 12, rule: str = "paper") -> tuple[BlockWidths, ...]:
    """NViT's rule: less attention than DeiT, and twice the heads, queries, keys and MLP in the middle half of blocks.

    Args:
        embed_dim: D.
        depth: number of blocks. The paper has 12; that their middle half is wide at any depth is our reading.
        rule: `paper` rounds the widths of each block by its Table 6; `repository` is what the authors train: the middle
            has exactly twice the rounded widths of its neighbours, and the first and last block have 10 heads and twice
            the width of queries and keys.

    Raises:
        ModelError: no such rule, or an embedding so narrow that a width rounds to 0.
    """
    if rule not in ("paper", "repository"):
        raise ModelError(f"rule must be paper or repository, got {rule}")
    make = _paper_widths if rule == "paper" else _repository_widths
    return tuple(make(embed_dim, index, depth) for index in range(depth))


def _paper_widths(embed_dim: int, index: int, depth: int) -> BlockWidths:
    growth = _growth(index, depth)
    return BlockWidths(
        num_heads=_nearest(growth * embed_dim / 100, 2),
        qk_dim=_nearest(growth * embed_dim / 20, 8),
        v_dim=HEAD_DIM,
        mlp_dim=3 * growth * embed_dim,
    )


def _repository_widths(embed_dim: int, index: int, depth: int) -> BlockWidths:
    growth, is_end = _growth(index, depth), index in (0, depth - 1)
    return BlockWidths(
        num_heads=10 if is_end else growth * _nearest(embed_dim / 100, 2),
        qk_dim=(2 if is_end else growth) * _nearest(embed_dim / 20, 8),
        v_dim=HEAD_DIM,
        mlp_dim=3 * growth * embed_dim,
    )


def _growth(index: int, depth: int) -> int:
    """The paper's epsilon: 2 in the middle half of the blocks, 1 outside."""
    return 2 if depth // 4 <= index < depth - depth // 4 else 1


def _nearest(value: float, step: int) -> int:
    return step * round(value / step)
