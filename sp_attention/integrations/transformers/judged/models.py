"""Models in one process, by Transformers' own eager code: drawn from a shrunk config, or loaded from a folder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .drawn import draw_wide

OWN_CODE = MappingProxyType({"attn_implementation": "eager", "experts_implementation": "eager"})
KINDS_OF_NAMES = (
    ("missing_keys", "missing"),
    ("unexpected_keys", "unknown"),
    ("mismatched_keys", "of another shape"),
)
MOST_NAMED = 3


class Maker(Protocol):
    """Makes the same model in each call, in every process.

    Attributes:
        config: of the model.
    """

    @property
    def config(self) -> Any: ...

    def make(self) -> Any:
        """Without dropout and jitter (``eval()``): a random model cannot be compared."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """A model with weights that are drawn wide."""

    config: Any

    def make(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), **OWN_CODE)
        draw_wide(model)
        return model.eval()


@dataclass(frozen=True, slots=True)
class Stored:
    """A model with the weights of a folder, as ``save_pretrained`` writes it."""

    config: Any
    folder: Path

    def make(self) -> Any:
        """
        Raises:
            ValueError: the folder lacks weights, or has others than the model.
        """
        try:
            with _in_silence():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.folder, local_files_only=True, output_loading_info=True, **OWN_CODE
                )
        except Exception as error:  # what a damaged folder raises is of many types
            raise ValueError(
                f"the weights in {self.folder} cannot be loaded ({type(error).__name__}: {_first_line(error)}); it "
                "has to be what save_pretrained writes: config.json, and all files of safetensors"
            ) from error
        model, told = loaded
        if problem := _problem_of_names(told):
            raise ValueError(f"the weights in {self.folder} are not those of the model: {problem}")
        return model.eval()


def structure(config: Any) -> Any:
    """The model of ``config`` on "meta": names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **OWN_CODE)


def _problem_of_names(told: dict[str, Any]) -> str:
    problems = []
    for what, told_as in KINDS_OF_NAMES:
        names = sorted(str(name) for name in told.get(what) or ())
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            problems.append(f"{', '.join(names[:MOST_NAMED])}{more} {'is' if len(names) == 1 else 'are'} {told_as}")
    return "; ".join(problems)


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without progress bars and reports: what is wrong, we tell."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no text").splitlines()[0]
