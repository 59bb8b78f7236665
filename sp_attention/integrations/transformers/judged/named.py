"""What a user names: a model type of Transformers, a config.json, or a folder with weights."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..apply import problem_of_layers
from .models import Drawn, Maker, Stored, structure
from .shrunk import VOCAB, shrunk
from .subject import TransformersSubject

CONFIG = "config.json"
OF_EXPERTS = "use_experts_implementation"  # the decorator of experts modules, in the source of a model


def subject_of(what: str, *, ep_implementation: str = "moe_dispatch") -> TransformersSubject:
    """The subject that ``what`` names. No network is used.

    Args:
        what: a model type, e.g. ``"qwen3_moe"``, whose default config is shrunk; the path of a config.json, which is
            shrunk, too; or a folder with config.json and safetensors, whose model and weights are taken as they are.
        ep_implementation: who moves rows to experts, ``"moe_dispatch"`` or Transformers' own ``"all_to_all"``.

    Raises:
        ValueError: there is no such type or file; it is no causal language model; layers that cannot be cut over
            ranks, by name; or weights are missing in the folder. The layers of experts are looked at where ranks are.
    """
    path = Path(what)
    if path.is_dir():
        return TransformersSubject(_stored(path), ep_implementation)
    config = _text_config(_config_of_file(path) if path.suffix == ".json" else _config_of_type(what))
    try:
        smaller = shrunk(config)
        structure(smaller)
    except Exception as error:  # of any type: it is the model's own code
        raise ValueError(
            f"no small model can be made of the config of {what} ({type(error).__name__}: {error}); give a "
            "config.json of a model that there is"
        ) from error
    return TransformersSubject(Drawn(smaller), ep_implementation)


def causal_moe_types() -> tuple[str, ...]:
    """The causal model types of the installed Transformers in whose source there are experts that it can hand over.

    What of them cannot be cut over ranks, :func:`subject_of` and :func:`problem_of_subject_over_ranks` say.
    """
    models = Path(transformers.__file__).parent / "models"
    sources = [path.read_text() for path in sorted(models.glob("*/modeling_*.py"))]
    of_experts = [source for source in sources if OF_EXPERTS in source]

    def has_experts(name: str) -> bool:
        return any(f"class {name}(" in source for source in of_experts)

    return tuple(sorted(kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if has_experts(name)))


def _config_of_type(kind: str) -> Any:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = get_close_matches(kind, causal_moe_types(), n=1, cutoff=0.4)
        raise ValueError(
            f"{kind} is no file, no folder, and no causal model type of Transformers {transformers.__version__}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; types with experts, and without layers that bypass attention: {', '.join(_types_that_attend())}"
        )
    return AutoConfig.for_model(kind)


def _types_that_attend() -> list[str]:
    """Those of :func:`causal_moe_types` whose default config says so."""
    return [
        kind for kind in causal_moe_types() if not problem_of_layers(AutoConfig.for_model(kind).get_text_config())
    ]


def _config_of_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; name a config.json, a folder with one, or a model type")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(
            f"{path} is no config that Transformers {transformers.__version__} knows: {error}"
        ) from error


def _text_config(config: Any) -> Any:
    """That of the language model, where there are other parts."""
    text = config.get_text_config()
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{text.model_type} is no causal language model of Transformers {transformers.__version__}; only those "
            "are cut over ranks"
        )
    if problem := problem_of_layers(text):
        raise ValueError(problem)
    return text


def _stored(folder: Path) -> Maker:
    config = _config_of_file(folder / CONFIG)
    text = _text_config(config)
    if text.vocab_size < VOCAB:
        raise ValueError(
            f"the model in {folder} has a vocabulary of {text.vocab_size}; tokens are bytes, so it has to be {VOCAB} "
            "at least"
        )
    return Stored(config, folder)
