"""Takes three operators into a model of one's own: selection of tokens, volumes of modalities, deformable sampling."""

import torch

from signal_reid import ops

B, M, H, W, C = 8, 3, 16, 8, 64
tokens = torch.randn(B, M, H * W, C, requires_grad=True)
cls = torch.randn(B, M, C)

mask = ops.select_tokens(tokens, cls, cls, k_intra=20, k_inter=40)
print(f"{mask.sum().item()} of {mask.numel()} tokens are kept")

loss = ops.gramian_contrastive_loss(ops.mean_tokens(tokens), temperature=0.07)
print(f"the modalities' volumes give a loss of {loss.item():.3f}, chance is {torch.tensor(float(B)).log().item():.3f}")

offsets = torch.zeros(B, H // 4, W // 4, requires_grad=True)
sampled = ops.deformable_sample(tokens[:, 0], offsets, grid_size=(H, W))
(loss + sampled.square().mean()).backward()
print(f"gradients reach {tuple(tokens.grad.shape)} tokens and {tuple(offsets.grad.shape)} offsets")


class Aligned(torch.nn.Module):
    """A model of one's own that has two of the operators in it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(C, 32)
        self.temperature = torch.nn.Parameter(torch.tensor(0.07))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        means = ops.mean_tokens(ops.quick_gelu(self.project(tokens)))
        return ops.gramian_contrastive_loss(means, self.temperature)


model = Aligned()
# Without graph breaks; "aot_eager" spares this example the compiler itself, which takes a minute.
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
with torch.autocast("cpu", torch.bfloat16):
    loss = compiled(tokens.detach())
loss.backward()
print(f"under autocast and torch.compile: a loss of {loss.item():.3f}")
