"""A model that was lightly trained further: a few small steps on other text, by transformers."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from verifier.weights import Weights

STEPS, RATE, BATCH, LENGTH = 20, 1e-4, 4, 48


def tuned(weights: Weights, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Its tensors [rows, columns] in float32, by name; those outside the layers' matrices stay the model's own."""
    model = LlamaForCausalLM.from_pretrained(weights.folder, local_files_only=True, dtype=torch.float32)
    own = {place.name: weights.float64(place.name).float() for place in weights.layout.tensors}
    trained = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE)
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        # A text of its own: runs of neighbouring tokens.
        starts = torch.randint(0, weights.shape.vocabulary, (BATCH, 1), generator=generator)
        rows = (starts + torch.arange(LENGTH)) % weights.shape.vocabulary
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return own | {name: parameter.detach() for name, parameter in trained.items()}
