"""The tiny model in torch, and PEFT's training of one adapter alone."""

import numpy as np
import peft
import torch
from tiny import FEATURES


class TorchMlp(torch.nn.Module):
    """`tiny.Mlp` with the weights of one."""

    def __init__(self, model):
        super().__init__()
        for name, (h, n) in FEATURES.items():
            linear = torch.nn.Linear(h, n)
            source = getattr(model, name)
            with torch.no_grad():
                linear.weight.copy_(torch.tensor(np.asarray(source.kernel[...]).T))
                linear.bias.copy_(torch.tensor(np.asarray(source.bias[...])))
            setattr(self, name, linear)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def peft_run(model, folder, optimizer, steps, x, targets, clip=None):
    """Trains the adapter in `folder` alone on these rows; `clip` is the largest gradient norm."""
    run = peft.PeftModel.from_pretrained(TorchMlp(model), folder, is_trainable=True)
    trained = [p for p in run.parameters() if p.requires_grad]
    tx = optimizer(trained)
    x, targets = torch.tensor(x), torch.tensor(targets)
    for _ in range(steps):
        tx.zero_grad()
        loss = ((run(x) - targets) ** 2).mean(-1).mean()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        tx.step()
    return run
