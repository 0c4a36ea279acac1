"""How far other models' next-token distributions are from the whole model's."""

import torch


class Reference:
    """The whole model's distribution on a slice of tokens, to which other models' logits are compared."""

    def __init__(self, logits: torch.Tensor):
        log_normaliser = torch.logsumexp(logits, dim=-1)
        self.top1 = logits.argmax(-1)
        self.probabilities = (logits - log_normaliser[:, None]).exp()
        self.negative_entropy = torch.linalg.vecdot(self.probabilities, logits) - log_normaliser

    def compare(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL(reference, other) [T] in nats over the full vocabulary, whether the arg-max is the same [T])."""
        cross = torch.logsumexp(logits, dim=-1) - torch.linalg.vecdot(self.probabilities, logits)
        return (self.negative_entropy + cross).clamp(min=0.0), logits.argmax(-1) == self.top1
