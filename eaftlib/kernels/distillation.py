"""How far a student's next-token distributions are from a teacher's, and which way its logits should go."""

import torch


def distillation(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(teacher, student) [T] in nats over the full vocabulary, its gradient for the student's logits [T, V]).

    student, teacher: logits [T, V] float32. The gradient is softmax(student) - softmax(teacher); it overwrites ``student``.
    """
    normaliser = torch.logsumexp(student, dim=-1, keepdim=True)
    reference = torch.logsumexp(teacher, dim=-1, keepdim=True)
    probability = (teacher - reference).exp_()
    difference = torch.linalg.vecdot(probability, teacher - student)
    kl = (difference - reference.squeeze(-1) + normaliser.squeeze(-1)).clamp_(min=0.0)
    return kl, student.sub_(normaliser).exp_().sub_(probability)
