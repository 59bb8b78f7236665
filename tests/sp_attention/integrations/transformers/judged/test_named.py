"""What a user may name: types, config files, folders with weights. What cannot be judged is refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe_dispatch.testing import Layout
from sp_attention.integrations.transformers.judged import (
    causal_moe_types,
    problem_of_subject_over_ranks,
    subject_of,
)

ANY = Layout(batch=1, seq=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    subject_of("mixtral").whole(ANY).to(torch.bfloat16).save_pretrained(path, max_shard_size="100KB")
    return path


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refused(what: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is what is tested)
        subject_of(what)
    return str(error.value)


def test_a_folder_gives_its_own_weights(folder: Path) -> None:
    stored, drawn = subject_of(str(folder)), subject_of("mixtral")
    assert problem_of_subject_over_ranks(stored) == ""
    model: nn.Module = stored.whole(ANY)
    wanted = drawn.whole(ANY).to(torch.bfloat16).state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())
    assert stored.told == drawn.told
    assert stored.told.startswith("mixtral: 2 layers of width 64, 8 heads, 2 of keys and values, 8 experts, 1037")


def test_a_config_file_is_shrunk(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"num_hidden_layers": 4, "hidden_size": 1024, "num_local_experts": 64}))
    small = subject_of(str(file)).maker.config
    assert (small.num_hidden_layers, small.hidden_size, small.num_local_experts) == (2, 64, 16)


def test_weights_that_are_missing_in_a_folder_are_told(folder: Path, tmp_path: Path) -> None:
    broken = subject_of(str(copied(folder, tmp_path)))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    told = problem_of_subject_over_ranks(broken)
    assert told.startswith(f"the weights in {tmp_path} cannot be loaded (FileNotFoundError")
    assert told.endswith("it has to be what save_pretrained writes: config.json, and all files of safetensors")
    for file in tmp_path.glob("*safetensors*"):
        file.unlink()
    assert "no file named model.safetensors" in problem_of_subject_over_ranks(broken)


def test_names_that_are_not_those_of_the_model_are_told(folder: Path, tmp_path: Path) -> None:
    subject_of("mixtral").whole(ANY).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights | {"model.extra": torch.zeros(2)}, file, metadata={"format": "pt"})
    told = problem_of_subject_over_ranks(subject_of(str(tmp_path)))
    assert told == (
        f"the weights in {tmp_path} are not those of the model: model.norm.weight is missing; model.extra is unknown"
    )


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    told = refused("qwen3_mo")
    assert told.startswith("qwen3_mo is no file, no folder, and no causal model type of Transformers 5")
    assert "(did you mean qwen3_moe?)" in told
    assert ", mixtral, " in told
    assert "kimi_linear" not in told
    assert refused(str(tmp_path / "absent.json")).startswith(f"there is no file {tmp_path}/absent.json")
    assert refused(str(tmp_path)).startswith(f"there is no file {tmp_path}/config.json")
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    assert refused(str(tmp_path)).startswith(f"{tmp_path}/config.json is no config that Transformers 5")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": 64}))
    assert "a vocabulary of 64; tokens are bytes, so it has to be 256 at least" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert refused(str(tmp_path)).startswith("vit is no causal language model of Transformers 5")


def test_layers_that_bypass_attention_are_refused_by_name() -> None:
    told = (
        " has layers ['linear_attention'], which do not attend to whole sequences through AttentionInterface; only "
        "full_attention, sliding_attention can be cut over ranks"
    )
    assert refused("qwen3_next") == f"qwen3_next{told}"
    assert refused("qwen3_5_moe") == f"qwen3_5_moe_text{told}"  # of a model of text and images, that of text
    assert refused("lfm2_moe").startswith("no small model can be made of the config of lfm2_moe (TypeError: ")


def test_models_without_experts_are_refused_as_apply_refuses_them() -> None:
    assert problem_of_subject_over_ranks(subject_of("qwen3")) == (
        "Qwen3ForCausalLM has no experts that follow Transformers' ExpertsInterface (a module decorated with "
        "use_experts_implementation); nothing can be cut over ranks"
    )
    assert "Gemma4ForCausalLM: it cannot be asked which mask it makes" in problem_of_subject_over_ranks(
        subject_of("gemma4_text")
    )


def test_types_with_experts_are_found() -> None:
    types = causal_moe_types()
    assert {"deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe", "qwen3_next", "aria_text"} <= set(types)
    assert "qwen3" not in types


def test_where_transformers_own_all_to_all_cannot_run_is_said() -> None:
    layout = Layout(sp=4, ep=4, batch=2, seq=33)
    assert subject_of("mixtral", ep_implementation="all_to_all").problem_in(layout) == ""
    uneven = subject_of("hunyuan_v1_moe", ep_implementation="all_to_all").problem_in(layout)
    assert uneven == "1 experts of hunyuan_v1_moe are not even over ep = 4"
    copies = subject_of("mixtral", ep_implementation="all_to_all").problem_in(
        Layout(dp=2, sp=2, ep=2, batch=2, seq=33)
    )
    assert copies == "ep = 2 of 4 ranks: copies of experts are summed by Transformers' FSDP only"
    without = subject_of("mixtral", ep_implementation="all_to_all")
    without.maker.config.base_model_ep_plan = None
    assert without.problem_in(layout) == "the config of mixtral has no base_model_ep_plan"
    assert subject_of("hunyuan_v1_moe").problem_in(layout) == ""
