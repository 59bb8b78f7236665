"""Any causal MoE model of Transformers as a subject: of ``validate --hf``, and of ``compare_with_one_process``."""

from .named import causal_moe_types, subject_of
from .refused import problem_of_subject_over_ranks
from .subject import TransformersSubject

__all__ = ["TransformersSubject", "causal_moe_types", "problem_of_subject_over_ranks", "subject_of"]
